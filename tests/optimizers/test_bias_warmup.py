"""Warm-up and scaled weight decay in trainings of the installed generation."""

import numpy as np
import pytest
import torch

from tests.optimizers import toy
from tests.optimizers.steps import seen, settings

WARMUP = dict(type='BiasWarmupHook', warmup_iters=10)
EMA = dict(type='EMAHook', decay=0.9, tau=5)
SCHEDULES = pytest.mark.parametrize(
    'schedule', [name for name in toy.SCHEDULES if 'warm' not in name]
)
BY_EPOCH = pytest.mark.parametrize('by_epoch', [True, False])


def train(*args, **options):
    """Train a toy."""
    return toy.Training(*args, **options).train()


def same(left, right):
    """Tell whether two trainings left the same weights, bit for bit."""
    one, two = left.state, right.state
    return one.keys() == two.keys() and all(
        torch.equal(one[name], two[name]) for name in one
    )


def warm(values, start, iterations, length=10):
    """The formula in NumPy float64; ``values`` are those of the schedule."""
    return [
        np.interp(i, [0, length], [start, v]) if i < length else v
        for i, v in zip(iterations, values)
    ]


def close(found, expected):
    """Assert equality but for the roundings of the interpolation."""
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=0)


@SCHEDULES
@BY_EPOCH
@pytest.mark.parametrize('accumulate', [1, 2])
def test_steps_follow_the_formula(schedule, by_epoch, accumulate, tmp_path):
    """The steps have the formula's values, and then the schedule's exactly."""
    options = dict(
        schedule=schedule, by_epoch=by_epoch, accumulate=accumulate, epochs=4
    )
    plain = train(tmp_path / 'plain', **options).optimizer
    warmed = train(tmp_path / 'warm', WARMUP, **options).optimizer
    iterations = range(accumulate - 1, 16, accumulate)
    warm_steps = sum(i < 10 for i in iterations)
    starts = dict(lr=dict(bias=0.1), momentum={})
    for option, default in (('lr', 0.0), ('momentum', 0.8)):
        for name, values in seen(plain, option).items():
            start = starts[option].get(name, default)
            found = seen(warmed, option)[name]
            assert len(iterations) == len(found)
            close(found, warm(values, start, iterations))
            assert values[warm_steps:] == found[warm_steps:]
            end = settings(plain)[name][option]
            assert end == settings(warmed)[name][option]


@SCHEDULES
def test_resume_in_the_warm_up(schedule, tmp_path):
    """A run that is resumed in its warm-up equals the one that went on."""
    options = dict(schedule=schedule, epochs=4)
    whole = train(tmp_path / 'whole', WARMUP, **options)
    file = tmp_path / 'whole/epoch_2.pth'
    resumed = train(tmp_path / 'part', WARMUP, resume=file, **options)
    for option in ('lr', 'momentum', 'weight_decay'):
        expected = seen(whole.optimizer, option)
        assert {name: values[8:] for name, values in expected.items()} == seen(
            resumed.optimizer, option
        )
    assert same(whole, resumed)


@BY_EPOCH
def test_checkpoint_has_the_schedule(by_epoch, tmp_path):
    """A checkpoint of the warm-up holds the values of the schedule."""
    train(tmp_path, WARMUP, by_epoch=by_epoch)
    file = tmp_path / ('epoch_2.pth' if by_epoch else 'iter_2.pth')
    groups = torch.load(file, **toy.UNSAFE)['optimizer']['param_groups']
    assert {(0.01, 0.9)} == {(g['lr'], g['momentum']) for g in groups}


@BY_EPOCH
@pytest.mark.parametrize('accumulate', [1, 4])
@pytest.mark.parametrize(
    'hooks', [[WARMUP], [EMA], [EMA, WARMUP]], ids=['warm-up', 'EMA', 'both']
)
def test_weight_decay_is_scaled(by_epoch, accumulate, hooks, tmp_path):
    """The steps have the decay of the samples that they take, of 64."""
    options = dict(by_epoch=by_epoch, accumulate=accumulate)
    optimizer = train(tmp_path, *hooks, **options).optimizer
    decays = seen(optimizer, 'weight_decay')
    assert {0.064 * 4 * accumulate / 64} == set(decays['weight'])
    assert {0.0} == {*decays['norm'], *decays['bias']}


