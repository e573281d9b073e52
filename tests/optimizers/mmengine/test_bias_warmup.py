"""The warm-up and the scaling of weight decay through mmengine's Runner."""

import logging

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import FlexibleRunner

from tests.for_mmengine import toy
from tests.optimizers.mmengine.toy import SGD, make, run, seen, settings

WARMUP = dict(type='BiasWarmupHook', warmup_iters=10)
COSINE = [
    dict(type='CosineAnnealingLR', T_max=16, eta_min=1e-4, by_epoch=False),
    dict(
        type='CosineAnnealingMomentum', T_max=16, eta_min=0.85, by_epoch=False
    ),
]
MILESTONES = [
    dict(type='MultiStepLR', milestones=[3, 6, 12], by_epoch=False),
    dict(type='MultiStepLR', milestones=[2], by_epoch=True),
]
SCHEDULES = pytest.mark.parametrize(
    'schedule', [None, COSINE, MILESTONES], ids=['none', 'cosine', 'steps']
)
EPOCHS = dict(max_epochs=4)


def warm(values, start, iterations, length=10):
    """The formula in NumPy float64; ``values`` are those of the schedule."""
    return [
        np.interp(i, [0, length], [start, v]) if i < length else v
        for i, v in zip(iterations, values)
    ]


@SCHEDULES
@pytest.mark.parametrize('counts', [1, 2])
def test_steps_follow_the_formula(schedule, counts, tmp_path):
    """Every step has the values of the formula on those of the schedule."""
    options = dict(
        EPOCHS,
        param_scheduler=schedule,
        wrapper=dict(accumulative_counts=counts),
    )
    plain = run(tmp_path / 'plain', **options)
    warmed = run(tmp_path / 'warm', WARMUP, **options)
    iterations = range(counts - 1, 16, counts)
    starts = dict(lr=dict(bias=0.1), momentum={})
    for column, default in (('lr', 0.0), ('momentum', 0.8)):
        for name, values in seen(plain, column).items():
            start = starts[column].get(name, default)
            found = seen(warmed, column)[name]
            assert len(iterations) == len(found)
            # one rounding more or less of the interpolation
            np.testing.assert_allclose(
                found, warm(values, start, iterations), rtol=1e-14
            )


@SCHEDULES
def test_schedulers_are_not_disturbed(schedule, tmp_path):
    """After the warm-up each value is that of a run without, bit for bit."""
    options = dict(EPOCHS, param_scheduler=schedule)
    plain = run(tmp_path / 'plain', **options)
    warmed = run(tmp_path / 'warm', WARMUP, **options)
    for column in ('lr', 'momentum'):
        expected, found = seen(plain, column), seen(warmed, column)
        assert {n: v[10:] for n, v in expected.items()} == {
            n: v[10:] for n, v in found.items()
        }
    wrappers = plain.optim_wrapper, warmed.optim_wrapper
    ends = [
        {n: row[:2] for n, row in settings(w.optimizer).items()}
        for w in wrappers
    ]
    assert ends[0] == ends[1]


@SCHEDULES
def test_resume_in_the_warm_up(schedule, tmp_path):
    """A run that is resumed in its warm-up equals the one that went on."""
    options = dict(EPOCHS, param_scheduler=schedule)
    whole = run(tmp_path / 'whole', WARMUP, **options)
    options.update(load_from=str(tmp_path / 'whole/epoch_2.pth'))
    resumed = run(tmp_path / 'parts', WARMUP, resume=True, **options)
    for column in ('lr', 'momentum', 'weight_decay'):
        assert {n: v[8:] for n, v in seen(whole, column).items()} == seen(
            resumed, column
        )
    states = [toy.state_of(r.model) for r in (whole, resumed)]
    assert [] == toy.same(*states)


def test_checkpoint_has_the_schedule(tmp_path):
    """A checkpoint of the warm-up holds the values of the schedule."""
    run(tmp_path, WARMUP, max_epochs=1)
    state = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    groups = state['optimizer']['param_groups']
    assert {0.01} == {group['lr'] for group in groups}
    assert {0.9} == {group['momentum'] for group in groups}


@pytest.mark.parametrize('counts', [1, 4])
def test_weight_decay_is_scaled(counts, tmp_path):
    """The steps have the decay of the samples that they take, of 64."""
    wrapper = dict(accumulative_counts=counts)
    runner = run(tmp_path, WARMUP, wrapper=wrapper)
    decays = seen(runner, 'weight_decay')
    assert {0.064 * 4 * counts / 64} == set(decays['weight'])
    assert {0.0} == {*decays['norm'], *decays['bias']}


def test_resume_scales_once(tmp_path):
    """Weight decay is that of the samples after a resume, too."""
    run(tmp_path, WARMUP, max_epochs=1)
    runner = run(tmp_path, WARMUP, max_epochs=2, resume=True)
    assert {0.004} == set(seen(runner, 'weight_decay')['weight'])


def test_same_from_constructor_and_hook(tmp_path):
    """A batch size in the config and one that the hook finds give the same."""
    given = dict(wrapper=dict(paramwise_cfg=dict(batch_size=4)))
    first = run(tmp_path / 'given', **given)
    hook = dict(WARMUP, warmup_iters=0)
    second = run(tmp_path / 'found', hook)
    assert [] == toy.same(*[toy.state_of(r.model) for r in (first, second)])


def test_warning_without_batch_size(tmp_path, caplog):
    """A run where nobody tells the batch size says so once."""
    caplog.set_level(logging.INFO)
    runner = make(tmp_path)
    runner.logger.addHandler(caplog.handler)
    runner.train()
    lines = [r.getMessage() for r in caplog.records]
    assert 1 == sum('NOT scaled' in line for line in lines)
    assert {0.064} == set(seen(runner, 'weight_decay')['weight'])


