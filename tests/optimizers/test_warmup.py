"""The warm-up: its numbers, and that it is in the step and nowhere else."""

import numpy as np
import pytest
import torch
from torch import nn

from mmdet_ema.errors import OptionError
from mmdet_ema.optimizers.around_step import AroundStep
from mmdet_ema.optimizers.warm_steps import WarmSteps
from mmdet_ema.optimizers.warmup import parse_warmup, warm
from mmdet_ema.optimizers.warmup_start import start_warmup
from tests.optimizers.test_nominal import Lines

LENGTH = 7


class Recording(torch.optim.SGD):
    """Records what each group has in a step."""

    def step(self, closure=None):
        self.__dict__.setdefault('seen', []).append(values(self))
        return super().step(closure)


def values(optimizer):
    """Return rate and momentum of each group."""
    return [(g['lr'], g.get('momentum')) for g in optimizer.param_groups]


def optimizer_of(kind=Recording, **options):
    """Return an optimizer with a group of weights and one of biases."""
    model = nn.Linear(2, 2)
    if kind is Recording:
        options = {'momentum': 0.9, **options}
    optimizer = kind(
        [
            dict(params=[model.weight], name='weight', lr=0.01),
            dict(params=[model.bias], name='bias lr*2', lr=0.02),
        ],
        lr=0.01,
        **options,
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return optimizer


def interpolate(iteration, start, end, length=LENGTH):
    """The formula, in NumPy float64."""
    return np.interp(iteration, [0, length], [start, end])


def close(found, expected):
    """Assert equality but for the roundings of the interpolation."""
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-16)


def test_values_of_the_formula():
    """Rates and momentum are the line from their start to the schedule."""
    optimizer = optimizer_of()
    steps = WarmSteps([optimizer], parse_warmup(), LENGTH)
    for i in range(LENGTH + 3):
        for group in optimizer.param_groups:  # the schedule moves meanwhile
            group['lr'] = group['lr'] * 1.1
        target = values(optimizer)
        steps.iteration = i
        optimizer.step()
        (weight, momentum), (bias, same) = optimizer.seen[-1]
        close(weight, interpolate(i, 0.0, target[0][0]))
        close(bias, interpolate(i, 0.1, target[1][0]))
        close([momentum, same], [interpolate(i, 0.8, 0.9)] * 2)
        assert target == values(optimizer)
    assert target == optimizer.seen[-1]


def test_betas():
    """The first beta rises; the bias rate starts from 0, unless given."""
    optimizer = optimizer_of(torch.optim.AdamW)
    group = optimizer.param_groups[1]
    found = warm(group, parse_warmup(), 2, LENGTH)
    assert {'lr', 'betas'} == set(found)
    close(found['lr'], interpolate(2, 0.0, 0.02))
    close(found['betas'], (interpolate(2, 0.8, 0.9), 0.999))
    found = warm(group, parse_warmup(bias_lr=0.05), 2, LENGTH)
    close(found['lr'], interpolate(2, 0.05, 0.02))


def test_no_momentum_is_made():
    """An optimizer without momentum gets none."""
    group = optimizer_of(Recording, momentum=0).param_groups[0]
    assert {'lr'} == set(warm(group, parse_warmup(), 2, LENGTH))


def test_nothing_after_the_warm_up():
    """After its last iteration the warm-up changes nothing at all."""
    group = optimizer_of().param_groups[0]
    assert {} == warm(group, parse_warmup(), LENGTH, LENGTH)
    assert {} == warm(group, parse_warmup(), 0, 0)


def test_log_values():
    """What is logged is what the step will use."""
    optimizer = optimizer_of()
    steps = WarmSteps([optimizer], parse_warmup(), LENGTH)
    steps.iteration = 3
    found = steps.now()
    optimizer.step()
    (weight, momentum), (bias, _) = optimizer.seen[-1]
    assert found == dict(step_lr=weight, bias_lr=bias, step_momentum=momentum)


class Failing(torch.optim.SGD):
    """Fails in its second step."""

    def step(self, closure=None):
        self.__dict__.setdefault('seen', []).append(values(self))
        super().step(closure)
        if len(self.seen) == 2:
            raise RuntimeError('out of memory')


@pytest.mark.parametrize('restored', [True, False])
def test_a_step_that_fails(restored):
    """The values of the schedule come back after a step that failed."""
    optimizer = optimizer_of(Failing, momentum=0.9)
    target = values(optimizer)
    steps = WarmSteps([optimizer], parse_warmup(), LENGTH)
    steps.iteration = 3
    optimizer.step()
    with pytest.raises(RuntimeError, match='out of memory'):
        optimizer.step()
    if restored:
        steps.restore()
        assert target == values(optimizer)
    optimizer.step()
    assert optimizer.seen[0] == optimizer.seen[-1]
    assert target == values(optimizer)


