"""Decay, distance and skipped steps in mmcv's loggers."""

import json
import os
import re
import subprocess
import sys
from logging.handlers import BufferingHandler

import pytest
import torch

from tests import oracle
from tests.for_mmcv1.test_orders import ramp
from tests.for_mmcv1.toy import EMA, Run, quiet

NAMES = ['ema_decay', 'ema_distance', 'ema_skipped']


def log_config(*kinds, interval=2):
    return dict(interval=interval, hooks=[dict(type=kind) for kind in kinds])


def lines_of(run):
    """Lines of the JSON log that tell of training or validation."""
    path = next(run.work_dir.glob('*.log.json'))
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in found if 'mode' in line]


def distance_of(run, step):
    """Relative distance of average and raw weights, from the formula."""
    gap, size = 0.0, 0.0
    for key, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            start, values = run.trace(key, step)
            average = oracle.average(start, values, ramp)
            gap += float(((average - values[-1]) ** 2).sum())
            size += float((values[-1] ** 2).sum())
    return (gap / size) ** 0.5


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'NORMAL', 'VERY_LOW'])
def test_text_logger(priority, tmp_path):
    """The values are current, at the interval only, and not in val lines."""
    fast = dict(schedule='constant', decay=0.25)
    hook = dict(EMA, priority=priority, averages=dict(fast=fast))
    run = Run(tmp_path, hook, log=log_config('TextLoggerHook')).train()
    lines = lines_of(run)
    train = [line for line in lines if line['mode'] == 'train']
    assert 4 == len(train)
    for line, step in zip(train, [2, 4, 6, 8]):
        assert line['ema_decay'] == round(ramp(step), 5)
        assert 0.25 == line['ema_decay_fast']
        # the log rounds to 5 digits
        assert abs(line['ema_distance'] - distance_of(run, step)) < 1e-5
        assert 0 == line['ema_skipped']
    val = [line for line in lines if line['mode'] == 'val']
    assert 2 == len(val)
    assert [] == [name for line in val for name in NAMES if name in line]
    assert all('score' in line for line in val)


def test_small_distance(tmp_path):
    """Neither the text nor the JSON log rounds it to 0."""
    hook = dict(type='EMAHook', schedule='constant', decay=1e-4)
    said = BufferingHandler(10**6)
    log, logger = log_config('TextLoggerHook'), quiet(said)
    run = Run(tmp_path, hook, log=log, logger=logger).train()
    found = [x['ema_distance'] for x in lines_of(run) if 'ema_decay' in x]
    text = ' '.join(line.getMessage() for line in said.buffer)
    shown = re.findall(r'ema_distance: ([^,]+),', text)
    assert [f'{x:.3g}' for x in found] == shown
    assert all(0 < x < 5e-5 for x in found)


def test_all_is_logged(tmp_path):
    """The metrics of all sets of weights are in the val lines."""
    averages = dict(fast=dict(decay=0.5))
    hook = dict(EMA, averages=averages, evaluate='all')
    run = Run(tmp_path, hook, log=log_config('TextLoggerHook')).train()
    val = [line for line in lines_of(run) if line['mode'] == 'val']
    names = {'score', 'score_raw', 'score_fast'}
    assert all(names <= set(line) for line in val)


def test_iteration_runner(tmp_path):
    """An evaluation by iteration lets the loggers log before it."""
    log = dict(interval=2, hooks=[dict(type='TextLoggerHook', by_epoch=False)])
    run = Run(
        tmp_path,
        EMA,
        runner=dict(type='IterBasedRunner', max_iters=8),
        evaluation=dict(interval=4, by_epoch=False),
        log=log,
    ).train()
    lines = lines_of(run)
    train = [x['ema_decay'] for x in lines if x['mode'] == 'train']
    assert train == [round(ramp(step), 5) for step in [2, 4, 6, 8]]
    assert 2 == len([x for x in lines if x['mode'] == 'val'])


