"""What is averaged, copied, shared or left: one entry a unique tensor.

Tied tensors (one storage under several names, as in RTMDet's shared head) are
one entry with several labels, so that they are averaged, swapped and saved
once. Identity is the memory, not the Python object: two parameters that view
the same bytes are tied too, also where one is a transpose of the other.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Role(enum.Enum):
    """What the averager does with a tensor."""

    AVERAGED = 'averaged'
    """Trainable parameters, and float buffers unless told otherwise."""
    COPIED = 'copied'
    """Integer and boolean buffers; float buffers that are not averaged; what
    holds NaN or Inf from the start, which no average can leave."""
    SHARED = 'shared'
    """Frozen parameters: average and raw are the same tensor."""


@dataclass(frozen=True)
class Label:
    """A name of an entry, with its view of the entry's memory.

    Attributes:
        name: Name in the model's ``state_dict``.
        saved: Whether it is in the ``state_dict`` at all.
        view: Size, stride and offset in the entry; None for the whole entry.
    """

    name: str
    saved: bool
    view: Optional[Tuple[torch.Size, Tuple[int, ...], int]] = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return what this name sees of an entry's tensor."""
        if self.view is None:
            return tensor
        size, stride, offset = self.view
        offset += int(tensor.storage_offset())
        return tensor.as_strided(size, stride, offset)

    def write(self, tensor: Tensor, value: Tensor) -> None:
        """Copy a value into what this name sees of an entry's tensor."""
        target = self.of(tensor)
        for dim, stride in enumerate(target.stride()):
            if stride == 0 and target.shape[dim] > 1:
                target = target.narrow(dim, 0, 1)
                value = value.narrow(dim, 0, 1)
        target.copy_(value)


@dataclass
class Entry:
    """A unique tensor of the model.

    Attributes:
        raw: The live tensor, as the module owns it (any shape and dtype).
        role: What is done with it.
        labels: Its names, in the order of the ``state_dict``.
        parameters: The parameters among its owners; empty for a buffer.
        gated: Whether NaN or Inf in it means a bad step: not for integers,
            nor for a buffer that held some from the start.
    """

    raw: Tensor
    role: Role
    labels: Tuple[Label, ...]
    parameters: Tuple[nn.Parameter, ...] = ()
    gated: bool = True

    @property
    def name(self) -> str:
        """First name, for messages."""
        return self.labels[0].name

    @property
    def parts(self) -> List[Tensor]:
        """What the names see; a flat entry may span memory of nobody."""
        if self.labels[0].view is None:
            return [self.raw]
        return [label.of(self.raw) for label in self.labels]


@dataclass(frozen=True)
class _Named:
    name: str
    tensor: Tensor
    saved: bool


def select(model: nn.Module, update_buffers: bool = True) -> List[Entry]:
    """List the unique tensors of a model with what is to be done with them.

    Buffers that the ``state_dict`` leaves out (``persistent=False``) are left
    alone: they are constants or can be computed anew. Float buffers that hold
    NaN or Inf from the start (attention masks) are copied, not averaged.

    Args:
        model: The model; nothing in it is changed or copied.
        update_buffers: Whether float buffers are averaged. Defaults to True.

    Returns:
        The entries, in the order of the ``state_dict``.

    Raises:
        ValueError: If a parameter has no shape yet (a lazy module).
    """
    named = _named_tensors(model)
    groups = _group_by_memory(named)
    return [_make_entry(group, update_buffers) for group in groups]


def _named_tensors(model: nn.Module) -> List[_Named]:
    """List saved tensors that the model owns, then its other parameters."""
    owned = {_memory(t) for t in (*model.parameters(), *model.buffers())}
    state = model.state_dict(keep_vars=True)
    named = [
        _Named(name, value, True)
        for name, value in state.items()
        if isinstance(value, Tensor) and _memory(value) in owned
    ]
    known = {id(item.tensor) for item in named}
    named += [
        _Named(name, parameter, False)
        for name, parameter in model.named_parameters()
        if id(parameter) not in known
    ]
    for item in named:
        _check_materialised(item)
    return named


def _memory(tensor: Tensor) -> object:
    """Return a key of the storage; extra state and copies have their own."""
    if is_lazy(tensor) or tensor.data_ptr() == 0:
        return id(tensor)
    return tensor.untyped_storage().data_ptr()


def _check_materialised(item: _Named) -> None:
    if is_lazy(item.tensor):
        raise ValueError(
            f'{item.name} has no shape yet (a lazy module); run one forward '
            f'pass before the average is made.'
        )


