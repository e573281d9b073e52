"""Every runner and every order of hooks: who sees which weights."""

import functools
import itertools
import tempfile
from pathlib import Path

import pytest
from mmcv.runner import Hook

from tests import oracle
from tests.for_mmcv1.toy import EMA, Run, raw_of, same

PRIORITIES = ['VERY_HIGH', 'ABOVE_NORMAL', 49, 'NORMAL', 'LOW', 'VERY_LOW']
RUNNERS = dict(
    epochs=dict(type='EpochBasedRunner', max_epochs=4),
    iters=dict(type='IterBasedRunner', max_iters=16),
)
BOTH = [True, False]


def ramp(n):
    return oracle.ramp(n, 0.9, 3)


def wrong(run, weights, steps):
    """Names of the tensors that are not the average after some steps."""
    return [*run.wrong(weights, ramp, range(steps))]


def files_of(run):
    """Checkpoints of a run, with the steps that they were written after."""
    for path in sorted(run.work_dir.glob('*.pth')):
        kind, _, number = path.stem.rpartition('_')
        if not path.is_symlink():
            steps = int(number) * (4 if 'epoch' in kind else 1)
            yield path.name, steps


def evaluation(by_epoch):
    """By epoch, or in the middle of epochs; with a best file."""
    best = dict(save_best='score', rule='greater')
    return dict(by_epoch=by_epoch, interval=1 if by_epoch else 3, **best)


@functools.lru_cache(maxsize=None)
def plain_records(runner, eval_by_epoch):
    """Weights after every step of a run without an EMA hook."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            Path(folder),
            runner=RUNNERS[runner],
            evaluation=evaluation(eval_by_epoch),
            checkpoint=None,
        )
        return run.train().records


@pytest.mark.parametrize(
    ('runner', 'priority', 'eval_by_epoch', 'save_by_epoch'),
    [
        *itertools.product(['epochs'], PRIORITIES, BOTH, BOTH),
        *itertools.product(['iters'], PRIORITIES, [False], [False]),
    ],
)
def test_every_order_of_hooks(
    runner, priority, eval_by_epoch, save_by_epoch, tmp_path
):
    """Evaluations and files have the averages, training the raw weights."""
    run = Run(
        tmp_path,
        dict(EMA, priority=priority),
        runner=RUNNERS[runner],
        evaluation=evaluation(eval_by_epoch),
        checkpoint=dict(by_epoch=save_by_epoch, interval=1),
    ).train()
    records = plain_records(runner, eval_by_epoch)
    assert 16 == len(run.records)
    assert [] == [s for s, r in enumerate(run.records) if same(r, records[s])]
    evaluated = [4, 8, 12, 16] if eval_by_epoch else [3, 6, 9, 12, 15]
    assert evaluated == [steps for steps, _ in run.recorder.seen]
    assert [] == [s for s, seen in run.recorder.seen if wrong(run, seen, s)]
    files = dict(files_of(run))
    # EpochBasedRunner names files by epoch, also those of iterations
    assert len(files) == 1 + (4 if runner == 'epochs' else 16)
    for name, steps in files.items():
        saved = run.load(name)
        assert [] == wrong(run, saved['state_dict'], steps), name
        assert [] == same(raw_of(saved), run.records[steps - 1]), name
    assert not [k for k in saved['state_dict'] if k.startswith('ema_')]


class SavesEarly(Hook):
    """A user's hook that saves right after the optimizer's step."""

    def after_train_iter(self, runner):
        if runner.iter == 5:
            runner.save_checkpoint(runner.work_dir, 'early.pth')


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'VERY_LOW'])
def test_a_users_hook_saves_the_averages(priority, tmp_path):
    """A file that is written before our turn has the last step in it."""
    run = Run(tmp_path, dict(EMA, priority=priority))
    run.runner.register_hook(SavesEarly(), priority='ABOVE_NORMAL')
    run.train()
    saved = run.load('early.pth')
    assert [] == wrong(run, saved['state_dict'], 6)
    assert [] == same(raw_of(saved), run.records[5])
