"""Train in a process of its own that is killed at any moment, and resume.

Saves are slow, as those of a large model are: what is written is written in
pieces.
"""

import contextlib
import errno
import importlib
import multiprocessing
import os
import random
import signal
import time

import torch.distributed as dist

from mmdet_ema.checkpoint import files
from tests.conftest import MMCV1
from tests.contract.toy import (
    EMA,
    Hook,
    RankModel,
    Run,
    Saved,
    newest,
    same,
    train_rank,
)
from tests.ranks import environment, free_port

EPOCHS = 4
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload([__name__, 'matplotlib.pyplot'])
_sleep = time.sleep


class Slow(Hook):
    """Training takes a while, and so does an evaluation."""

    def before_train_iter(self, runner, batch_idx=0, data_batch=None):
        _sleep(0.01)


class Signal(Hook):
    """Sends SIGTERM to its own process, in an iteration counted from 1."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_train_iter(self, runner, batch_idx=0, data_batch=None):
        if runner.iter + 1 == self.iteration:
            os.kill(os.getpid(), signal.SIGTERM)


class SlowFile:
    """A file on a slow disk: what is written arrives in pieces."""

    def __init__(self, file, pause):
        self._file, self._pause = file, pause

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, content):
        size = len(content) // 8 + 1
        for start in range(0, len(content), size):
            self._file.write(content[start : start + size])
            self._file.flush()
            _sleep(self._pause / 8)


def make_saves_slow(pause):
    """Let files of checkpoints be written slowly, ours and the framework's."""

    def slow_open(path, mode='r', *args, **kwargs):
        file = open(path, mode, *args, **kwargs)  # noqa: SIM115
        return SlowFile(file, pause) if mode == 'wb' else file

    backend = 'mmcv.fileio.file_client'
    if not MMCV1:
        backend = 'mmengine.fileio.backends.local_backend'
    for module in (files, importlib.import_module(backend)):
        module.open = slow_open


def make_run(folder, hooks=(), iters=None, accumulation=1, **ema):
    """Make a run that keeps one file, and one best file."""
    return Run(
        folder,
        *hooks,
        dict(EMA, **ema),
        epochs=EPOCHS,
        iters=iters,
        every=4,
        keep=1,
        best='score',
        rule='less',
        accumulation=accumulation,
        resume=True,
        on_evaluation=lambda: _sleep(0.03),
    )


