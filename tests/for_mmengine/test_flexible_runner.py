"""``FlexibleRunner``, which loads before it calls ``before_run``."""

import torch
from mmengine.runner import FlexibleRunner

from tests import needs, oracle
from tests.for_mmengine.toy import Run, same

EMA = dict(type='EMAHook', decay=0.9, tau=3)


def train(folder, epochs=2, **options):
    """Train through ``FlexibleRunner``."""
    scheduler = dict(type='ConstantLR', factor=1.0)
    options.update(kind=FlexibleRunner, param_scheduler=scheduler)
    return Run(folder, EMA, max_epochs=epochs, **options).train()


def test_load_from_starts_the_average_from_the_loaded_weights(tmp_path):
    """``load_from`` works, where mmengine's own hook has no model yet."""
    train(tmp_path / 'a')
    path = tmp_path / 'a' / 'epoch_2.pth'
    loaded = torch.load(path, weights_only=needs.SAFELY)['state_dict']
    run = train(tmp_path / 'b', load_from=str(path))
    assert torch.equal(
        run.recorder.start['head.weight'], loaded['head.weight']
    )
    weights = run.load('epoch_2.pth')['state_dict']
    assert {} == run.wrong(weights, lambda n: oracle.ramp(n, 0.9, 3))


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    """4 epochs at once equal 2 and, resumed, 2 more: bit for bit."""
    whole = train(tmp_path / 'whole', 4)
    train(tmp_path / 'part', 2)
    path = str(tmp_path / 'part' / 'epoch_2.pth')
    resumed = train(tmp_path / 'part', 4, resume=path)
    left, right = (r.load('epoch_4.pth') for r in (whole, resumed))
    assert same(left['state_dict'], right['state_dict']) == []
    assert same(left['ema_state_dict'], right['ema_state_dict']) == []
