"""What the hook says at the start, and what it refuses."""

import numpy as np
import pytest
from mmengine.registry import HOOKS, DefaultScope

import mmdet_ema
from tests import needs, oracle
from tests.for_mmengine.toy import Run


def test_report_at_the_start(tmp_path):
    """Schedule, window, decay, share, tensors, memory; nothing is warned."""
    hook = dict(type='EMAHook', decay=0.5, tau=1)
    run = Run(tmp_path, hook, max_epochs=3).train()
    log = run.log
    assert 'EMA: exponential(decay=0.5, tau=1.0), every step' in log
    assert 'steps: 12 planned' in log
    assert 'decay 0.499997, effective window 2 steps' in log
    share = np.prod([oracle.ramp(n, 0.5, 1) for n in range(1, 13)])
    assert f'share of the initial weights left then: {share:.3g}' in log
    assert 'tensors: 10 averaged, 1 copied, 2 frozen' in log
    assert 'memory of the averages: 0.0 MiB' in log
    assert 'WARNING - EMA' not in log


def test_warnings_at_the_start(tmp_path):
    """Each thing that will not work as promised gets a line."""
    hook = dict(type='EMAHook', tau=1, schedule='constant')
    log = Run(tmp_path, hook).train().log
    for warning in ('tau has no effect', '100% of the average will still be'):
        assert 1 == log.count(f'WARNING - EMA: {warning}')


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