def test_nothing_is_computed_where_nothing_is_logged(tmp_path, monkeypatch):
    """The distance, which reads every weight, is for loggers alone."""
    calls = []

    def count(averager):
        calls.append(averager.num_steps)
        return 0.0

    from mmdet_ema.averaging import WeightAverager

    monkeypatch.setattr(WeightAverager, 'distance', count)
    Run(tmp_path / 'a', EMA).train()
    assert [] == calls
    log = log_config('TextLoggerHook', 'TensorboardLoggerHook', interval=4)
    pytest.importorskip('tensorboard')
    Run(tmp_path / 'b', EMA, log=log).train()
    assert [4, 8] == calls


def test_tensorboard_logger(tmp_path):
    """Tensorboard shows a curve of each."""
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing import event_accumulator

    log = log_config('TextLoggerHook', 'TensorboardLoggerHook')
    Run(tmp_path, EMA, log=log).train()
    events = event_accumulator.EventAccumulator(str(tmp_path / 'tf_logs'))
    events.Reload()
    decays = events.Scalars('train/ema_decay')
    assert [2, 4, 6, 8] == [event.step for event in decays]
    assert decays[-1].value == pytest.approx(ramp(8), rel=1e-6)
    assert 4 == len(events.Scalars('train/ema_distance'))
    assert 'val/score' in events.Tags()['scalars']
    assert 'val/ema_decay' not in events.Tags()['scalars']


PROGRAM = """
import sys, time
from pathlib import Path
time.sleep = lambda seconds: None
from tests.for_mmcv1.toy import EMA, Run, quiet
hook = dict(eval(sys.argv[1]))
Run(Path(sys.argv[2]), EMA, log=dict(interval=2, hooks=[hook])).train()
"""


def run_program(hook, work_dir, **environment):
    """Train in a process of its own: these loggers keep global state."""
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM, repr(hook), work_dir],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert 0 == done.returncode, done.stderr[-2000:]


def test_mlflow_logger(tmp_path):
    """The metrics of mlflow have them."""
    pytest.importorskip('mlflow')
    store = tmp_path / 'store'
    hook = dict(type='MlflowLoggerHook', log_model=False)
    run_program(
        hook,
        tmp_path / 'run',
        MLFLOW_TRACKING_URI=store.as_uri(),
        MLFLOW_ALLOW_FILE_STORE='true',
    )
    path = next(store.glob('**/metrics/train/ema_decay'))
    values = [float(x.split()[1]) for x in path.read_text().splitlines()]
    assert values == [pytest.approx(ramp(step)) for step in [2, 4, 6, 8]]
    assert list(store.glob('**/metrics/train/ema_distance'))
    assert not list(store.glob('**/metrics/val/ema_*'))


def test_wandb_logger_offline(tmp_path):
    """Weights & Biases, offline, gets them."""
    pytest.importorskip('wandb')
    options = dict(mode='offline', dir=str(tmp_path))
    hook = dict(
        type='WandbLoggerHook', init_kwargs=options, log_artifact=False
    )
    run_program(hook, tmp_path / 'run', WANDB_SILENT='true')
    path = next(tmp_path.glob('wandb/offline-run-*/*.wandb'))
    content = path.read_bytes()
    assert content.count(b'train/ema_decay') >= 4
    assert content.count(b'train/ema_distance') >= 4
    assert 0 == content.count(b'val/ema_decay')


def test_losses_are_those_of_a_run_without_ema(tmp_path):
    """What the loggers average over their interval stays the same."""
    log = log_config('TextLoggerHook')
    plain = Run(tmp_path / 'a', log=log).train()
    ours = Run(tmp_path / 'b', EMA, log=log).train()
    for left, right in zip(lines_of(plain), lines_of(ours)):
        assert left.get('loss') == right.get('loss')
        assert left['iter'] == right['iter']
    assert torch.equal(plain.records[-1]['low'], ours.records[-1]['low'])
