"""The warm-up and the scaling of weight decay through mmcv's runners."""

import numpy as np
import pytest
import torch
from mmcv.runner import Hook
from mmcv.utils import get_logger

from tests.for_mmcv1.toy import Lines, quiet, same, state_of
from tests.optimizers.mmcv1.toy import make, run, seen, settings

WARMUP = dict(type='BiasWarmupHook', warmup_iters=10)
COSINE = dict(
    lr=dict(policy='CosineAnnealing', min_lr=1e-4, by_epoch=False),
    momentum=dict(policy='CosineAnnealing', min_momentum=0.85, by_epoch=False),
)
CYCLIC = dict(
    lr=dict(policy='cyclic', target_ratio=(10, 1e-4), step_ratio_up=0.4),
    momentum=dict(
        policy='cyclic', target_ratio=(0.85 / 0.95, 1), step_ratio_up=0.4
    ),
)
STEPS = dict(lr=dict(policy='step', step=[1, 3]))
SCHEDULES = pytest.mark.parametrize(
    'schedule',
    [{}, COSINE, CYCLIC, STEPS],
    ids=['none', 'cosine', 'cyclic', 'steps'],
)
RUNNERS = pytest.mark.parametrize(
    'runner',
    [dict(max_epochs=4), dict(type='IterBasedRunner', max_iters=16)],
    ids=['epochs', 'iterations'],
)
EPOCHS = dict(runner=dict(max_epochs=4))
CUMULATIVE = dict(
    type='GradientCumulativeOptimizerHook', grad_clip=dict(max_norm=0.1)
)


def copied(schedule):
    """Copy: mmcv takes things out of the dicts that it is given."""
    return {name: dict(value) for name, value in schedule.items()}


def warm(values, start, iterations, length=10):
    """The formula in NumPy float64; ``values`` are those of the schedule."""
    return [
        np.interp(i, [0, length], [start, v]) if i < length else v
        for i, v in zip(iterations, values)
    ]


@SCHEDULES
@RUNNERS
@pytest.mark.parametrize('counts', [1, 2])
def test_steps_follow_the_formula(schedule, runner, counts, tmp_path):
    """Every step has the values of the formula on those of the schedule."""
    hook = dict(CUMULATIVE, cumulative_iters=counts)
    options = dict(runner=runner, optimizer_config=hook)
    plain = run(tmp_path / 'plain', **options, **copied(schedule))
    warmed = run(tmp_path / 'warm', WARMUP, **options, **copied(schedule))
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
@RUNNERS
def test_schedules_are_not_disturbed(schedule, runner, tmp_path):
    """After the warm-up each value is that of a run without, bit for bit."""
    options = dict(runner=runner)
    plain = run(tmp_path / 'plain', **options, **copied(schedule))
    warmed = run(tmp_path / 'warm', WARMUP, **options, **copied(schedule))
    for column in ('lr', 'momentum'):
        expected, found = seen(plain, column), seen(warmed, column)
        assert {n: v[10:] for n, v in expected.items()} == {
            n: v[10:] for n, v in found.items()
        }
    ends = [
        {n: row[:2] for n, row in settings(r.optimizer).items()}
        for r in (plain, warmed)
    ]
    assert ends[0] == ends[1]


@SCHEDULES
def test_resume_in_the_warm_up(schedule, tmp_path):
    """A run that is resumed in its warm-up equals the one that went on."""
    whole = run(tmp_path / 'whole', WARMUP, **EPOCHS, **copied(schedule))
    file = tmp_path / 'whole/epoch_2.pth'
    resumed = run(
        tmp_path / 'part', WARMUP, resume=file, **EPOCHS, **copied(schedule)
    )
    for column in ('lr', 'momentum', 'weight_decay'):
        assert {n: v[8:] for n, v in seen(whole, column).items()} == seen(
            resumed, column
        )
    assert [] == same(*[state_of(r.model) for r in (whole, resumed)])


@RUNNERS
def test_checkpoint_has_the_schedule(runner, tmp_path):
    """A checkpoint of the warm-up holds the values of the schedule."""
    by_epoch = 'max_epochs' in runner
    checkpoint = dict(interval=2, by_epoch=by_epoch)
    run(tmp_path, WARMUP, runner=runner, checkpoint=checkpoint)
    name = 'epoch_2.pth' if by_epoch else 'iter_2.pth'
    groups = torch.load(tmp_path / name)['optimizer']['param_groups']
    assert {0.01} == {group['lr'] for group in groups}
    assert {0.9} == {group['momentum'] for group in groups}


@RUNNERS
@pytest.mark.parametrize('counts', [1, 4])
def test_weight_decay_is_scaled(runner, counts, tmp_path):
    """The steps have the decay of the samples that they take, of 64."""
    hook = dict(CUMULATIVE, cumulative_iters=counts)
    trained = run(tmp_path, WARMUP, runner=runner, optimizer_config=hook)
    decays = seen(trained, 'weight_decay')
    assert {0.064 * 4 * counts / 64} == set(decays['weight'])
    assert {0.0} == {*decays['norm'], *decays['bias']}


def test_resume_scales_once(tmp_path):
    """Weight decay is that of the samples after a resume, too."""
    run(tmp_path, WARMUP)
    file = tmp_path / 'epoch_1.pth'
    resumed = run(tmp_path / 'more', WARMUP, resume=file)
    assert {0.004} == set(seen(resumed, 'weight_decay')['weight'])


