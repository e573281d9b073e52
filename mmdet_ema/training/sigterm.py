"""SIGTERM, which schedulers send some time before they kill a run.

A signal may come to one rank alone, and to no two at the same step: the ranks
agree on the step after which all of them stop.
"""

from __future__ import annotations

import contextlib
import functools
import signal
from typing import Any, Callable, Iterable, Optional

import torch
import torch.distributed as dist

from mmdet_ema.averaging.distributed import world_size

STATUS = 128 + signal.SIGTERM
"""Exit status: a scheduler takes 0 for a run that went to its end."""
EPOCH_SAMPLES = 'ema_epoch_samples'
"""Key in ``meta``: samples of the epoch that are trained already."""


class Sigterm:
    """Whether SIGTERM has come to any rank.

    With one process it costs nothing. With several it takes one all-reduce of
    a byte a step, on the CPU, which is waited for in the next step.
    """

    def __init__(self, log: Any):
        self._log = log
        self._came = self._listens = False
        self._before: Any = None
        self._group: Any = None
        self._work: Any = None
        self._flag = torch.zeros(1, dtype=torch.uint8)

    def listen(self, loaders: Iterable[Any]) -> None:
        """Take the signal from now on; call it on all ranks.

        It does not end the workers of these data loaders.
        """
        for loader in loaders:
            spare_workers(loader)
        if self._listens:
            return
        try:
            self._before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # not the main thread
            self._log.warning(
                'EMA: save_on_sigterm=True has no effect: signals come to '
                'the main thread, and training runs in another one.'
            )
            return
        self._listens = True
        if world_size() > 1 and self._group is None:
            # the flag is not to wait for a GPU
            self._group = dist.new_group(backend='gloo')

    def _note(self, *args: Any) -> None:
        self._came = True

    def has_come(self) -> bool:
        """Return whether to stop after this step; call it on all ranks."""
        if self._group is None or not self._listens:
            return self._came
        stops = False
        if self._work is not None:
            self._work.wait()
            stops = bool(self._flag)
        self._flag.fill_(self._came)
        self._work = dist.all_reduce(
            self._flag, dist.ReduceOp.MAX, self._group, async_op=True
        )
        return stops

    def stop(self, path: str) -> None:
        """End the process, once every rank comes here."""
        if self._group is not None:
            self._work.wait()
            dist.barrier(self._group)  # the first one to leave ends the job
        self._log.warning(
            f'EMA: SIGTERM: {path} is written, and training stops here; '
            f'--resume goes on from it.'
        )
        self.ignore()
        raise SystemExit(STATUS)

    def ignore(self) -> None:
        """Leave the signal to whoever had it before."""
        if self._listens:
            self._listens = False
            if self._work is not None:
                self._work.wait()
                self._work = None
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)


def skipped(done: int, loop: Any, can_skip: bool, log: Any) -> int:
    """Return how many batches to leave out of an epoch; ``done`` are trained.

    None of them where the ``loop`` cannot begin in the middle of one.
    """
    if done and not can_skip:
        log.warning(
            f'EMA: {type(loop).__name__} begins the epoch again, of which '
            f'{done} iterations are done already.'
        )
        return 0
    if done:
        log.info(
            f'EMA: the first {done} batches of the epoch are left out: they '
            f'were trained before the file was written.'
        )
    return done


def spare_workers(loader: Any) -> None:
    """Let the workers of a loader live when their whole group gets SIGTERM.

    The step that is going on needs their data. They end with the loader.
    """
    if getattr(loader, 'num_workers', 0):
        init: Optional[Callable[[int], Any]] = loader.worker_init_fn
        if getattr(init, 'func', None) is not _init_worker:
            loader.worker_init_fn = functools.partial(_init_worker, init)


def _init_worker(init: Optional[Callable[[int], Any]], number: int) -> None:
    with contextlib.suppress(ValueError):  # a worker that is a thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if init is not None:
        init(number)
