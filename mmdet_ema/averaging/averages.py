"""One set of averages: by name, what is saved of it, and its loading."""

from __future__ import annotations

import math
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch
from torch import Tensor

from mmdet_ema.averaging.shards import Ranks, is_sharded, local_part
from mmdet_ema.averaging.swap import Swap
from mmdet_ema.averaging.tensors import Entry, Role, average_dtype, is_finite
from mmdet_ema.averaging.update import all_finite
from mmdet_ema.errors import CheckpointError, show

MAIN = 'ema'
"""Name of the main averages."""
POSTHOC = 'posthoc'
"""Name of the average that other windows are made of after the training."""
_LONGEST_INTERVAL = 100_000
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
            for tensor in map(local_part, averages.values())
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
            or not _is_same(
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


def check_fit(
    present: Mapping[str, Tensor], given: Mapping[str, Tensor], strict: bool
) -> None:
    """Check that given tensors fit the present ones.

    Args:
        present: Tensors of the model by name.
        given: Tensors to be loaded by name.
        strict: Whether all names must be the same.

    Raises:
        CheckpointError: At the first shape that differs; under ``strict``
            also if a name is missing or unknown.
    """
    for name, tensor in given.items():
        if name in present and present[name].shape != tensor.shape:
            raise CheckpointError(
                f'the average of {name} has shape {tuple(tensor.shape)}, the '
                f'model needs {tuple(present[name].shape)}; it belongs to '
                f'another model.'
            )
    missing = [name for name in present if name not in given]
    unknown = [name for name in given if name not in present]
    if strict and (missing or unknown):
        raise CheckpointError(
            f'the averages do not fit the model: {_some(missing, "missing")}, '
            f'{_some(unknown, "unknown")}.'
        )


class Progress(NamedTuple):
    """Counters of one set of averages.

    Attributes:
        steps: Steps that were counted, without the skipped ones.
        updates: Updates of the averages.
        averaged: The step of the last update.
    """

    steps: int = 0
    updates: int = 0
    averaged: int = 0


def read_progress(state: Any) -> Progress:
    """Return the counters of a saved state, which may be anything.

    Args:
        state: The state; counters left out of it are derived.

    Raises:
        CheckpointError: If it is no such state.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f'{show(state)} is no state of an average.')
    steps = read_count(state, 'num_steps')
    averaged = read_count(state, 'averaged_steps', steps)
    if not 0 <= steps - averaged < _LONGEST_INTERVAL:
        averaged = steps
    return Progress(
        steps,
        updates=read_count(state, 'num_updates', steps),
        averaged=averaged,
    )


def read_count(
    state: Mapping[str, Any], key: str, default: Optional[int] = None
) -> int:
    """Return a counter of a saved state.

    Args:
        state: The state.
        key: Name of the counter.
        default: Value where it is left out; None if it must be there.

    Raises:
        CheckpointError: If it is missing, or no whole number from 0 on.
    """
    value = state.get(key, default)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.to_dense().item() if value.is_sparse else value.item()
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 0:
        raise CheckpointError(
            f'{key}={show(value)} in the saved state is no number of steps; '
            f'the state is damaged, or not what WeightAverager.state_dict() '
            f'gave.'
        )
    return int(value)


def read_tensors(state: Mapping[str, Any], key: str) -> Dict[str, Tensor]:
    """Return the tensors of a saved state by name.

    Args:
        state: The state.
        key: Where they are in it.

    Raises:
        CheckpointError: If there is no dict of tensors.
    """
    tensors = state.get(key)
    if not isinstance(tensors, Mapping) or not all(
        isinstance(tensor, Tensor) for tensor in tensors.values()
    ):
        raise CheckpointError(
            f'the saved state has no tensors by name under {key!r}; it is '
            f'damaged, or not what WeightAverager.state_dict() gave.'
        )
    return dict(tensors)


def own_memory(named: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Return tensors by name, with a copy of what is a part of a storage.

    A file would hold the whole of it, and safetensors refuses parts. Names
    of one tensor stay names of one.
    """
    own: Dict[int, Tensor] = {}
    for tensor in named.values():
        if id(tensor) not in own:
            own[id(tensor)] = tensor.clone() if is_part(tensor) else tensor
    return {name: own[id(tensor)] for name, tensor in named.items()}


def _is_same(raw: Tensor, average: Tensor) -> bool:
    average = average.to(raw)
    if raw.element_size() == 1:  # torch compares no 8-bit floats
        raw, average = raw.float(), average.float()
    return torch.allclose(raw, average, rtol=0, atol=0, equal_nan=True)


def is_part(tensor: Tensor) -> bool:
    """Return whether a tensor is a part of a larger storage."""
    # torch before 2.0 has no untyped_storage()
    storage = getattr(tensor, 'untyped_storage', tensor.storage)()
    return bool(storage.nbytes() > tensor.numel() * tensor.element_size())


def _some(names: Sequence[str], word: str) -> str:
    few = f' ({", ".join(names[:3])})' if names else ''
    return f'{len(names)} {word}{few}'


def _squares(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).reshape(-1)
    return torch.dot(tensor, tensor).double()


def _total(sums: List[Tensor]) -> float:
    """Add scalars up; wait for each device once."""
    devices = {item.device for item in sums}
    rows = [torch.stack([n for n in sums if n.device == d]) for d in devices]
    return sum(float(row.sum()) for row in rows)
