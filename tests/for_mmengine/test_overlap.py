"""``overlap=True`` in mmengine's runner: the same run, to the last bit."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper

from mmdet_ema.averaging.overlap import Worker
from mmdet_ema.averaging.update import StepPlan
from tests import needs
from tests.for_mmengine.toy import (
    RecordingSGD,
    Run,
    ToyModel,
    loader,
    same,
    state_of,
)

ROOT = Path(__file__).resolve().parents[2]
EMA = dict(type='EMAHook', decay=0.9, tau=3)
# Logging asks for the averages' distance; here it seldom does.
QUIET = dict(logger=dict(type='LoggerHook', interval=100))
PARTS = ('state_dict', 'ema_state_dict')


def both(tmp_path, hook=EMA, prepare=lambda: {}, **options):
    """Train the same twice: beside the training, and not; both runs."""
    runs = []
    for overlap in (True, False):
        folder = tmp_path / f'overlap_{overlap}'
        torch.manual_seed(0)
        settings = {'hooks': QUIET, **options, **prepare()}
        extra = settings.pop('extra', ())
        run = Run(folder, dict(hook, overlap=overlap), *extra, **settings)
        runs.append(run.train())
    beside, plain = runs
    assert Worker is type(background_of(beside))
    assert Worker is not type(background_of(plain))
    return beside, plain


def background_of(run):
    return run.hook._life.averager._store.intake._background


def check_equal(beside, plain):
    """Compare weights after every step, and every file, bit for bit."""
    pairs = list(zip(beside.records, plain.records))
    assert [same(*pair) for pair in pairs] == [[]] * len(plain.records)
    names = sorted(path.name for path in plain.work_dir.glob('*.pth'))
    assert names == sorted(p.name for p in beside.work_dir.glob('*.pth'))
    assert names
    for name in names:
        left, right = beside.load(name), plain.load(name)
        assert [same(left[part], right[part]) for part in PARTS] == [[], []]
        assert left['ema_meta'] == right['ema_meta']


@pytest.mark.parametrize(
    'more',
    [
        {},
        dict(interval=3),
        dict(update_buffers=False),
        dict(begin_iter=3),
        dict(evaluate='both'),
        dict(nonfinite='raise'),
        dict(nonfinite='ignore'),
        dict(device='cpu'),
        dict(schedule='mean', decay=None, tau=None),
        dict(ema_type='ExpMomentumEMA', decay=None, tau=None),
    ],
    ids=str,
)
def test_equals_the_run_without(tmp_path, more):
    """Weights, averages, BatchNorm's buffers and scores are the same."""
    hook = {k: v for k, v in {**EMA, **more}.items() if v is not None}
    beside, plain = both(tmp_path, hook, max_epochs=3)
    check_equal(beside, plain)
    for name in ('val/score', 'train/loss'):
        assert beside.scalar(name).tolist() == plain.scalar(name).tolist()
    moved = plain.load('epoch_3.pth')['state_dict']['norm.running_mean']
    assert moved.abs().min() > 0


@pytest.mark.parametrize(
    'options',
    [
        dict(accumulative_counts=2),
        dict(accumulative_counts=3, max_epochs=3),
        dict(
            train_cfg=dict(by_epoch=False, max_iters=11, val_interval=4),
            train_dataloader=loader(64),
            hooks=dict(
                QUIET,
                checkpoint=dict(
                    type='CheckpointHook', by_epoch=False, interval=3
                ),
            ),
        ),
        dict(hooks=dict(logger=dict(type='LoggerHook', interval=1))),
        dict(
            hooks=dict(
                QUIET,
                checkpoint=dict(
                    type='CheckpointHook', save_best='score', rule='greater'
                ),
            )
        ),
    ],
    ids=['accumulation', 'odd', 'iterations', 'logged', 'best'],
)
def test_equals_in_other_loops(tmp_path, options):
    """Accumulation, loops by iterations, logs and best files are the same."""
    check_equal(*both(tmp_path, **options))


def test_scalars_of_the_log(tmp_path):
    """Decay, distance and skipped steps are those of the plain run."""
    hooks = dict(logger=dict(type='LoggerHook', interval=1))
    beside, plain = both(tmp_path, hooks=hooks)
    for name in ('ema_decay', 'ema_distance', 'ema_skipped'):
        found, wanted = (r.scalar(f'train/{name}') for r in (beside, plain))
        assert found.tolist() == wanted.tolist()
        assert len(found) == 8


