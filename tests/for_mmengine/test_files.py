"""Files that only a run of mmengine is given, or writes."""

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.runner.checkpoint import _load_checkpoint

from tests.for_mmengine.toy import (
    Run,
    ToyData,
    ToyModel,
    loader,
    same,
    untied,
)

EMA = dict(type='EMAHook', decay=0.9, tau=2)
THEIRS = dict(type='MMEngineEMAHook', momentum=0.1)


@pytest.mark.parametrize('resume', [True, False])
@pytest.mark.parametrize('theirs', [(), (THEIRS,)], ids=['none', 'theirs'])
def test_files_of_the_framework_are_read(tmp_path, theirs, resume):
    """Whether they were written with its EMA hook or without one."""
    options = dict(model=untied(ToyModel()), max_epochs=1)
    first = Run(tmp_path, *theirs, **options).train()
    path = tmp_path / 'epoch_1.pth'
    saved = torch.load(path, weights_only=False)
    given = dict(load_from=str(path), resume=resume)
    given['model'] = untied(ToyModel())
    run = Run(tmp_path / 'given', EMA, **given).train()
    expected = first.records[-1] if resume else saved['state_dict']
    assert [] == same(run.recorder.start, expected)
    assert (4 if resume else 8) == len(run.records)


def test_metainfo_of_the_data_set_comes_back(tmp_path):
    """Whoever reads the file gets what the data set gave, arrays too."""
    data = ToyData(16, 0)
    sigmas = np.array([0.1, 0.2])
    data.metainfo = dict(
        classes=('a', 'b'),
        palette=[(1, 2, 3)],
        sigmas=sigmas,
        extra=ConfigDict(a=dict(b=1)),
    )
    train = dict(train_dataloader=dict(loader(), dataset=data))
    Run(tmp_path, EMA, max_epochs=1, **train).train()
    found = _load_checkpoint(str(tmp_path / 'epoch_1.pth'))
    found = found['meta']['dataset_meta']
    assert isinstance(found['sigmas'], np.ndarray)
    assert found.pop('sigmas').tolist() == sigmas.tolist()
    assert found == dict(
        classes=('a', 'b'), palette=[(1, 2, 3)], extra=dict(a=dict(b=1))
    )
    assert 4 == len(Run(tmp_path, EMA, resume=True, **train).train().records)
