"""Steps of other hooks, and of several optimizers."""

from types import SimpleNamespace

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn

from tests.contract.test_steps import (
    KEYS,
    check,
    descend,
    nothing,
    ramp,
    stepping,
    train,
)


class Late(Hook):
    """Steps after the average's turn, with an optimizer of its own."""

    priority = 'VERY_LOW'

    def after_train_iter(self, runner, batch_idx, **more):
        descend(runner.model)


def test_hook_that_steps_after_ours(tmp_path):
    """Its changes are averaged in the iteration that they belong to."""
    run = train(tmp_path, Late(), **stepping(nothing, iters=12))
    # the file is written before the hook's last turn
    assert 11 == run.load().steps
    averager = run.toy.hook._life.averager
    assert 12 == averager.num_steps
    now = SimpleNamespace(averages=dict(averager.named_averages()))
    assert {} == run.wrong(now, ramp, KEYS)


class Adversaries(BaseModel):
    """Two parts that are trained in turn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.maker, self.critic = nn.Linear(4, 4), nn.Linear(4, 1)
        self.calls = 0

    def forward(self, inputs, mode='tensor'):
        out = self.critic(self.maker(inputs))
        return [dict(out=row) for row in out]

    def train_step(self, data, optim_wrapper):
        inputs = self.data_preprocessor(data, True)['inputs']
        self.calls += 1
        for name in ('critic', 'maker')[: 1 + (self.calls % 2)]:
            loss = self.critic(self.maker(inputs)).square().mean()
            optim_wrapper[name].update_params(loss)
        return dict(loss=loss.detach())


def test_several_optimizers(tmp_path):
    """One or several that step in an iteration are one update."""
    model = Adversaries()
    wrappers = {
        name: OptimWrapper(
            torch.optim.SGD(getattr(model, name).parameters(), lr=0.05)
        )
        for name in ('maker', 'critic')
    }
    wrapper = OptimWrapperDict(**wrappers)
    run = train(tmp_path, model=model, optim_wrapper=wrapper)
    check(run, 8, ['maker.weight', 'critic.weight'])
