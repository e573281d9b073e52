"""What is averaged, copied, shared or left: one entry a unique tensor.

Tied tensors (one storage under several names, as in RTMDet's shared head) are
one entry with several labels, so that they are averaged, swapped and saved
once. Identity is the memory, not the Python object: two parameters that view
the same bytes are tied too, also where one is a transpose of the other.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import List, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mmdet_ema.core.memory import (
    NamedTensor,
    geometry,
    group_by_memory,
    overlaps_itself,
    span,
    storage_key,
)


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
        return self.parts_of(self.raw)

    def parts_of(self, tensor: Tensor) -> List[Tensor]:
        """Return what the names see of a tensor of the entry's shape."""
        if self.labels[0].view is None:
            return [tensor]
        return [label.of(tensor) for label in self.labels]


def select(
    model: nn.Module,
    update_buffers: bool = True,
    known: Optional[Mapping[str, bool]] = None,
) -> List[Entry]:
    """List the unique tensors of a model with what is to be done with them.

    Buffers that the ``state_dict`` leaves out (``persistent=False``) are left
    alone: they are constants or can be computed anew. What holds NaN or Inf
    from the start (attention masks) is copied, not averaged.

    Args:
        model: The model; nothing in it is changed or copied.
        update_buffers: Whether float buffers are averaged. Defaults to True.
        known: Whether a tensor was finite at the start, by name, where that
            is known from then; the others are looked at now.

    Returns:
        The entries, in the order of the ``state_dict``.

    Raises:
        ValueError: If a parameter has no shape yet (a lazy module).
    """
    groups = group_by_memory(_named_tensors(model))
    return [_make_entry(g, update_buffers, known or {}) for g in groups]


def _named_tensors(model: nn.Module) -> List[NamedTensor]:
    """List saved tensors that the model owns, then its other parameters."""
    owned = {storage_key(t) for t in (*model.parameters(), *model.buffers())}
    state = model.state_dict(keep_vars=True)
    named = [
        NamedTensor(name, value, True)
        for name, value in state.items()
        if isinstance(value, Tensor) and storage_key(value) in owned
    ]
    known = {id(item.tensor) for item in named}
    named += [
        NamedTensor(name, parameter, False)
        for name, parameter in model.named_parameters()
        if id(parameter) not in known
    ]
    for item in named:
        _check_materialised(item)
    return named


def _check_materialised(item: NamedTensor) -> None:
    if is_lazy(item.tensor):
        raise ValueError(
            f'{item.name} has no shape yet (a lazy module); run one forward '
            f'pass before the average is made.'
        )


def _make_entry(
    group: List[NamedTensor], update_buffers: bool, known: Mapping[str, bool]
) -> Entry:
    raw, labels = _cover(group)
    owners = tuple(
        {
            id(item.tensor): item.tensor
            for item in group
            if isinstance(item.tensor, nn.Parameter)
        }.values()
    )
    if owners and not any(owner.requires_grad for owner in owners):
        return Entry(raw, Role.SHARED, labels, owners)
    finite = known.get(labels[0].name)
    finite = _is_finite(raw, labels) if finite is None else finite
    averaged = finite and (bool(owners) or update_buffers)
    role = Role.AVERAGED if averaged else Role.COPIED
    return Entry(raw, role, labels, owners, finite)


def _is_finite(raw: Tensor, labels: Tuple[Label, ...]) -> bool:
    if not (raw.is_floating_point() or raw.is_complex()):
        return False
    views = (label.of(raw.detach()) for label in labels)
    return all(bool(torch.isfinite(view).all()) for view in views)


def _cover(group: List[NamedTensor]) -> Tuple[Tensor, Tuple[Label, ...]]:
    """Return one tensor for a group, and what each name sees of it."""
    first = group[0].tensor
    same = all(geometry(i.tensor) == geometry(first) for i in group)
    if not same or overlaps_itself(first):
        return _flatten(group)
    return _preferred(group), tuple(Label(i.name, i.saved) for i in group)


def _preferred(group: List[NamedTensor]) -> Tensor:
    """Return the trainable owner if there is one: it follows ``.data``."""
    return next(
        (item.tensor for item in group if item.tensor.requires_grad),
        group[0].tensor,
    )


def _flatten(group: List[NamedTensor]) -> Tuple[Tensor, Tuple[Label, ...]]:
    """Cover different views of one memory by one flat tensor."""
    base = min((item.tensor for item in group), key=lambda t: t.data_ptr())
    start, size = base.data_ptr(), base.element_size()
    stop = max(span(item.tensor)[1] for item in group)
    flat = base.detach().as_strided(((stop - start) // size,), (1,))
    labels = []
    for item in group:
        offset = (item.tensor.data_ptr() - start) // size
        view = (item.tensor.shape, item.tensor.stride(), offset)
        labels.append(Label(item.name, item.saved, view))
    return flat, tuple(labels)
