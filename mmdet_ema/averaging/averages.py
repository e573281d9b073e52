"""One set of averages: by name, loaded, and how far it is from the model."""

from __future__ import annotations

import math
from typing import (
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

import torch
from torch import Tensor, nn

from mmdet_ema.averaging import fsdp1
from mmdet_ema.averaging.model_changes import parametrized
from mmdet_ema.averaging.shards import Ranks, is_sharded, local_part
from mmdet_ema.averaging.state import check_fit
from mmdet_ema.averaging.swap import Swap
from mmdet_ema.averaging.tensors import (
    Entry,
    Role,
    average_dtype,
    is_finite,
    is_same,
    values_of,
)
from mmdet_ema.averaging.update import all_finite

MAIN = 'ema'
"""Name of the main averages."""
POSTHOC = 'posthoc'
"""Name of the average that other windows are made of after the training."""
# elements: a difference is still in the core's cache when it is squared
_CHUNK = 2**16


class Averages:
    """The averages of a model's tensors that can change.

    Args:
        entries: The entries of the model.
        device: Where the averages live; None for where the tensors are.

    Attributes:
        tensors: The averages, by the number of their entry.
        swap: Puts them into the model.
    """

    def __init__(self, entries: List[Entry], device: Optional[torch.device]):
        self._entries, self._device = entries, device
        self.tensors: Dict[int, Tensor] = {}
        self.swap = Swap(entries, self.tensors)
        self.complete()

    def complete(self) -> None:
        """Start the averages that are missing, or of the wrong kind."""
        for i, entry in enumerate(self._entries):
            dtype = entry.raw.dtype
            if entry.role is Role.AVERAGED:
                dtype = average_dtype(dtype)
            here = self.tensors.get(i)
            if entry.role is Role.SHARED or (
                here is not None and here.dtype == dtype
            ):
                continue
            raw = entry.stepped.detach()
            # what is made in inference mode cannot be written outside of it
            with torch.inference_mode(False):
                average = raw.to(device=self._device, dtype=dtype, copy=True)
                if raw.is_cuda and not average.is_cuda:
                    average = average.pin_memory()
            self.tensors[i] = average

    def named(
        self,
        value_of: Optional[Callable[[int], Tensor]] = None,
        stored: bool = False,
        saved: bool = True,
    ) -> Iterator[Tuple[str, Tensor]]:
        """Yield names with the value of their entry, sharded as the entry.

        Args:
            value_of: The value by the number of the entry; None for its
                average.
            stored: Whether to leave out what has no average of its own.
            saved: Whether to leave out names that no ``state_dict`` has.
        """
        value_of = value_of or self.swap.average
        for i, entry in enumerate(self._entries):
            if not stored or i in self.tensors:
                value = entry.as_in_model(value_of(i))
                for name in entry.saved if saved else entry.names:
                    yield name, value

    def owned(self) -> Iterator[Tuple[str, Tensor]]:
        """Yield names of the ``state_dict`` with what the model owns."""
        for entry in self._entries:
            for name in entry.saved:
                yield name, entry.as_in_model(entry.raw)

    @torch.no_grad()
    def load(
        self,
        averages: Mapping[str, Tensor],
        strict: bool,
        update_buffers: bool,
        ranks: Optional[Ranks] = None,
    ) -> None:
        """Copy averages in by name; nothing changes if one does not fit.

        An average that is missing, or holds NaN or Inf where the model's
        tensor holds none, starts again from that tensor. Where only the
        model's does, the average goes on.

        Args:
            averages: Averages by name, sharded ones whole or as the model's.
            strict: Whether a missing name is an error.
            update_buffers: Whether float buffers are averaged.
            ranks: The ranks that share tensors. Defaults to none.

        Raises:
            CheckpointError: If a shape differs or a name is missing.
        """
        check_fit(dict(self.owned()), averages, strict)
        floats = [
            tensor
            for tensor in map(values_of, map(local_part, averages.values()))
            if tensor.is_floating_point() or tensor.is_complex()
        ]
        all_are_finite = all_finite(floats)
        given: Dict[int, List[Tensor]] = {}
        for i, entry in enumerate(self._entries):
            new = [averages[name] for name in entry.names if name in averages]
            if new:
                given[i] = new
        for i in self._trained_before(given, ranks):
            # frozen after it was trained: its average is another tensor
            entry = self._entries[i]
            entry.role = Role.AVERAGED if entry.has_mean else Role.COPIED
        loaded: Dict[int, Tensor] = {}
        for i, new in given.items():
            entry = self._entries[i]
            finite = all_are_finite or all(
                is_finite(local_part(tensor)) for tensor in new
            )
            if finite and entry.holds_nonfinite:
                entry.has_mean, entry.holds_nonfinite = True, False
                if entry.parameters or update_buffers:
                    entry.role = Role.AVERAGED
            if finite or not entry.has_mean:
                loaded[i] = entry.part_of(new[-1])
        self.complete()
        for i, average in self.tensors.items():
            average.copy_(loaded.get(i, self._entries[i].stepped.detach()))

    def carry_over(
        self,
        before: Averages,
        model: nn.Module,
        update_buffers: bool,
        stored: bool,
    ) -> None:
        """Go on with the averages of a model that was selected again.

        Args:
            before: Those from before.
            model: The model. A tensor that is the same object may have
                another name in it, as those that are pruned do, and another
                object the same name.
            update_buffers: Whether float buffers are averaged.
            stored: Whether to leave out what had no average of its own.
        """
        # names that no file holds, too
        old = dict(before.named(saved=False, stored=stored))
        same = {
            id(before._entries[i].raw): before._entries[i].as_in_model(average)
            for i, average in before.tensors.items()
        }
        for entry in self._entries:
            if id(entry.raw) in same:
                old.update((name, same[id(entry.raw)]) for name in entry.names)
        old.update(parametrized(model, old))
        now = dict(self.named(saved=False))
        kept = {
            name: average
            for name, average in old.items()
            if name in now and now[name].shape == average.shape
        }
        self.load(kept, False, update_buffers)

    def _trained_before(
        self, given: Mapping[int, Sequence[Tensor]], ranks: Optional[Ranks]
    ) -> List[int]:
        """Return the frozen entries whose given average is not what they hold.

        Of parts all ranks have to say the same, as no rank sees a whole.
        """
        frozen = [
            i
            for i in given
            if self._entries[i].role is Role.SHARED
            and self._entries[i].parameters
        ]
        differ = [
            # what is carried over as a part is an average of its own
            is_sharded(given[i][-1])
            or not is_same(
                self._entries[i].raw.detach(),
                self._entries[i].part_of(given[i][-1]),
            )
            for i in frozen
        ]
        whole = not any(is_sharded(given[i][-1]) for i in frozen)
        if ranks is not None and frozen and whole:
            flags = ranks.maximum(torch.tensor(differ, dtype=torch.float32))
            differ = [bool(flag) for flag in flags.tolist()]
        return [i for i, differs in zip(frozen, differ) if differs]

    @torch.no_grad()
    def distance(self, ranks: Optional[Ranks] = None) -> float:
        """Return ``||average - raw|| / ||raw||`` over trained parameters.

        In the L2 norm; 0 where there are none, or they are zero. Where ranks
        share tensors they all call it.
        """
        gap, size = self._squares(sharded=False)
        if ranks is not None:
            here = ranks.add_up(self._squares(sharded=True))
            gap, size = gap + here[0], size + here[1]
        return math.sqrt(gap / size) if size else 0.0

    def _squares(self, sharded: bool) -> Tuple[float, float]:
        gaps: List[Tensor] = []
        sizes: List[Tensor] = []
        for i in self.tensors:
            entry = self._entries[i]
            if entry.parameters and entry.is_part == sharded:
                average = self.swap.average(i).reshape(-1)
                raw = self.swap.raw(i).reshape(-1).to(average.device)
                step = max(raw.numel(), 1) if raw.is_cuda else _CHUNK
                pieces = (torch.split(x, step) for x in (average, raw))
                for left, right in zip(*pieces):
                    right = right.to(left.dtype)
                    gaps.append(_squares(left - right))
                    sizes.append(_squares(right))
        return _total(gaps), _total(sizes)


def join_pieces(
    model: nn.Module,
    entries: Sequence[Entry],
    value_of: Callable[[int], Tensor],
    stored: bool = False,
) -> Dict[str, Tensor]:
    """Return whole values by name, on rank 0, of what FSDP1 has cut.

    All ranks call it; the arguments are those of :meth:`Averages.named`.
    """
    held = _writable(entries)
    found = fsdp1.whole(
        model, [entries[i].raw for i in held], [value_of(i) for i in held]
    )
    for i, entry in enumerate(entries):
        names = [name for name in entry.names if name in found]
        if stored and entry.role is Role.SHARED:
            for name in names:
                del found[name]
        elif not entry.parameters:  # nobody has gathered it
            found.update((name, value_of(i)) for name in names)
        elif len(entry.saved) > 1:
            found.update((name, found[names[0]]) for name in names)
    return found


def cut_into_pieces(
    model: nn.Module, entries: Sequence[Entry], given: Mapping[str, Tensor]
) -> Dict[str, Tensor]:
    """Return what FSDP1 lets this rank hold of whole tensors, by name."""
    held = [entries[i] for i in _writable(entries)]
    pieces = fsdp1.cut(model, [entry.raw for entry in held], given)
    pairs = zip(held, pieces)
    return {name: piece for entry, piece in pairs for name in entry.saved}


def _writable(entries: Sequence[Entry]) -> List[int]:
    """Return the entries that hold whatever is written into them."""
    return [
        i
        for i, entry in enumerate(entries)
        if entry.parameters or entry.role is not Role.SHARED
    ]


def _squares(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).reshape(-1)
    return torch.dot(tensor, tensor).double()


def _total(sums: List[Tensor]) -> float:
    """Add scalars up; wait for each device once."""
    devices = {item.device for item in sums}
    rows = [torch.stack([n for n in sums if n.device == d]) for d in devices]
    return sum(float(row.sum()) for row in rows)
