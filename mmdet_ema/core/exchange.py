"""Put averages into the model and take them out again, bit for bit."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor

Pair = Tuple[Tensor, Tensor]


class Exchange:
    """Swaps averages and raw tensors in place.

    Where dtype is the same the two trade places, one tensor at a time, so no
    second copy of the model is needed. A raw tensor of lower precision cannot
    hold its float32 average: there the raw values are set aside meanwhile.
    All memory is taken before anything is changed, and kept for the way back.

    Args:
        averages: The averages.
        raws: The raw tensors, in the same order, of the same shapes.
    """

    def __init__(self, averages: Sequence[Tensor], raws: Sequence[Tensor]):
        self._pairs = list(zip(averages, raws))
        self._same = [(a, r) for a, r in self._pairs if a.dtype == r.dtype]
        self._scratch: Dict[object, Tensor] = {}
        self._aside: Dict[int, Tensor] = {}
        self.swapped = False

    @torch.no_grad()
    def swap_in(self) -> None:
        """Put the averages where the model sees them."""
        assert not self.swapped
        with deferred_interrupts():
            aside = {i: raw.detach().clone() for i, raw in self._narrow()}
            self._scratch = _scratch_for(self._same)
            self._trade()
            for i, raw in self._narrow():
                raw.copy_(self._pairs[i][0])
            self._aside, self.swapped = aside, True

    @torch.no_grad()
    def swap_out(self) -> None:
        """Put the raw values back."""
        assert self.swapped
        with deferred_interrupts():
            self._trade()
            for i, raw in self._narrow():
                raw.copy_(self._aside[i])
            self._aside, self._scratch, self.swapped = {}, {}, False

    def average(self, index: int) -> Tensor:
        """Return the tensor that holds the average of a pair now."""
        average, raw = self._pairs[index]
        traded = self.swapped and index not in self._aside
        return raw.detach() if traded else average

    def raw(self, index: int) -> Tensor:
        """Return the tensor that holds the raw values of a pair now."""
        average, raw = self._pairs[index]
        if not self.swapped:
            return raw.detach()
        return self._aside.get(index, average)

    def _narrow(self) -> Iterator[Tuple[int, Tensor]]:
        for i, (average, raw) in enumerate(self._pairs):
            if average.dtype != raw.dtype:
                yield i, raw

    def _trade(self) -> None:
        for average, raw in self._same:
            scratch = self._scratch[average.device, average.dtype]
            held = scratch[: average.numel()].view(average.shape)
            held.copy_(average)
            average.copy_(raw)
            raw.copy_(held)


def _scratch_for(pairs: Sequence[Pair]) -> Dict[object, Tensor]:
    """Allocate room for the largest tensor of each device and dtype."""
    sizes: Dict[Tuple[torch.device, torch.dtype], int] = {}
    for average, _ in pairs:
        key = (average.device, average.dtype)
        sizes[key] = max(sizes.get(key, 0), average.numel())
    return {
        (device, dtype): torch.empty(size, device=device, dtype=dtype)
        for (device, dtype), size in sizes.items()
    }


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back until the body is done, then let it through.

    A swap that stops half-way would leave some raw weights in the model and
    some among the averages. Only the main thread receives interrupts.
    """
    previous = signal.getsignal(signal.SIGINT)
    here = threading.current_thread() is threading.main_thread()
    if not here or not callable(previous):
        yield
        return
    held: List[Tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *received: held.append(received))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            previous(*held[0])
