"""Put averages into the model and take them out again, bit for bit."""

from __future__ import annotations

import contextlib
from typing import Dict, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from mmdet_ema.averaging.tensors import Entry
from mmdet_ema.averaging.update import copy_all

_Trade = Tuple[List[Tensor], List[Tensor], List[Tensor]]
# elements of the scratch: small tensors are swapped together
_SCRATCH = 2**20


class Swap:
    """Swaps averages and raw tensors in place.

    Where dtype is the same the two trade places, some tensors at a time, so no
    second copy of the model is needed. A raw tensor of lower precision cannot
    hold its float32 average: there the raw values are set aside until then.
    All memory is taken before anything is changed, and kept for the way back.
    Nothing may interrupt a swap half-way.

    Args:
        entries: The entries of the model.
        averages: The averages, by the number of their entry.
    """

    def __init__(self, entries: Sequence[Entry], averages: Dict[int, Tensor]):
        self._entries, self._averages = entries, averages
        self._trades: List[_Trade] = []
        self._aside: Dict[int, Tensor] = {}
        self.swapped = False

    @torch.no_grad()
    def swap_in(self) -> None:
        """Put the averages where the model sees them."""
        assert not self.swapped
        same: List[int] = []
        narrow: List[int] = []
        for i, average in self._averages.items():
            alike = average.dtype == self._entries[i].raw.dtype
            (same if alike else narrow).append(i)
        aside = {i: self._entries[i].raw.detach().clone() for i in narrow}
        self._trades = list(self._plan_trades(same))
        self._trade()
        for i in narrow:
            self._entries[i].raw.data.copy_(self._averages[i])
        self._aside, self.swapped = aside, True

    @torch.no_grad()
    def swap_out(self) -> None:
        """Put the raw values back."""
        assert self.swapped
        self._trade()
        for i, raw in self._aside.items():
            self._entries[i].raw.data.copy_(raw)
        self._aside, self._trades, self.swapped = {}, [], False

    def average(self, i: int) -> Tensor:
        """Return the tensor that holds the average of an entry now."""
        traded = self.swapped and i not in self._aside
        if traded or i not in self._averages:
            return self._entries[i].raw.detach()
        return self._averages[i]

    def raw(self, i: int) -> Tensor:
        """Return the tensor that holds the raw values of an entry now."""
        if not self.swapped or i not in self._averages:
            return self._entries[i].raw.detach()
        return self._aside.get(i, self._averages[i])

    def _trade(self) -> None:
        for averages, raws, held in self._trades:
            # .data: an evaluation between forward and backward pass does not
            # count as a change of what autograd has saved
            live = [raw.data for raw in raws]
            copy_all(held, averages)
            copy_all(averages, live)
            copy_all(live, held)

    def _plan_trades(self, indices: Sequence[int]) -> Iterator[_Trade]:
        """Split entries into trades that share a scratch; allocate all."""
        kinds: Dict[object, List[int]] = {}
        for i in indices:
            average, raw = self._averages[i], self._entries[i].raw
            key = average.device, raw.device, raw.dtype
            if raw.numel():
                kinds.setdefault(key, []).append(i)
        for kind in kinds.values():
            averages = [self._averages[i] for i in kind]
            raws = [self._entries[i].raw for i in kind]
            sizes = [average.numel() for average in averages]
            room = max(max(sizes), min(sum(sizes), _SCRATCH))
            scratch = torch.empty(
                room, device=averages[0].device, dtype=averages[0].dtype
            )
            for run in _runs(sizes, room):
                parts = torch.split(scratch[: sum(sizes[run])], sizes[run])
                held = [p.view(a.shape) for p, a in zip(parts, averages[run])]
                yield averages[run], raws[run], held


@contextlib.contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Run the body while no module holds what it made of other weights.

    Some merge weights as they go into evaluation mode (LoRA), or keep what
    they compute of them, and take that back as they leave it: with the weights
    that are there then. These have to be the same, so such modules leave it
    before a swap and come back after.
    """
    with same_modes(model) as modes:
        for module in [x for x, trains in modes.items() if not trains]:
            # one that refuses has nothing to take back
            with contextlib.suppress(Exception):
                _change(module, True)
        yield


@contextlib.contextmanager
def same_modes(model: nn.Module) -> Iterator[Dict[nn.Module, bool]]:
    """Run the body; each module is then in the mode in which it was."""
    modes = {
        module: module.training
        for module in model.modules()
        # one that TorchScript has frozen has none
        if hasattr(module, 'training')
    }
    try:
        yield modes
    finally:
        # a parent takes its children along: these come after it
        for module, trains in modes.items():
            _change(module, trains)
        for module, trains in modes.items():
            if module.training != trains:
                module.training = trains


def _change(module: nn.Module, trains: bool) -> None:
    """Change the mode of a module that does something as it changes."""
    if module.training == trains or not _acts(module):
        return
    if trains:
        module.train(True)  # not each has a default
    else:
        module.eval()


def _acts(module: nn.Module) -> bool:
    """Return whether a module does something as it changes its mode."""
    kind = type(module)
    return kind.train is not nn.Module.train or kind.eval is not nn.Module.eval


def _runs(sizes: Sequence[int], room: int) -> Iterator[slice]:
    """Cut a row of sizes into runs that fit into a room."""
    start = taken = 0
    for i, size in enumerate(sizes):
        if taken + size > room:
            yield slice(start, i)
            start, taken = i, 0
        taken += size
    yield slice(start, len(sizes))
