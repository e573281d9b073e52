"""Put averages into the model and take them out again, bit for bit."""

from __future__ import annotations

from typing import Dict, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor

from mmdet_ema.averaging.copying import copy_all, group_pairs, placement
from mmdet_ema.averaging.interrupts import DeferredInterrupts

Pair = Tuple[Tensor, Tensor]
_Trade = Tuple[List[Tensor], List[Tensor], List[Tensor]]
# elements: as small tensors are swapped in few calls, large ones one by one
_SCRATCH = 2**20


class Exchange:
    """Swaps averages and raw tensors in place.

    Where dtype is the same the two trade places, some tensors at a time, so no
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
        self._trades: List[_Trade] = []
        self._aside: Dict[int, Tensor] = {}
        self.swapped = False

    @torch.no_grad()
    def swap_in(self) -> None:
        """Put the averages where the model sees them."""
        assert not self.swapped
        with DeferredInterrupts():
            aside = {i: raw.detach().clone() for i, raw in self._narrow()}
            self._trades = list(_trades(self._same))
            self._trade()
            for i, raw in self._narrow():
                raw.data.copy_(self._pairs[i][0])
            self._aside, self.swapped = aside, True

    @torch.no_grad()
    def swap_out(self) -> None:
        """Put the raw values back."""
        assert self.swapped
        with DeferredInterrupts():
            self._trade()
            for i, raw in self._narrow():
                raw.data.copy_(self._aside[i])
            self._aside, self._trades, self.swapped = {}, [], False

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
        for averages, raws, held in self._trades:
            # .data: an evaluation between forward and backward pass does not
            # count as a change of what autograd has saved
            live = [raw.data for raw in raws]
            copy_all(held, averages)
            copy_all(averages, live)
            copy_all(live, held)


def _trades(pairs: Sequence[Pair]) -> Iterator[_Trade]:
    """Split pairs into trades that share a scratch; allocate all of it."""
    for averages, raws in group_pairs(pairs, placement).values():
        device, dtype = averages[0].device, averages[0].dtype
        sizes = [average.numel() for average in averages]
        room = max(max(sizes), min(sum(sizes), _SCRATCH))
        scratch = torch.empty(room, device=device, dtype=dtype)
        for chunk in _chunks(sizes, room):
            chosen = averages[chunk]
            parts = torch.split(scratch[: sum(sizes[chunk])], sizes[chunk])
            held = [p.view(a.shape) for p, a in zip(parts, chosen)]
            yield chosen, raws[chunk], held


def _chunks(sizes: Sequence[int], room: int) -> Iterator[slice]:
    """Cut a row of sizes into runs that fit into a room."""
    start = taken = 0
    for i, size in enumerate(sizes):
        if taken + size > room:
            yield slice(start, i)
            start, taken = i, 0
        taken += size
    yield slice(start, len(sizes))