def test_updates_do_run_beside(tmp_path, monkeypatch):
    """Steps are taken in on one thread, not the training's; none is lost."""
    seen = []
    take_in = StepPlan.take_in

    def noted(plan, step):
        seen.append((step.number, threading.current_thread().name))
        return take_in(plan, step)

    monkeypatch.setattr(StepPlan, 'take_in', noted)
    Run(tmp_path, dict(EMA, overlap=True), hooks=QUIET).train()
    assert list(range(1, 9)) == [number for number, _ in seen]
    assert 1 == len({name for _, name in seen})
    assert seen[0][1].startswith('mmdet_ema')


def test_slow_updates_are_waited_for(tmp_path, monkeypatch):
    """Updates slower than the training give the same numbers."""
    take_in = StepPlan.take_in

    def slow(plan, step):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.05)
        return take_in(plan, step)

    monkeypatch.setattr(StepPlan, 'take_in', slow)
    check_equal(*both(tmp_path, max_epochs=3))


@needs.told_of_steps
@pytest.mark.parametrize('first', [True, False])
def test_resume(tmp_path, first):
    """A run that is resumed with or without overlap equals the whole one."""
    whole = Run(tmp_path / 'whole', EMA, max_epochs=4, hooks=QUIET).train()
    part = tmp_path / 'part'
    options = dict(hooks=QUIET, max_epochs=2)
    Run(part, dict(EMA, overlap=first), **options).train()
    options.update(max_epochs=4, resume=True)
    resumed = Run(part, dict(EMA, overlap=not first), **options).train()
    for name in ('epoch_3.pth', 'epoch_4.pth'):
        left, right = whole.load(name), resumed.load(name)
        assert [same(left[part], right[part]) for part in PARTS] == [[], []]
    # Overlap is no part of what a run computes: nothing to warn of.
    log = max(part.glob('*/*.log')).read_text()
    assert 'overlap' not in log.split('before_run')[-1]


class SaveInMidRun(Hook):
    """Writes files while an update may be under way, and in validation."""

    priority = 'VERY_LOW'

    def after_train_iter(self, runner, batch_idx, **more):
        name = f'iter_{runner.iter + 1}.pth'
        runner.save_checkpoint(str(runner.work_dir), name)

    def after_val_iter(self, runner, batch_idx, **more):
        runner.save_checkpoint(str(runner.work_dir), 'middle.pth')


def test_files_of_mid_run(tmp_path):
    """Files that other hooks write at any moment are the plain run's."""
    check_equal(*both(tmp_path, prepare=lambda: dict(extra=[SaveInMidRun()])))


class PoisonedSGD(RecordingSGD):
    """Leaves NaN in a weight after some steps; recovers in the next."""

    bad = ()

    def step(self, closure=None):
        n = len(self.records) + 1
        parameters = self.param_groups[0]['params']
        if n - 1 in self.bad:
            for parameter, kept in zip(parameters, self.kept):
                parameter.data.copy_(kept)
                parameter.grad = None
        loss = super().step(closure)
        self.kept = [p.detach().clone() for p in parameters]
        if n in self.bad:
            parameters[0].data.view(-1)[0] = float('nan')
            self.records[-1] = state_of(self.model)
        return loss


def poisoned(*bad):
    """Return options of a run whose steps ``bad`` leave NaN."""
    model = ToyModel()
    optimizer = PoisonedSGD(model.parameters(), lr=0.002).watch(model)
    optimizer.bad = bad
    return dict(model=model, optim_wrapper=OptimWrapper(optimizer))


def log_of(run):
    return max(run.work_dir.glob('*/*.log')).read_text()


@pytest.mark.parametrize(
    'bad',
    [
        *((3,), (7,), (8,), (4,)),
        # the same NaN as before is no change that shows in the weights
        *(
            pytest.param(bad, marks=needs.told_of_steps)
            for bad in ((3, 4), (3, 4, 6), (1, 2))
        ),
    ],
    ids=str,
)
def test_bad_steps(tmp_path, bad):
    """Steps with NaN are left out and counted as without overlap.

    Also the last before a validation, a file, and the end of the training.
    """
    beside, plain = both(tmp_path, prepare=lambda: poisoned(*bad))
    left, right = (run.load('epoch_2.pth') for run in (beside, plain))
    if 8 in bad:
        for file in (left, right):
            assert file['ema_state_dict'].pop('module.low').isnan().any()
    assert [same(left[part], right[part]) for part in PARTS] == [[], []]
    assert left['ema_meta'] == right['ema_meta']
    assert left['ema_meta']['num_skipped'] == len(bad)
    assert all(torch.isfinite(v).all() for v in left['state_dict'].values())


@pytest.mark.parametrize('bad', [(3,), (4,), (7,), (8,)], ids=str)
def test_bad_step_is_reported(tmp_path, bad):
    """The log names the iteration of the step that was left out."""
    for run in both(tmp_path, prepare=lambda: poisoned(*bad)):
        assert f'iteration {bad[0]} left NaN or Inf' in log_of(run)
        assert run.scalar('train/ema_skipped')[-1] == 1


