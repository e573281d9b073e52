"""The warm-up of plain optimizers: what a training does not show."""

import numpy as np
import pytest
import torch
from torch import nn

from mmdet_ema.errors import OptionError
from mmdet_ema.optimizers.warmup import Warmup
from tests.optimizers.logs import Lines
from tests.optimizers.steps import SeenSGD, seen, settings

LENGTH = 7


class Failing(SeenSGD):
    """Fails in its second step."""

    def step(self, closure=None):
        super().step(closure)
        if len(self.seen) == 2:
            raise RuntimeError('out of memory')


def optimizer_of(kind=SeenSGD, bias='bias lr*2', **options):
    """Return an optimizer with a group of weights and one of biases."""
    model = nn.Linear(2, 2)
    optimizer = kind(
        [
            dict(params=[model.weight], name='weight', lr=0.01),
            dict(params=[model.bias], name=bias, lr=0.02),
        ],
        lr=0.01,
        **options,
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return optimizer


def start(
    optimizer,
    others=None,
    per_epoch=500,
    max_iters=100000,
    log=None,
    **options,
):
    """Start a warm-up."""
    warmup = Warmup(**options)
    warmup.start(
        [optimizer],
        iters_per_epoch=per_epoch,
        max_iters=max_iters,
        samples=16,
        log=log or Lines(),
        others=others or {},
    )
    return warmup


def interpolate(iteration, start, end):
    """The formula, in NumPy float64."""
    return np.interp(iteration, [0, LENGTH], [start, end])


def close(found, expected):
    """Assert equality but for the roundings of the interpolation."""
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize('bias_lr', [0.0, 0.05])
def test_start_of_the_biases(bias_lr):
    """A rate that is given is the start of the biases, with betas too."""
    for kind, default in ((torch.optim.AdamW, 0.0), (torch.optim.SGD, 0.1)):
        for given, begin in ((bias_lr, bias_lr), (None, default)):
            warmup = start(
                optimizer_of(kind), warmup_iters=LENGTH, bias_lr=given
            )
            close(warmup.at(2)['bias_lr'], interpolate(2, begin, 0.02))


def test_no_momentum_is_made():
    """An optimizer without momentum gets none."""
    optimizer = optimizer_of()
    assert {'step_lr', 'bias_lr'} == set(start(optimizer).at(2))
    optimizer.step()
    assert [0] == seen(optimizer, 'momentum')['weight']


def test_a_step_that_fails():
    """The values of the schedule come back after a step that failed."""
    optimizer = optimizer_of(Failing, momentum=0.9)
    target = settings(optimizer)
    start(optimizer, warmup_iters=LENGTH).at(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match='out of memory'):
        optimizer.step()
    assert target == settings(optimizer)
    optimizer.step()
    assert optimizer.seen[0] == optimizer.seen[-1]
    assert target == settings(optimizer)


def test_step_of_a_subclass():
    """A step that calls its parent's step is warmed once, not twice."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1)  # hooks its class
    optimizer = optimizer_of()
    start(optimizer, warmup_iters=LENGTH).at(3)
    weight = optimizer.param_groups[0]['params'][0]
    before = weight.detach().clone()
    optimizer.step()
    moved = (before - weight).detach().numpy()
    # the gradient is 1; float32 rounding
    np.testing.assert_allclose(moved, interpolate(3, 0.0, 0.01), rtol=1e-4)


def test_stopped():
    """After it is stopped the steps have the values of the schedule."""
    optimizer = optimizer_of()
    start(optimizer).stop()
    optimizer.step()
    assert settings(optimizer) == optimizer.seen[-1]


@pytest.mark.parametrize(
    ('options', 'per_epoch', 'expected'),
    [
        (dict(), 500, 1500),
        (dict(), 100, 1000),
        (dict(), None, 1000),
        (dict(warmup_epochs=0.5, min_iters=0), 101, 50),
        (dict(warmup_iters=20), 500, 20),
    ],
)
def test_length(options, per_epoch, expected):
    """Three epochs, 1000 iterations at least, or what was given."""
    log = Lines()
    warmup = start(optimizer_of(), per_epoch=per_epoch, log=log, **options)
    assert f'BiasWarmupHook: {expected} iterations' in log.infos[0]
    assert warmup.at(expected - 1)['step_lr'] < 0.01
    assert 0.01 == warmup.at(expected)['step_lr']


@pytest.mark.parametrize('name', ['warmup_iters', 'warmup_epochs'])
def test_no_warm_up_is_silent(name):
    """A warm-up of no length says and does nothing."""
    log, others = Lines(), dict(lr=['x'])
    warmup = start(optimizer_of(), others, max_iters=10, log=log, **{name: 0})
    assert [] == log.all
    assert dict(step_lr=0.01, bias_lr=0.02) == warmup.at(0)


@pytest.mark.parametrize(
    ('options', 'value', 'remedy'),
    [
        (dict(bias_lrs=0.1), "no option 'bias_lrs'", "'bias_lr'?"),
        (dict(bias_lr=-0.1), 'bias_lr=-0.1', '[0, inf)'),
        (dict(momentum=1), 'momentum=1', '[0, 1)'),
        (dict(warmup_epochs=-1), 'warmup_epochs=-1', '[0, inf)'),
        (dict(warmup_iters=1.5), 'warmup_iters=1.5', 'whole number'),
        (dict(min_iters=-1), 'min_iters=-1', 'at least 0'),
    ],
)
def test_wrong_options(options, value, remedy):
    """A wrong option is named in one line, with what is allowed."""
    with pytest.raises(OptionError) as error:
        Warmup(**options)
    assert value in str(error.value)
    assert remedy in str(error.value)


@pytest.mark.parametrize(
    ('kind', 'rate'), [(torch.optim.SGD, '0.1'), (torch.optim.Adam, '0')]
)
def test_what_is_said_at_the_start(kind, rate):
    """The start says length and values, once, and warns of nothing."""
    log = Lines()
    start(optimizer_of(kind), dict(lr=[], momentum=[]), log=log)
    assert [] == log.warnings
    (line,) = log.infos
    assert f'1500 iterations; lr of biases from {rate}, other' in line


def test_warnings_at_the_start():
    """No group of biases, a long warm-up and a second one are warned of."""
    log = Lines()
    others = dict(lr=['LinearLR(end=500)'], momentum=['LinearMomentum'])
    start(optimizer_of(bias='table'), others, max_iters=2000, log=log)
    assert 4 == len(log.warnings)
    assert "constructor='EMAOptimizerConstructor'" in log.warnings[0]
    assert '1500 of the 2000 iterations' in log.warnings[1]
    assert 'warmup_iters=200' in log.warnings[1]
    assert 'LinearLR(end=500) warms up the lr as well' in log.warnings[2]
    assert 'LinearMomentum warms up the momentum as well' in log.warnings[3]