def test_step_of_a_subclass():
    """A step that calls its parent's step is warmed once, not twice."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1)  # hooks its class
    optimizer = optimizer_of(Recording, momentum=0)
    steps = WarmSteps([optimizer], parse_warmup(), LENGTH)
    steps.iteration = 3
    weight = optimizer.param_groups[0]['params'][0]
    before = weight.detach().clone()
    optimizer.step()
    moved = (before - weight).detach().numpy()
    # the gradient is 1; float32 rounding
    np.testing.assert_allclose(moved, interpolate(3, 0.0, 0.01), rtol=1e-4)


def test_removed():
    """After removal the steps have the values of the schedule."""
    optimizer = optimizer_of()
    steps = WarmSteps([optimizer], parse_warmup(), LENGTH)
    steps.remove()
    optimizer.step()
    assert values(optimizer) == optimizer.seen[-1]


class Plain(nn.Module):
    """Looks like an optimizer without step hooks."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def step(self):
        self.calls.append('step')
        raise RuntimeError('in the step')


def test_around_a_step_without_hooks():
    """Without torch's step hooks the call is wrapped, failing or not."""
    optimizer = Plain()
    calls = optimizer.calls
    around = AroundStep(
        optimizer, lambda: calls.append('>'), lambda: calls.append('<')
    )
    for _ in range(2):
        with pytest.raises(RuntimeError):
            optimizer.step()
        around.remove()
    assert ['>', 'step', '<', 'step'] == calls


def test_step_that_is_wrapped_is_a_bound_method():
    """Schedulers of torch 1.x ask ``optimizer.step`` whose it is."""
    optimizer = Plain()
    AroundStep(optimizer, lambda: None, lambda: None)
    assert optimizer is optimizer.step.__self__
    assert callable(optimizer.step.__func__)


LENGTHS = [
    (dict(), 500, 1500),
    (dict(), 100, 1000),
    (dict(), None, 1000),
    (dict(warmup_epochs=0.5, min_iters=0), 101, 50),
    (dict(warmup_iters=20), 500, 20),
    (dict(warmup_iters=0), 500, 0),
    (dict(warmup_epochs=0), 500, 0),
]


@pytest.mark.parametrize(('options', 'per_epoch', 'expected'), LENGTHS)
def test_length(options, per_epoch, expected):
    """Three epochs, 1000 iterations at least, or what was given."""
    assert expected == parse_warmup(**options).length(per_epoch)


WRONG = [
    (dict(bias_lrs=0.1), "no option 'bias_lrs'", "'bias_lr'?"),
    (dict(bias_lr=-0.1), 'bias_lr=-0.1', '[0, inf)'),
    (dict(momentum=1), 'momentum=1', '[0, 1)'),
    (dict(warmup_epochs=-1), 'warmup_epochs=-1', '[0, inf)'),
    (dict(warmup_iters=1.5), 'warmup_iters=1.5', 'whole number'),
    (dict(min_iters=-1), 'min_iters=-1', 'at least 0'),
]


@pytest.mark.parametrize(('options', 'value', 'remedy'), WRONG)
def test_wrong_options(options, value, remedy):
    """A wrong option is named in one line, with what is allowed."""
    with pytest.raises(OptionError) as error:
        parse_warmup(**options)
    assert value in str(error.value)
    assert remedy in str(error.value)


def start(optimizer, log, max_iters=100000, others=None, **options):
    """Start a warm-up with 500 iterations an epoch."""
    return start_warmup(
        [optimizer],
        parse_warmup(**options),
        iters_per_epoch=500,
        max_iters=max_iters,
        samples=16,
        log=log,
        others=others,
    )


def test_what_is_said_at_the_start():
    """The start says length and values, once, and warns of nothing."""
    log = Lines()
    start(optimizer_of(), log, others=dict(lr=[], momentum=[]))
    assert [] == log.warnings
    assert 1 == len(log.infos)
    assert '1500 iterations; lr of biases from 0.1' in log.infos[0]


def test_adam_is_said_to_start_from_zero():
    """The start says that biases of Adam start from 0."""
    log = Lines()
    start(optimizer_of(torch.optim.Adam), log)
    assert 'lr of biases from 0,' in log.infos[0]


def test_warnings_at_the_start():
    """No group of biases, a long warm-up and a second one are warned of."""
    log = Lines()
    model = nn.Linear(2, 2)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    others = dict(lr=['LinearLR(end=500)'], momentum=['LinearMomentum'])
    start(plain, log, max_iters=2000, others=others)
    assert 4 == len(log.warnings)
    assert "constructor='EMAOptimizerConstructor'" in log.warnings[0]
    assert '1500 of the 2000 iterations' in log.warnings[1]
    assert 'warmup_iters=200' in log.warnings[1]
    assert 'LinearLR(end=500) warms up the lr as well' in log.warnings[2]
    assert 'LinearMomentum warms up the momentum as well' in log.warnings[3]


def test_no_warm_up_is_silent():
    """A warm-up of no length says nothing."""
    log = Lines()
    others = dict(lr=['x'])
    start(optimizer_of(), log, max_iters=10, others=others, warmup_epochs=0)
    assert [] == log.infos + log.warnings
