"""The constructor of mmcv 1.x alone, and next to that of mmengine."""

import logging

import pytest
from mmcv.utils import get_logger
from mmengine.optim import build_optim_wrapper

from mmdet_ema.errors import OptionError
from tests.optimizers import detectors
from tests.optimizers.mmcv1.toy import build
from tests.optimizers.models import Tied, Zoo

SGD = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4)


@pytest.mark.parametrize('name', detectors.MODELS)
@pytest.mark.parametrize(
    'cfg',
    [
        dict(),
        dict(custom_keys=dict(backbone=dict(lr_mult=0.1), bn1=dict())),
        dict(norm_decay_mult=1.0, bias_lr_mult=2.0, dcn_offset_lr_mult=0.1),
        dict(flat_decay_mult=0.5, decay_kinds=['weight', 'other']),
    ],
)
def test_same_groups_from_both(name, cfg):
    """The constructor for mmengine makes the same groups in the same order."""
    model = detectors.MODELS[name][0]()
    cfg = dict(
        constructor='EMAOptimizerConstructor',
        paramwise_cfg=dict(cfg, batch_size=2),
    )
    wrapper = build_optim_wrapper(model, dict(cfg, optimizer=dict(SGD)))
    theirs = wrapper.optimizer.param_groups
    ours = build(model, SGD, **cfg).param_groups
    assert [g['name'] for g in theirs] == [g['name'] for g in ours]
    for left, right in zip(theirs, ours):
        assert [*map(id, left['params'])] == [*map(id, right['params'])]
        assert {**left, 'params': 0} == {**right, 'params': 0}


def test_the_log_of_the_tool(tmp_path):
    """The groups go as a table into the log file of the tool, once."""
    logger = get_logger('tool', log_file=str(tmp_path / 'tool.log'))
    build(Tied(), SGD)
    text = (tmp_path / 'tool.log').read_text()
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()
            logger.removeHandler(handler)
    assert 1 == text.count('SGD, 9 tensors in 3 groups')


def test_no_type():
    """An optimizer without a type is refused with what to do."""
    with pytest.raises(OptionError, match='add one'):
        build(Zoo(), dict(lr=0.1))
