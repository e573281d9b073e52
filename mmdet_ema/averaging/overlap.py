"""Where a step is taken into the averages: at once, or beside the training.

While a step is under way nobody else may touch the averages, and nobody may
change the raw weights that it reads. :meth:`release` is called before the
weights change, :meth:`join` before the averages are looked at.
"""

from __future__ import annotations

import concurrent.futures
import os
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from mmdet_ema.averaging.copying import CopyPlan
from mmdet_ema.averaging.memory import is_dense

Job = Callable[[], Any]


class Snapshot:
    """Copies of live tensors, for what may change while they are read.

    Args:
        raws: The live tensors.
        device: Where the copies live; None for where the tensors are. Host
            copies of a GPU's tensors are pinned.
    """

    def __init__(
        self, raws: Sequence[Tensor], device: Optional[torch.device] = None
    ):
        self.copies = [_room_for(raw, device) for raw in raws]
        self._plan = CopyPlan(self.copies, raws)

    def take(self) -> None:
        """Copy the present values; a GPU may still be at it afterwards."""
        self._plan.copy(wait=False)


class Inline:
    """Takes a step in at once."""

    is_background = False

    def start(self, snapshot: Snapshot, job: Job) -> None:
        """Run a job.

        Args:
            snapshot: Taken before the job runs.
            job: What to run.
        """
        snapshot.take()
        self._result = job()

    def release(self) -> None:
        """Let the raw weights change from here on."""

    def join(self) -> Any:
        """Return what the last job returned."""
        return self._result


class SideStream(Inline):
    """Takes a step in on a stream of its own, beside the next forward pass.

    Args:
        device: The GPU.
    """

    is_background = True

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, snapshot: Snapshot, job: Job) -> None:
        """Put a job on the side stream; see :meth:`Inline.start`."""
        snapshot.take()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._result = job()

    def release(self) -> None:
        """Make the training's stream wait for the side stream."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def join(self) -> Any:
        """Return what the last job returned; see :meth:`release`."""
        self.release()
        return self._result


class Worker(Inline):
    """Takes a step in on a thread of its own.

    Args:
        gpu: The GPU that the raw weights are copied from, None if they are in
            host memory.
        reads_raws: Whether jobs read raw weights, not only snapshots.
    """

    is_background = True

    def __init__(self, gpu: Optional[torch.device], reads_raws: bool):
        self._gpu, self._reads_raws = gpu, reads_raws
        self._pool, self._process = _one_thread(), os.getpid()
        self._future: Optional[concurrent.futures.Future[Any]] = None
        self._copied: Optional[torch.cuda.Event] = None
        if gpu is not None:
            self._stream = torch.cuda.Stream(gpu)  # type: ignore[no-untyped-call]

    def start(self, snapshot: Snapshot, job: Job) -> None:
        """Hand a job to the thread; the one before has to be joined."""
        if self._gpu is None:
            snapshot.take()
        else:
            self._copied = self._copy(snapshot)
        copied, threads = self._copied, torch.get_num_threads()
        if self._process != os.getpid():
            # a forked process inherits no thread
            self._pool, self._process = _one_thread(), os.getpid()
        self._future = self._pool.submit(_run, job, copied, threads)

    def release(self) -> None:
        """Wait until raw weights are no longer read."""
        if self._gpu is not None and self._copied is not None:
            torch.cuda.current_stream(self._gpu).wait_event(self._copied)
        if self._reads_raws and self._future is not None:
            concurrent.futures.wait([self._future])

    def join(self) -> Any:
        """Wait for the last job; return what it returned."""
        assert self._future is not None
        self.release()
        return self._future.result()

    def _copy(self, snapshot: Snapshot) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._gpu))
        with torch.cuda.stream(self._stream):
            snapshot.take()
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return event


def background_for(
    devices: Sequence[Tuple[torch.device, torch.device]], overlap: bool
) -> Tuple[Inline, bool]:
    """Choose where steps are taken in.

    Args:
        devices: Devices of the averages and of their raw tensors.
        overlap: Whether the training goes on meanwhile.

    Returns:
        Where, and whether every raw tensor needs a snapshot in host memory.
    """
    kinds = {(average.type, raw.type) for average, raw in devices}
    raws: List[torch.device] = list({raw for _, raw in devices})
    if len(raws) == 1 and kinds == {('cpu', 'cuda')}:
        return Worker(raws[0], reads_raws=False), True
    if overlap and len(raws) == 1 and kinds == {('cuda', 'cuda')}:
        return SideStream(raws[0]), False
    if overlap and kinds == {('cpu', 'cpu')}:
        return Worker(None, reads_raws=True), False
    return Inline(), False


def _room_for(raw: Tensor, device: Optional[torch.device]) -> Tensor:
    device = raw.device if device is None else device
    stride = raw.stride() if is_dense(raw) else None
    pinned = device.type == 'cpu' and raw.is_cuda
    with torch.inference_mode(False):
        room = torch.empty(raw.numel(), dtype=raw.dtype, device=device)
        room = room.pin_memory() if pinned else room
        if stride is None:
            return room.view(raw.shape)
        return room.as_strided(raw.shape, stride)


def _one_thread() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(
        1, thread_name_prefix='mmdet_ema'
    )


@torch.no_grad()
def _run(job: Job, copied: Optional[torch.cuda.Event], threads: int) -> Any:
    if copied is not None:
        copied.synchronize()
    # the number of threads is a setting of each thread
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return job()