def _group_by_memory(named: List[_Named]) -> List[List[_Named]]:
    """Put names whose tensors share memory together, first name first."""
    position = {id(item): i for i, item in enumerate(named)}
    spaces: Dict[object, List[_Named]] = {}
    for item in named:
        spaces.setdefault(_address_space(item.tensor), []).append(item)
    groups = [
        group
        for items in spaces.values()
        for near in _overlapping(items)
        for group in _interleaved(near)
    ]
    for group in groups:
        group.sort(key=lambda item: position[id(item)])
    return sorted(groups, key=lambda group: position[id(group[0])])


def _address_space(tensor: Tensor) -> object:
    """Return a key; only tensors of the same key can share memory."""
    if tensor.numel() == 0 or tensor.data_ptr() == 0:
        return id(tensor)
    return tensor.device, tensor.dtype


def _overlapping(items: List[_Named]) -> Iterator[List[_Named]]:
    """Split tensors of one address space into groups that touch."""
    group: List[_Named] = []
    stop = 0
    for item in sorted(items, key=lambda item: _span(item.tensor)[0]):
        low, high = _span(item.tensor)
        if group and low >= stop:
            yield group
            group = []
        stop = max(stop, high) if group else high
        group.append(item)
    if group:
        yield group


def _interleaved(group: List[_Named]) -> List[List[_Named]]:
    """Tell apart tensors whose spans meet but that share no element.

    The columns of one matrix do so.
    """
    distinct = {_geometry(item.tensor): item.tensor for item in group}
    if len(distinct) == 1:
        return [group]
    start = min(tensor.data_ptr() for tensor in distinct.values())
    stop = max(_span(tensor)[1] for tensor in distinct.values())
    size = group[0].tensor.element_size()
    seen = torch.zeros((stop - start) // size, dtype=torch.bool)
    for tensor in distinct.values():
        offset = (tensor.data_ptr() - start) // size
        view = seen.as_strided(tensor.shape, tensor.stride(), offset)
        if bool(view.any()):
            return [group]
        view.fill_(True)
    apart: Dict[object, List[_Named]] = {}
    for item in group:
        apart.setdefault(_geometry(item.tensor), []).append(item)
    return list(apart.values())


def _span(tensor: Tensor) -> Tuple[int, int]:
    """Return the address range of a tensor in bytes, end excluded."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start + 1
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    return start, start + (last + 1) * tensor.element_size()


def _make_entry(group: List[_Named], update_buffers: bool) -> Entry:
    geometries = {_geometry(item.tensor) for item in group}
    if len(geometries) == 1 and not _overlaps_itself(group[0].tensor):
        raw = _preferred(group)
        labels = tuple(Label(item.name, item.saved) for item in group)
    else:
        raw, labels = _flatten(group)
    parameters = {id(t): t for t in (item.tensor for item in group)}
    owners = tuple(
        t for t in parameters.values() if isinstance(t, nn.Parameter)
    )
    if owners and not any(owner.requires_grad for owner in owners):
        return Entry(raw, Role.SHARED, labels, owners)
    floating = raw.is_floating_point() or raw.is_complex()
    finite = floating and all(
        bool(torch.isfinite(label.of(raw.detach())).all()) for label in labels
    )
    averaged = finite and (bool(owners) or update_buffers)
    role = Role.AVERAGED if averaged else Role.COPIED
    return Entry(raw, role, labels, owners, finite)


def _geometry(tensor: Tensor) -> object:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _overlaps_itself(tensor: Tensor) -> bool:
    start, stop = _span(tensor)
    return tensor.numel() > (stop - start) // tensor.element_size()


def _preferred(group: List[_Named]) -> Tensor:
    """Return the trainable owner if there is one: it follows ``.data``."""
    return next(
        (item.tensor for item in group if item.tensor.requires_grad),
        group[0].tensor,
    )


def _flatten(group: List[_Named]) -> Tuple[Tensor, Tuple[Label, ...]]:
    """Cover different views of one memory by one flat tensor."""
    base = min((item.tensor for item in group), key=lambda t: t.data_ptr())
    start, size = base.data_ptr(), base.element_size()
    stop = max(_span(item.tensor)[1] for item in group)
    flat = base.detach().as_strided(((stop - start) // size,), (1,))
    labels = []
    for item in group:
        offset = (item.tensor.data_ptr() - start) // size
        view = (item.tensor.shape, item.tensor.stride(), offset)
        labels.append(Label(item.name, item.saved, view))
    return flat, tuple(labels)
