"""The same recorded weights through both adapters: the same averages."""

import functools

import pytest
import torch

from tests.for_mmcv1 import toy as mmcv_toy

pytest.importorskip('mmengine')

from mmdet_ema.for_mmengine.ema_hook import EMAHook as MMEngineHook
from tests.for_mmengine import toy as mmengine_toy

OPTIONS = [
    dict(),
    dict(decay=0.9, tau=3),
    dict(schedule='constant', decay=0.99, interval=3),
    dict(schedule='power', update_buffers=False),
    dict(ema_type='ExpMomentumEMA', momentum=0.002, gamma=5),
    dict(ema_type='MomentumAnnealingEMA', interval=2),
    dict(decay=0.9, tau=3, begin_iter=4),
    dict(decay=0.9, tau=3, nonfinite='ignore', device='cpu'),
]


@functools.lru_cache(maxsize=None)
def recorded():
    """Weights of eight steps, as a training might leave them."""
    torch.manual_seed(0)
    state, states = mmcv_toy.ToyModel().state_dict(), []
    for _ in range(8):
        for name, value in state.items():
            if value.is_floating_point() and 'frozen' not in name:
                value.add_(torch.randn(value.shape).to(value) / 10)
        states.append({k: v.clone() for k, v in state.items()})
    return states


def replaying(base):
    """An optimizer whose steps write the recorded weights."""

    class Replay(base):
        def step(self, closure=None):
            state = recorded()[len(self.records)]
            self.model.load_state_dict(state)
            self.records.append(state)

    return Replay


def through_mmcv(folder, options):
    run = mmcv_toy.Run(
        folder,
        dict(type='EMAHook', **options),
        optimizer=replaying(mmcv_toy.RecordingSGD),
    ).train()
    return run.load('epoch_2.pth')['state_dict'], run.records


def through_mmengine(folder, options, monkeypatch):
    base = mmengine_toy.RecordingSGD
    monkeypatch.setattr(mmengine_toy, 'RecordingSGD', replaying(base))
    model = mmengine_toy.ToyModel()
    model.load_state_dict(mmcv_toy.ToyModel().state_dict())
    model.init_weights = lambda: None
    run = mmengine_toy.Run(folder, MMEngineHook(**options), model=model)
    run.train()
    saved = torch.load(folder / 'epoch_2.pth')
    return saved['state_dict'], run.records


@pytest.mark.parametrize('options', OPTIONS)
def test_same_bits(options, tmp_path, monkeypatch):
    """Eight recorded steps give the same averages to the last bit."""
    ours, left = through_mmcv(tmp_path / 'a', options)
    theirs, right = through_mmengine(tmp_path / 'b', options, monkeypatch)
    assert 8 == len(left) == len(right)
    assert [] == mmcv_toy.same(left[-1], right[-1])
    assert [] == mmcv_toy.same(ours, theirs)
    averaged = mmcv_toy.same(ours, left[-1])
    assert {'head.weight', 'first.weight', 'low'} <= set(averaged)
