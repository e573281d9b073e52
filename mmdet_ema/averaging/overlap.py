"""Where an update runs: inline, or on a side stream of the GPU.

While an update is under way nobody else may touch the averages, and nobody
may change the raw weights that it reads: :meth:`Inline.release` is called
before the weights change, :meth:`Inline.wait` before the averages are used.
"""

from __future__ import annotations

from typing import Callable, Sequence, TypeVar

import torch
from torch import Tensor

_Result = TypeVar('_Result')


class Inline:
    """Runs an update at once."""

    def run(
        self, read: Callable[[], None], job: Callable[[], _Result]
    ) -> _Result:
        """Run a job.

        Args:
            read: Reads what the training may change while the job runs.
            job: The update.
        """
        read()
        return job()

    def release(self) -> None:
        """Let the raw weights change from here on."""

    def wait(self) -> None:
        """Let the averages be used from here on."""


class SideStream(Inline):
    """Runs an update in parallel with the next forward pass.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def run(
        self, read: Callable[[], None], job: Callable[[], _Result]
    ) -> _Result:
        """Put a job on the side stream; see :meth:`Inline.run`."""
        read()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            result = job()
        self._done.record(self._stream)
        return result

    def release(self) -> None:
        """Make the training's stream wait for the side stream."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def wait(self) -> None:
        """Make the training's stream wait, and the host.

        The host reads averages that are offloaded to its memory.
        """
        self.release()
        self._done.synchronize()


def choose_place(
    raws: Sequence[Tensor], averages: Sequence[Tensor], overlap: bool
) -> Inline:
    """Choose where updates run.

    Averages in host memory of a model on a GPU come to the GPU, tensor by
    tensor, and go back: on a side stream, as the way is long. On a CPU nothing
    is gained by a thread: it would take its time from the training.

    Args:
        raws: The raw tensors that are averaged.
        averages: Their averages.
        overlap: Whether the training goes on meanwhile.
    """
    devices = {raw.device for raw in raws}
    offloaded = any(not average.is_cuda for average in averages)
    if len(devices) == 1 and (overlap or offloaded):
        device = devices.pop()
        if device.type == 'cuda':
            return SideStream(device)
    return Inline()
