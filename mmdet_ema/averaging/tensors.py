"""What is averaged, copied, shared or left: one entry a unique tensor.

Tied tensors (one storage under several names, as in RTMDet's shared head) are
one entry with several labels, so that they are averaged, swapped and saved
once. Identity is the memory, not the Python object: two parameters that view
the same bytes are tied too, also where one is a transpose of the other.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Iterator, List, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mmdet_ema.averaging.memory import (
    NamedTensor,
    geometry,
    group_by_memory,
    overlaps_itself,
    span,
    storage_key,
)

# Modules whose buffers no mean makes sense of, by name: torch moves them from
# package to package, and torchao has classes of its own.
_COPIED_MODULES = {
    'ObserverBase',  # quantization-aware training: ranges, histograms
    'FakeQuantizeBase',  # and scales
    '_SpectralNorm',  # vectors of length one
    '_Orthogonal',  # an orthogonal matrix
    'FakeSparsity',  # masks
    'FakeStructuredSparsity',
}
# The same for what older functions of torch.nn.utils hook into a module: the
# attribute that holds the name of the weight, endings of its buffers.
_COPIED_HOOKS = {
    'SpectralNorm': ('name', ('_u', '_v')),
    'BasePruningMethod': ('_tensor_name', ('_mask',)),
}


class Role(enum.Enum):
    """What the averager does with a tensor."""

    AVERAGED = 'averaged'
    """Trainable parameters, and float buffers unless told otherwise."""
    COPIED = 'copied'
    """Integer and boolean buffers; float buffers that are not averaged; what
    has no mean, see :attr:`Entry.has_mean`."""
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
        has_mean: Whether a mean of its values makes sense: not for integers,
            nor where NaN or Inf belongs in it, as in attention masks, nor for
            unit vectors, masks and the like.
        holds_nonfinite: Whether it has no mean because it held NaN or Inf when
            it was selected.
    """

    raw: Tensor
    role: Role
    labels: Tuple[Label, ...]
    parameters: Tuple[nn.Parameter, ...] = ()
    has_mean: bool = True
    holds_nonfinite: bool = False

    @property
    def gated(self) -> bool:
        """Whether NaN or Inf in it means a bad step: not for a buffer."""
        return bool(self.parameters) and self.role is Role.AVERAGED

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
    copied: Sequence[str] = (),
) -> List[Entry]:
    """List the unique tensors of a model with what is to be done with them.

    Buffers that the ``state_dict`` leaves out (``persistent=False``) are left
    alone: they are constants or can be computed again.

    Args:
        model: The model; nothing in it is changed or copied.
        update_buffers: Whether float buffers are averaged. Defaults to True.
        copied: Patterns of names that are copied, not averaged; ``*`` stands
            for any text. Defaults to ().

    Returns:
        The entries, in the order of the ``state_dict``.

    Raises:
        ValueError: If a parameter has no shape yet (a lazy module).
    """
    groups = group_by_memory(_named_tensors(model))
    meanless = set(map(id, _buffers_without_mean(model)))
    entries = []
    for group in groups:
        without_mean = any(
            id(item.tensor) in meanless or _matches(item.name, copied)
            for item in group
        )
        entries.append(_make_entry(group, update_buffers, not without_mean))
    return entries


def unmatched(entries: Sequence[Entry], copied: Sequence[str]) -> List[str]:
    """Return the patterns that match no name.

    Args:
        entries: The entries of a model.
        copied: Patterns of names.
    """
    names = [label.name for entry in entries for label in entry.labels]
    return [x for x in copied if not any(fnmatchcase(n, x) for n in names)]


def no_match(pattern: str) -> str:
    """Say that a pattern of ``copied`` matches nothing."""
    return (
        f'copied={[pattern]}: no parameter or buffer of the model has such a '
        f"name; give a name of its state_dict, '*' stands for any text."
    )


def is_finite(entry: Entry) -> bool:
    """Return whether a float tensor of a model holds neither NaN nor Inf."""
    parts = entry.parts_of(entry.raw.detach())
    return all(bool(torch.isfinite(part).all()) for part in parts)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _buffers_without_mean(model: nn.Module) -> Iterator[Optional[Tensor]]:
    for module in model.modules():
        if _COPIED_MODULES & _kinds(module):
            yield from module._buffers.values()
        for hook in module._forward_pre_hooks.values():
            for kind in _kinds(hook) & _COPIED_HOOKS.keys():
                attribute, endings = _COPIED_HOOKS[kind]
                weight = getattr(hook, attribute, None)
                for ending in endings:
                    yield module._buffers.get(f'{weight}{ending}')


def _kinds(thing: object) -> Set[str]:
    return {kind.__name__ for kind in type(thing).__mro__}


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
    group: List[NamedTensor], update_buffers: bool, has_mean: bool
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
    entry = Entry(raw, Role.COPIED, labels, owners, has_mean)
    if not (raw.is_floating_point() or raw.is_complex()):
        entry.has_mean = False
    elif has_mean:
        entry.holds_nonfinite = not is_finite(entry)
        entry.has_mean = not entry.holds_nonfinite
    if entry.has_mean and (owners or update_buffers):
        entry.role = Role.AVERAGED
    return entry


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