def test_resume_scales_once(tmp_path):
    """Weight decay is that of the samples after a resume, too."""
    train(tmp_path, WARMUP)
    file = tmp_path / 'epoch_2.pth'
    resumed = train(tmp_path / 'more', WARMUP, resume=file, epochs=4)
    assert {0.004} == set(seen(resumed.optimizer, 'weight_decay')['weight'])


def test_same_from_constructor_and_hook(tmp_path):
    """A batch size in the config and one that the hook finds give the same."""
    given = train(tmp_path / 'given', paramwise_cfg=dict(batch_size=4))
    found = train(tmp_path / 'found', dict(WARMUP, warmup_iters=0))
    assert same(given, found)


def test_warning_without_batch_size(tmp_path):
    """A run where nobody tells the batch size says so once."""
    trained = train(tmp_path)
    assert 1 == sum('NOT scaled' in line for line in trained.lines.warnings)
    assert {0.064} == set(seen(trained.optimizer, 'weight_decay')['weight'])


def test_what_the_log_says(tmp_path):
    """Table, scaling and warm-up are said once; each step is recorded."""
    trained = train(tmp_path, WARMUP, schedule='warm_lr')
    for text in (
        'tensors in 4 groups',
        'weight decay x 0.0625 for 4 samples',
        'BiasWarmupHook: 10 iterations',
        f'{toy.WARM["lr"]} warms up the lr as well',
        '10 of the 8 iterations',
    ):
        assert 1 == sum(text in line for line in trained.lines.all), text
    for name, group, option in (
        ('step_lr', 'weight', 'lr'),
        ('bias_lr', 'bias', 'lr'),
        ('step_momentum', 'weight', 'momentum'),
    ):
        values = seen(trained.optimizer, option)[group]
        assert values == trained.recorded(name)


def test_warm_up_of_the_momentum(tmp_path):
    """A schedule that warms up the momentum as well is warned of."""
    lines = train(tmp_path, WARMUP, schedule='warm_momentum').lines.warnings
    text = f'{toy.WARM["momentum"]} warms up the momentum as well'
    assert 1 == sum(text in line for line in lines)
    assert not any('warms up the lr' in line for line in lines)


@pytest.mark.parametrize('order', [[EMA, WARMUP], [WARMUP, EMA]])
def test_with_the_ema_hook(order, tmp_path):
    """With the EMA hook in either order, the run is the same."""
    options = dict(epochs=4, schedule='cosine')
    alone = train(tmp_path / 'alone', WARMUP, **options)
    both = train(tmp_path / 'both', *order, **options)
    assert seen(alone.optimizer, 'lr') == seen(both.optimizer, 'lr')
    assert same(alone, both)


def test_adam(tmp_path):
    """AdamW is trained with warmed betas and biases from 0."""
    cfg = dict(type='SeenAdamW', lr=1e-3, weight_decay=0.05)
    trained = train(tmp_path, WARMUP, optimizer=cfg)
    betas = seen(trained.optimizer, 'betas')['weight']
    close([first for first, _ in betas], warm([0.9] * 8, 0.8, range(8)))
    assert {0.999} == {second for _, second in betas}
    rates = seen(trained.optimizer, 'lr')['bias']
    np.testing.assert_allclose(
        rates, warm([1e-3] * 8, 0.0, range(8)), rtol=1e-14
    )
    assert [beta for beta, _ in betas] == trained.recorded('step_momentum')


def test_training_again_after_an_interruption(tmp_path):
    """A runner that trains again warms each step once."""
    trained = toy.Training(tmp_path, WARMUP, toy.Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trained.train()
    trained.train()
    expected = warm([0.01] * 10, 0.0, [0, 1, 2, *range(2, 9)])
    found = seen(trained.optimizer, 'lr')['weight'][: len(expected)]
    close(found, expected)


def test_length_in_epochs(tmp_path):
    """The length of an epoch is found, of 4 iterations here."""
    hook = dict(type='BiasWarmupHook', warmup_epochs=1.5, min_iters=0)
    lines = train(tmp_path, hook).lines.infos
    assert 1 == sum('BiasWarmupHook: 6 iterations' in line for line in lines)


def test_wrong_option(tmp_path):
    """A misspelt option is refused when the hook is made."""
    hook = dict(type='BiasWarmupHook', warmup_iter=3)
    with pytest.raises(ValueError, match="Did you mean 'warmup_iters'"):
        toy.Training(tmp_path, hook)