def train(folder, ready, pause, ema, more):
    """Train, resuming what is there; be a process group of its own."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = open(folder.with_suffix('.log'), 'a')  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    time.sleep = lambda seconds: None  # mmcv sleeps 2 seconds an epoch
    if not MMCV1:
        from mmengine.runner import runner

        # it asks compilers for their versions, which takes seconds
        runner.collect_env = dict
    make_saves_slow(pause)
    run = make_run(folder, [Slow(), *(make() for make in more)], **ema)
    ready.set()
    run.train()


def start(folder, pause=0.1, more=(), **ema):
    """Start a run; return its process once it is about to train."""
    folder.mkdir(exist_ok=True)
    ready = _CONTEXT.Event()
    process = _CONTEXT.Process(
        target=train, args=(folder, ready, pause, ema, more)
    )
    process.start()
    while not ready.wait(0.05) and process.is_alive():
        pass
    return process


def finish(process):
    """Wait for a process; return its exit code."""
    process.join(600)
    if process.exitcode is None:
        process.kill()
        raise AssertionError('it hangs')
    return process.exitcode


def kill(process, number, group=False):
    """Kill a process, or its group; return whether it was still training."""
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(process.pid, number)
    return finish(process) != 0


def wait_for(folder, pattern):
    """Wait until a run writes a file of that name."""
    for _ in range(6000):
        if any(folder.glob(pattern)):
            return
        _sleep(0.01)
    raise AssertionError(f'no {pattern} in {folder}')


def checkpoints(folder):
    """Names of the files in a folder that a run wrote or was writing."""
    return sorted(
        p.name
        for p in folder.iterdir()
        if p.is_file() and ('.pth' in p.name or p.name == 'last_checkpoint')
    )


def check_whole(folder):
    """Everything with the name of a checkpoint is one, newest included.

    Returns:
        Whether there is one to resume from.
    """
    paths = [p for p in folder.glob('*.pth') if not p.name.startswith('.')]
    for path in paths:
        files.read_structure(str(path))
    path = newest(folder)
    if path is not None:
        assert 'optimizer' in files.read_structure(path)
    return path is not None


def assert_equal(folder, other, iters=None):
    """Both ended in the same file, bit for bit, and in nothing else."""
    last = f'iter_{iters}.pth' if iters else f'epoch_{EPOCHS}.pth'
    left, right = Saved(folder / last), Saved(other / last)
    assert [] == same(left.averages, right.averages)
    assert [] == same(left.raws, right.raws)
    assert left.steps == right.steps
    assert left.meta == right.meta
    first, second = (x.content['optimizer']['state'] for x in (left, right))
    assert first.keys() == second.keys()
    for key, state in first.items():
        assert [] == same(state, second[key])
    names, others = checkpoints(folder), checkpoints(other)
    # an evaluation that was interrupted is not repeated
    best = [name for name in names if name.startswith('best_')]
    assert 1 == len(best), names
    assert [x for x in others if 'best_' not in x] == [
        x for x in names if 'best_' not in x
    ]


def kill_often(folder, kills, seed, whole, **ema):
    """Kill runs at random moments, and resume them; compare each.

    Args:
        folder: Where they are.
        kills: How often.
        seed: Of the random moments.
        whole: Folder and seconds of a run that was not killed.
        **ema: Options of the hook.

    Returns:
        Counts: kills, runs that went to their end, kills in a save.
    """
    draw = random.Random(seed)
    whole, duration = whole
    found = dict(kills=0, resumed=0, in_a_save=0)
    while found['kills'] < kills:
        part = folder / f'part{found["resumed"]}'
        has_begun, left = False, draw.randint(1, 5)
        while True:
            process = start(part, **ema)
            if left and found['kills'] < kills:
                _sleep(draw.uniform(0, duration / 2))
                number, group = draw.choice(SIGNALS), draw.random() < 0.5
                killed = kill(process, number, group)
            else:
                killed = finish(process) != 0
                assert not killed, part.with_suffix('.log').read_text()
            # what there was is never lost
            has_one = check_whole(part)
            assert has_one or not has_begun
            has_begun = has_one
            if not killed:
                break
            left -= 1
            found['kills'] += 1
            found['in_a_save'] += any(
                x.name.endswith(files.TEMPORARY) for x in part.iterdir()
            )
        assert_equal(part, whole)
        found['resumed'] += 1
    return found


class FailingModel(RankModel):
    """Raises an error on one rank, in training or in an evaluation."""

    def __init__(self, where=''):
        super().__init__()
        self.where, self.calls = where, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        where = 'step' if self.training else 'evaluation'
        if where == self.where and self.calls > 2:
            raise RuntimeError('planned')
        return super().forward(*args, **kwargs)


def fail_to_write(*args, **kwargs):
    raise OSError(errno.ENOSPC, 'planned')


def fail_rank(rank, port, folder, where, more, ema):
    """Train on one of two ranks; ``where`` it fails."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = open(folder / f'rank{rank}.log', 'a')  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ.update(environment(rank, 2, port))
    time.sleep = lambda seconds: None
    dist.init_process_group('gloo')
    model = FailingModel(where if rank == 1 else '')
    if where == 'save' and rank == 0:
        files.open = fail_to_write
    hooks = [*(make() for make in more), dict(EMA, **ema)]
    train_rank(folder, *hooks, model=model, epochs=EPOCHS, resume=True)


def train_ranks(folder, where='', more=((), ()), **ema):
    """Train on two ranks; return their exit codes."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    ranks = [
        _CONTEXT.Process(
            target=fail_rank,
            args=(rank, port, folder, where, more[rank], ema),
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    return [finish(process) for process in ranks]