@needs.told_of_steps
def test_tenth_bad_step_is_reported(tmp_path):
    """Of bad steps in a row the tenth is named by its own iteration."""
    bad = tuple(range(3, 13))
    options = dict(train_dataloader=loader(64))
    for run in both(tmp_path, prepare=lambda: poisoned(*bad), **options):
        assert 'iteration 3 left NaN or Inf' in log_of(run)
        assert 'iteration 12 left NaN or Inf' in log_of(run)


def test_bad_step_stops_the_run_if_told(tmp_path):
    """Under 'raise' the run stops at once and names the iteration."""
    hook = dict(EMA, overlap=True, nonfinite='raise')
    run = Run(tmp_path, hook, hooks=QUIET, **poisoned(3))
    with pytest.raises(
        FloatingPointError, match=r'iteration 3: .* NaN or Inf'
    ):
        run.train()


class Broken(ToyModel):
    """Does something in the forward pass of the fourth iteration."""

    action = None

    def forward(self, inputs, mode='tensor'):
        self.calls = getattr(self, 'calls', 0) + (mode == 'loss')
        if self.calls == 4 and self.action is not None:
            self.action()
        return super().forward(inputs, mode)


def fail():
    raise RuntimeError('forward failed')


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ('action', 'error'),
    [(fail, RuntimeError), (interrupt, KeyboardInterrupt)],
)
def test_training_that_stops(tmp_path, monkeypatch, action, error):
    """An exception and Ctrl-C with an update under way: it is finished.

    The averages are those of three steps, and the raw weights untouched.
    """
    take_in = StepPlan.take_in

    def slow(plan, step):
        time.sleep(0.1)
        return take_in(plan, step)

    monkeypatch.setattr(StepPlan, 'take_in', slow)
    found = []
    for overlap in (True, False):
        model = Broken()
        model.action = action
        hook = dict(EMA, overlap=overlap)
        run = Run(tmp_path / str(overlap), hook, model=model, hooks=QUIET)
        with pytest.raises(error):
            run.train()
        # the forward pass had not come to BatchNorm's buffers
        assert same(state_of(model), run.records[-1]) == []
        averager = run.hook._life.averager
        assert averager.num_steps == 3
        found.append({k: v.clone() for k, v in averager.named_averages()})
    assert same(*found) == []


def test_error_in_an_update(tmp_path, monkeypatch):
    """An error in the background stops the run at the next update."""
    take_in = StepPlan.take_in

    def fails(plan, step):
        if step.number == 3:
            raise MemoryError('no room')
        return take_in(plan, step)

    monkeypatch.setattr(StepPlan, 'take_in', fails)
    run = Run(tmp_path, dict(EMA, overlap=True), hooks=QUIET)
    with pytest.raises(MemoryError, match='no room'):
        run.train()
    assert len(run.records) == 4
    assert run.hook._life.averager.num_steps == 2


def test_workers_that_fork(tmp_path):
    """Data loaders fork in every epoch, with updates under way, and end."""
    workers = dict(num_workers=2, persistent_workers=False)
    options = dict(
        train_dataloader={**loader(), **workers},
        val_dataloader={**loader(4, seed=1), **workers},
        env_cfg=dict(mp_cfg=dict(mp_start_method='fork')),
    )
    check_equal(*both(tmp_path, max_epochs=3, **options))


def train_on_two_ranks(folder, overlap):
    folder.mkdir()
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command += ['--nproc_per_node', '2', '-m']
    command += ['tests.for_mmengine.overlap_ranks_program', 'Runner']
    done = subprocess.run(
        [*command, str(folder), str(overlap)],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    dumps = [folder / f'rank{i}.pt' for i in (0, 1)]
    return [torch.load(dump, weights_only=needs.SAFELY) for dump in dumps]


@needs.gloo_bfloat16
def test_two_ranks(tmp_path):
    """Two gloo ranks see and save what they do without overlap."""
    names = ('beside', 'plain')
    folders = [tmp_path / name for name in names]
    beside, plain = (
        train_on_two_ranks(folder, folder.name == 'beside')
        for folder in folders
    )
    for left, right in zip(beside, plain):
        for part in ('records', 'seen'):
            pairs = list(zip(left[part], right[part]))
            assert [same(*pair) for pair in pairs] == [[]] * len(right[part])
            assert pairs
    files = [
        torch.load(folder / 'epoch_2.pth', weights_only=needs.SAFELY)
        for folder in folders
    ]
    assert [same(*(f[part] for f in files)) for part in PARTS] == [[], []]
    assert files[0]['ema_meta'] == files[1]['ema_meta']
