"""A side stream for updates, in parallel with the next forward pass.

While an update is under way nobody else may touch the averages, and nobody
may change the raw weights that it reads: :meth:`SideStream.release` is called
before the weights change, :meth:`SideStream.wait` before the averages are
used.
"""

from __future__ import annotations

from typing import Callable, Optional, Sequence, TypeVar

import torch
from torch import Tensor

_Result = TypeVar('_Result')


class SideStream:
    """Runs updates on a stream of its own.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def run(self, update: Callable[[], _Result]) -> _Result:
        """Run an update after what the training has been given so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                return update()
        finally:
            self._done.record(self._stream)

    def release(self) -> None:
        """Make the training's stream wait for the side stream."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def wait(self) -> None:
        """Make the training's stream wait, and the host.

        The host reads averages that are offloaded to its memory.
        """
        self.release()
        self._done.synchronize()


def side_stream(
    raws: Sequence[Tensor], averages: Sequence[Tensor], overlap: bool
) -> Optional[SideStream]:
    """Return a stream where one pays off, None for updates that run inline.

    Averages in host memory of a model on a GPU come to the GPU, tensor by
    tensor, and go back: the transfer is slow. On a CPU nothing is gained by a
    thread: it would take its time from the training.

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
    return None