def test_same_from_constructor_and_hook(tmp_path):
    """A batch size in the config and one that the hook finds give the same."""
    given = run(tmp_path, cfg=dict(paramwise_cfg=dict(batch_size=4)))
    found = run(tmp_path, dict(WARMUP, warmup_iters=0))
    assert [] == same(*[state_of(r.model) for r in (given, found)])


def test_warning_without_batch_size(tmp_path, capsys):
    """A run where nobody tells the batch size says so once."""
    trained = make(tmp_path)
    lines = Lines()
    get_logger('mmdet_ema').addHandler(lines)
    trained.train()
    get_logger('mmdet_ema').removeHandler(lines)
    assert 1 == sum('NOT scaled' in line for line in lines.lines)
    assert {0.064} == set(seen(trained, 'weight_decay')['weight'])


def test_what_the_log_says(tmp_path):
    """Scaling and warm-up are said once; what the steps use is recorded."""
    lines = Lines()
    lr = dict(policy='fixed', warmup='linear', warmup_iters=5)
    trained = make(tmp_path, WARMUP, logger=quiet(lines), lr=lr)
    recorded = {}

    class Reader(Hook):
        def after_train_iter(self, runner):
            for name, values in runner.log_buffer.val_history.items():
                recorded.setdefault(name, []).append(values[-1])

    trained.runner.register_hook(Reader(), priority='VERY_LOW')
    trained.train()
    for text in (
        'weight decay x 0.0625 for 4 samples',
        'BiasWarmupHook: 10 iterations',
        "lr_config(warmup='linear') warms up the lr as well",
        '10 of the 8 iterations',
    ):
        assert 1 == sum(text in line for line in lines.lines), text
    assert seen(trained, 'lr')['weight'] == recorded['step_lr']
    assert seen(trained, 'lr')['bias'] == recorded['bias_lr']
    momentum = seen(trained, 'momentum')['weight']
    assert momentum == recorded['step_momentum']


def test_warm_up_of_the_momentum(tmp_path):
    """A momentum_config that warms up as well is warned of."""
    lines = Lines()
    steps = dict(policy='step', step=[1], warmup='linear', warmup_iters=5)
    trained = make(tmp_path, WARMUP, logger=quiet(lines), momentum=steps)
    trained.train()
    text = "momentum_config(warmup='linear') warms up the momentum as well"
    assert 1 == sum(text in line for line in lines.lines)
    assert not any('warms up the lr' in line for line in lines.lines)


def test_beside_the_ema_hook(tmp_path):
    """The EMA hook beside it averages, and the run is the same."""
    ema = dict(type='EMAHook', decay=0.9, tau=5)
    for order in ([ema, WARMUP], [WARMUP, ema]):
        alone = run(tmp_path / 'alone', WARMUP, **EPOCHS, **copied(COSINE))
        both = run(tmp_path / 'both', *order, **EPOCHS, **copied(COSINE))
        assert seen(alone, 'lr') == seen(both, 'lr')
        assert [] == same(*[state_of(r.model) for r in (alone, both)])


def test_adam(tmp_path):
    """AdamW is trained with warmed betas and biases from 0."""
    cfg = dict(type='SeenAdamW', lr=1e-3, weight_decay=0.05)
    trained = run(tmp_path, WARMUP, optim=cfg)
    rows = trained.optimizer.seen
    expected = warm([0.9] * 8, 0.8, range(8))
    found = [row['weight'][1][0] for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-14)
    expected = warm([1e-3] * 8, 0.0, range(8))
    found = [row['bias'][0] for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-14)


class Interrupt(Hook):
    """Stops the training in its third iteration, once."""

    stopped = False

    def after_train_iter(self, runner):
        if runner.inner_iter == 2 and not self.stopped:
            self.stopped = True
            raise KeyboardInterrupt


def test_training_again_after_an_interruption(tmp_path):
    """A runner that trains again warms each step once."""
    trained = make(tmp_path, WARMUP)
    trained.runner.register_hook(Interrupt(), priority='VERY_LOW')
    with pytest.raises(KeyboardInterrupt):
        trained.train()
    trained.train()
    expected = warm([0.01] * 10, 0.0, [0, 1, 2, *range(2, 9)])
    found = seen(trained, 'lr')['weight'][: len(expected)]
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_two_runs_of_one_runner(tmp_path):
    """A second run of the same runner is not warmed up again."""
    trained = run(tmp_path, dict(WARMUP, warmup_iters=4))
    trained.runner._max_epochs = 3
    trained.train()
    rates = seen(trained, 'lr')['weight']
    assert 12 == len(rates)
    assert {0.01} == set(rates[4:])


def test_wrong_option(tmp_path):
    """A misspelt option is refused when the hook is made."""
    hook = dict(type='BiasWarmupHook', warmup_iter=3)
    with pytest.raises(ValueError, match="Did you mean 'warmup_iters'"):
        make(tmp_path, hook)


@pytest.mark.parametrize('more', [[], [WARMUP]], ids=['alone', 'and warm-up'])
def test_ema_hook_scales_the_weight_decay(more, tmp_path):
    """EMAHook tells the batch size too; a second hook scales nothing more."""
    trained = run(tmp_path, dict(type='EMAHook'), *more)
    assert {0.064 * 4 / 64} == set(seen(trained, 'weight_decay')['weight'])
