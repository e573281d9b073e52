"""What the hook says at the start, and what it refuses."""

import numpy as np
import pytest
import torch
from mmengine.registry import HOOKS, DefaultScope

import mmdet_ema
from tests import needs, oracle
from tests.for_mmengine.toy import Run, loader


def log_of(run):
    """Text of the log of a run, line breaks within a message folded."""
    return ' '.join(next(run.work_dir.glob('*/*.log')).read_text().split())


def test_report_at_the_start(tmp_path):
    """Schedule, window, decay, share, tensors and memory are said."""
    hook = dict(type='EMAHook', decay=0.5, tau=1)
    log = log_of(Run(tmp_path, hook, max_epochs=3).train())
    assert 'EMA: exponential(decay=0.5, tau=1.0), every step' in log
    assert 'steps: 12 planned' in log
    assert 'decay 0.499997, effective window 2 steps' in log
    share = np.prod([oracle.ramp(n, 0.5, 1) for n in range(1, 13)])
    assert f'share of the initial weights left then: {share:.3g}' in log
    assert 'tensors: 10 averaged, 1 copied, 2 frozen' in log
    assert 'memory of the averages: 0.0 MiB' in log


@pytest.mark.parametrize(
    ('options', 'warning'),
    [
        (dict(), 'cannot saturate in 8 steps'),
        (dict(tau=1, decay=0.9, schedule='constant'), 'tau has no effect'),
        (dict(schedule='constant'), '100% of the average will still be'),
        (dict(interval=9, tau=1, decay=0.5), 'interval=9 is more than'),
    ],
)
def test_warnings(tmp_path, options, warning):
    """Each thing that will not work as promised gets a line."""
    run = Run(tmp_path, dict(type='EMAHook', **options)).train()
    lines = [
        line
        for line in next(tmp_path.glob('*/*.log')).read_text().splitlines()
        if 'WARNING' in line and warning in line
    ]
    assert len(lines) == 1, log_of(run)


def test_nothing_to_warn_of(tmp_path):
    """A schedule that fits the run gives no warning."""
    hook = dict(type='EMAHook', decay=0.5, tau=1)
    run = Run(tmp_path, hook).train()
    lines = next(run.work_dir.glob('*/*.log')).read_text().splitlines()
    assert [x for x in lines if 'WARNING' in x and 'EMA' in x] == []


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'hello', 'is no checkpoint'),
        (b'PK\x03\x04' + b'x' * 100, 'is cut off'),
        (None, 'there is no file'),
    ],
)
def test_file_that_is_no_checkpoint_is_refused(tmp_path, content, message):
    """A bad file is named before the model is touched."""
    path = tmp_path / 'file.pth'
    if content is not None:
        path.write_bytes(content)
    run = Run(tmp_path / 'run', dict(type='EMAHook'), load_from=str(path))
    with pytest.raises(ValueError, match=message) as error:
        run.train()
    assert str(path) in str(error.value)


@needs.mmdet
def test_hook_of_the_package_is_built_from_any_scope():
    """``EMAHook`` is ours from no scope, mmengine's, mmdet's."""
    import mmdet.registry

    mmdet.registry.HOOKS.import_from_location()
    kinds = {type(HOOKS.build(dict(type='EMAHook')))}
    for scope in ('mmengine', 'mmdet'):
        kinds.add(type(HOOKS.build(dict(type=f'{scope}.EMAHook'))))
        with DefaultScope.overwrite_default_scope(scope):
            kinds.add(type(HOOKS.build(dict(type='EMAHook'))))
    assert kinds == {mmdet_ema.EMAHook}


def test_raw_weights_stay_where_they_are(tmp_path):
    """``device='cpu'`` averages in host memory, with the same numbers."""
    runs = [
        Run(tmp_path / str(device), dict(type='EMAHook', device=device))
        for device in (None, 'cpu')
    ]
    left, right = (r.train().load('epoch_2.pth')['state_dict'] for r in runs)
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_schedule_by_dict_and_by_callable(tmp_path):
    """A dict with options and a function of n are schedules too."""
    hooks = [
        dict(type='EMAHook', schedule=dict(type='constant', decay=0.9)),
        dict(type='EMAHook', schedule=lambda n: 0.9),
    ]
    states = [
        Run(tmp_path / str(i), hook).train().load('epoch_2.pth')['state_dict']
        for i, hook in enumerate(hooks)
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_cosine_takes_the_planned_steps(tmp_path):
    """``schedule='cosine'`` runs over the whole run by itself."""
    hook = dict(type='EMAHook', schedule='cosine')
    log = log_of(Run(tmp_path, hook, train_dataloader=loader(32)).train())
    assert 'cosine(total_steps=16' in log


def half_way(n):
    """A schedule that a config file can name."""
    return n / (n + 20)


def test_schedule_by_its_path(tmp_path):
    """``schedule='module.function'`` works from a classic config file."""
    from mmengine.config import Config
    from mmengine.runner import Runner

    config = tmp_path / 'config.py'
    path = 'tests.for_mmengine.test_start.half_way'
    config.write_text(
        f"custom_hooks = [dict(type='EMAHook', schedule={path!r})]\n"
    )
    cfg = Config.fromfile(config)
    assert path in cfg.pretty_text
    run = Run(tmp_path / 'run', dict(cfg.custom_hooks[0])).train()
    assert run.scalar('train/ema_decay')[-1] == 8 / 28
    assert isinstance(run.runner, Runner)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(schedule='no.such.thing'), "'no.such.thing' cannot be imported"),
        (dict(schedule='math.pi'), 'no callable'),
        (dict(schedule=lambda n: 1 / 0), 'failed for n = 1 .ZeroDivision'),
    ],
)
def test_bad_callables_are_refused(options, message):
    """What cannot be imported or fails is named."""
    with pytest.raises(ValueError, match=message):
        HOOKS.build(dict(type='EMAHook', **options))


def test_numpy_numbers_are_numbers():
    """Options and schedules may be NumPy scalars."""
    options = dict(decay=np.float32(0.5), interval=np.int64(2))
    HOOKS.build(dict(type='EMAHook', **options))
    HOOKS.build(dict(type='EMAHook', schedule=lambda n: np.float64(0.5)))


def test_priority_may_be_given_to_the_class():
    """``EMAHook(priority=49)`` is what ``dict(priority=49)`` is."""
    assert mmdet_ema.EMAHook(priority=49).priority == 49


def test_share_counts_the_updates_that_are_made(tmp_path):
    """Steps after the last update of an interval take nothing in."""
    hook = dict(type='EMAHook', schedule='constant', decay=0.5, interval=5)
    log = log_of(Run(tmp_path, hook).train())
    assert 'share of the initial weights left then: 0.0312' in log