def test_what_the_log_says(tmp_path, caplog):
    """Table, scaling and warm-up are said once; each step is recorded."""
    caplog.set_level(logging.INFO)
    linear = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=5)]
    runner = make(tmp_path, WARMUP, param_scheduler=linear)
    runner.logger.addHandler(caplog.handler)
    runner.train()
    lines = [r.getMessage() for r in caplog.records]
    for text in (
        'tensors in 4 groups',
        'weight decay x 0.0625 for 4 samples',
        'BiasWarmupHook: 10 iterations',
        'LinearLR(end=5) warms up the lr as well',
        '10 of the 8 iterations',
    ):
        assert 1 == sum(text in line for line in lines), text
    hub = runner.message_hub
    for scalar, group, column in (
        ('step_lr', 'weight', 'lr'),
        ('bias_lr', 'bias', 'lr'),
        ('step_momentum', 'weight', 'momentum'),
    ):
        history = list(hub.get_scalar(f'train/{scalar}').data[0])
        assert seen(runner, column)[group] == history


def test_warm_up_of_the_momentum(tmp_path, caplog):
    """A scheduler that warms up the momentum as well is warned of."""
    linear = dict(
        type='LinearMomentum', start_factor=0.5, by_epoch=False, end=5
    )
    runner = make(tmp_path, WARMUP, param_scheduler=[linear])
    runner.logger.addHandler(caplog.handler)
    runner.train()
    text = 'LinearMomentum(end=5) warms up the momentum as well'
    assert 1 == caplog.text.count(text)
    assert 'warms up the lr' not in caplog.text


def test_beside_the_ema_hook(tmp_path):
    """The EMA hook beside it averages, and the run is the same."""
    ema = dict(type='EMAHook', decay=0.9, tau=5)
    options = dict(EPOCHS, param_scheduler=COSINE)
    alone = run(tmp_path / 'alone', WARMUP, **options)
    both = run(tmp_path / 'both', ema, WARMUP, **options)
    assert seen(alone, 'lr') == seen(both, 'lr')
    states = [toy.state_of(r.model) for r in (alone, both)]
    assert [] == toy.same(*states)


def test_gradient_scaler(tmp_path):
    """With the scaler of mixed precision each step is warmed as well."""
    options = dict(EPOCHS, param_scheduler=COSINE)
    plain = run(tmp_path / 'plain', WARMUP, **options)
    scaled = run(
        tmp_path / 'amp', WARMUP, wrapper=dict(type='ScaledWrapper'), **options
    )
    assert seen(plain, 'lr') == seen(scaled, 'lr')


def test_adam(tmp_path):
    """AdamW is trained with warmed betas and biases from 0."""
    wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
    runner = run(tmp_path, WARMUP, wrapper=wrapper)
    hub = runner.message_hub
    momentum = hub.get_scalar('train/step_momentum').data[0]
    expected = warm([0.9] * 8, 0.8, range(8))
    np.testing.assert_allclose(momentum, expected, rtol=1e-14)
    rates = hub.get_scalar('train/bias_lr').data[0]
    np.testing.assert_allclose(
        rates, warm([1e-3] * 8, 0.0, range(8)), rtol=1e-14
    )


def test_flexible_runner(tmp_path):
    """``FlexibleRunner`` has the same steps as ``Runner``."""
    plain = run(tmp_path / 'plain', WARMUP)
    flexible = FlexibleRunner(
        model=toy.ToyModel(),
        work_dir=str(tmp_path / 'flexible'),
        train_dataloader=toy.loader(),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(
            constructor='EMAOptimizerConstructor', optimizer=dict(SGD)
        ),
        param_scheduler=dict(type='ConstantLR', factor=1.0),
        custom_hooks=[WARMUP],
    )
    flexible.train()
    for column in ('lr', 'momentum', 'weight_decay'):
        assert seen(plain, column) == seen(flexible, column)


class Interrupt(Hook):
    """Stops the training in its third iteration, once."""

    stopped = False

    def after_train_iter(self, runner, batch_idx, **_):
        if batch_idx == 2 and not self.stopped:
            self.stopped = True
            raise KeyboardInterrupt


def test_training_again_after_an_interruption(tmp_path):
    """A runner that trains again warms each step once."""
    runner = make(tmp_path, WARMUP, Interrupt())
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    runner.train()
    expected = warm([0.01] * 10, 0.0, [0, 1, 2, *range(2, 9)])
    found = seen(runner, 'lr')['weight'][: len(expected)]
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_default_length(tmp_path, caplog):
    """By default the warm-up takes 1000 iterations of a short run."""
    caplog.set_level(logging.INFO)
    runner = make(tmp_path, dict(type='BiasWarmupHook'))
    runner.logger.addHandler(caplog.handler)
    runner.train()
    assert 'BiasWarmupHook: 1000 iterations' in caplog.text


def test_wrong_option(tmp_path):
    """A misspelt option is refused when the runner is made."""
    hook = dict(type='BiasWarmupHook', warmup_iter=3)
    with pytest.raises(ValueError, match="Did you mean 'warmup_iters'"):
        make(tmp_path, hook)


@pytest.mark.parametrize('more', [[], [WARMUP]], ids=['alone', 'and warm-up'])
def test_ema_hook_scales_the_weight_decay(more, tmp_path):
    """EMAHook tells the batch size too; a second hook scales nothing more."""
    trained = run(tmp_path, dict(type='EMAHook'), *more, max_epochs=2)
    factor = trained.train_dataloader.batch_size / 64
    assert {0.064 * factor} == set(seen(trained, 'weight_decay')['weight'])
