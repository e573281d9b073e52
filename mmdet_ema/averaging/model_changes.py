"""Notice what becomes of a model's tensors while it is trained.

In-place changes need no notice: an entry holds the parameter itself. These do:
``module.weight = nn.Parameter(...)``, ``.to(device)``, ``parameter.data =``,
``load_state_dict(assign=True)``, ``self.buffer = self.buffer * 2``.
"""

from __future__ import annotations

import contextlib
import copy
from itertools import chain
from operator import attrgetter, is_
from typing import Any, Dict, Iterator, List, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from mmdet_ema.averaging import fsdp1
from mmdet_ema.averaging.shards import (
    local_part,
    recover,
    reshard,
    sharded_modules,
)
from mmdet_ema.averaging.tensors import Entry, Role, is_plain
from mmdet_ema.averaging.zero import forget_gathered, is_partitioned

_END = object()
_VALUES: Any = dict.values
_TRAINS = attrgetter('requires_grad')
_PART: Any = attrgetter('_local_tensor')


class ModelChanges:
    """Remembers the tensors of a model as they are when it is made.

    Args:
        model: The model to watch.
        entries: Its entries; :meth:`follow_buffers` changes their ``raw``.
    """

    def __init__(self, model: nn.Module, entries: Sequence[Entry]):
        self.model, self._entries = model, entries
        self._wrapped = sharded_modules(model)
        self.reshard()
        sharded = [e.sharded for e in entries if e.sharded is not None]
        self._sharded = [x for x in sharded if not is_partitioned(x)]
        self._parts = list(map(_PART, self._sharded))
        self._partitioned: List[Any] = list(filter(is_partitioned, sharded))
        self._places = self._list_places()
        # modules without any are left out: that halves the cost of a look
        self._owners: List[Dict[str, Any]] = [
            owner
            for module in model.modules()
            for owner in (module._modules, module._parameters, module._buffers)
            if owner and isinstance(owner, dict)
        ]
        self._members = list(self._list_members())
        self._labels = _labels(model)
        self._frozen = [
            parameter
            for entry in entries
            if entry.role is Role.SHARED
            and not any(map(_TRAINS, entry.parameters))
            for parameter in entry.parameters
        ]
        self._frozen_addresses = _addresses(self._frozen)
        self._remember_layout()

    def reshard(self) -> None:
        """Let a sharded model forget what a forward pass gathered."""
        reshard(self._wrapped)

    def recover(self) -> None:
        """Do so where that pass may have failed half-way."""
        if not self._wrapped:
            return
        for module in filter(fsdp1.is_fsdp1, self._wrapped):
            fsdp1.end_forward(module)
        self.reshard()
        if not all(map(is_, self._list_members(), self._members)):
            recover(self._wrapped)

    def forget_gathered(self) -> None:
        """Let a model under ZeRO-3 forget the whole weights that it holds.

        Before a swap of the parts: else it would go on with those.
        """
        if self._partitioned:
            forget_gathered(self._partitioned)

    def noticed(self) -> bool:
        """Return whether something has changed; cheap enough for each step.

        A module, parameter or buffer is another object, one was added next to
        others or taken away; a tensor lies elsewhere, or has another shape
        (multi-tensor calls would broadcast what does not fit); a frozen
        parameter trains.
        """
        if self._wrapped:
            self.reshard()
        # map() over methods of the class: half the time of a comprehension
        return (
            not all(map(is_, self._list_members(), self._members))
            or list(map(Tensor.data_ptr, self._raws)) != self._addresses
            or list(map(Tensor.size, self._raws)) != self._shapes
            or list(map(Tensor.stride, self._strided)) != self._strides
            or self._parts_moved()
            or self.has_thawed()
        )

    def has_thawed(self) -> bool:
        """Return whether a parameter that was frozen is trainable now."""
        return any(map(_TRAINS, self._frozen))

    def follow_memory(self) -> bool:
        """Go on with tensors whose ``.data`` was replaced by the same kind.

        Returns:
            False if more than that has happened: the model has to be
            selected again.

        Raises:
            RuntimeError: If a parameter has another shape now, or its memory
                was freed.
        """
        if self._parts_moved():
            return False
        for i, entry in enumerate(self._watched):
            raw, shape = entry.raw, self._shapes[i]
            moved = raw.data_ptr() != self._addresses[i]
            if raw.shape != shape and entry.parameters:
                raise RuntimeError(
                    f'{entry.name}, a tensor of shape {tuple(shape)} in the '
                    f'model, has become one of shape {tuple(raw.shape)}, '
                    'which its average cannot follow: give it back its shape, '
                    'or call refresh() (the hook does so before each epoch): '
                    'the average starts again from the new values'
                )
            if raw.numel() and not raw.data_ptr() and not raw.is_meta:
                raise RuntimeError(
                    f'{entry.name}, a tensor of shape {tuple(raw.shape)} in '
                    'the model, has lost its memory (FSDP frees that of '
                    'weights which it has sharded): it cannot be averaged'
                )
            # tied parameters that moved may have been parted
            parted = moved and len(entry.parameters) > 1
            if raw.shape != shape or _kind(raw) != self._kinds[i] or parted:
                return False
        self._remember_layout()
        # some may have come to share memory
        apart = [x for x in self._addresses if x]
        return len(set(apart)) == len(apart)

    def follow_buffers(self) -> bool:
        """Go on with buffers that became other tensors of the same kind.

        Some models do so in every forward pass; selecting them again would
        cost more than the update.

        Returns:
            False if more than that has happened.
        """
        found = list(self._list_members())
        if len(found) != len(self._members):
            return False
        if all(map(is_, found, self._members)):
            return True
        entries = {id(entry.raw): entry for entry in self._watched}
        unsaved = {
            id(module._buffers.get(name))
            for module in self.model.modules()
            for name in module._non_persistent_buffers_set
        }
        pairs = []
        for old, new in zip(self._members, found):
            if old is new:
                continue
            entry = entries.get(id(old))
            if entry is None and id(new) in unsaved:
                continue
            if (
                entry is None
                or not (_is_buffer(old) and _is_buffer(new))
                or len(entry.names) > 1
                or (old.shape, _kind(old)) != (new.shape, _kind(new))
                or new._base is not None
            ):
                return False
            pairs.append((entry, new))
        for entry, new in pairs:
            entry.raw = new
        self._members = found
        self._remember_layout()
        return True

    def any(self) -> bool:
        """Return whether anything has changed that was not followed yet.

        Also what :meth:`noticed` is too quick to see.
        """
        return (
            self.noticed()
            or _labels(self.model) != self._labels
            or _addresses(self._frozen) != self._frozen_addresses
            or any(  # tied parameters were parted by ``.data``
                local_part(p).data_ptr() != entry.raw.data_ptr()
                for entry in self._watched
                for p in entry.parameters
            )
        )

    def _parts_moved(self) -> bool:
        return (
            not all(map(is_, map(_PART, self._sharded), self._parts))
            or self._list_places() != self._places
        )

    def _list_places(self) -> List[int]:
        return [x.ds_tensor.data_ptr() for x in self._partitioned]

    def _list_members(self) -> Iterator[Any]:
        # no loop of Python's: there are hundreds; the sentinel at the end lets
        # lists of different lengths differ
        members = chain.from_iterable(map(_VALUES, self._owners))
        return chain(members, (_END,))

    def _remember_layout(self) -> None:
        self._watched = [
            entry
            for entry in self._entries
            if entry.role is not Role.SHARED
            and (entry.raw.numel() or not entry.parameters)
        ]
        self._raws = [entry.raw for entry in self._watched]
        self._kinds = [_kind(raw) for raw in self._raws]
        # kernels that read memory as it lies are used on a GPU alone
        self._strided = [raw for raw in self._raws if raw.is_cuda]
        self._addresses = list(map(Tensor.data_ptr, self._raws))
        self._shapes = list(map(Tensor.size, self._raws))
        self._strides = list(map(Tensor.stride, self._strided))


@torch.no_grad()
def parametrized(
    model: nn.Module, averages: Mapping[str, Tensor]
) -> Dict[str, Tensor]:
    """Turn averages of plain tensors into those of what now computes them.

    Args:
        model: The model, with parametrizations.
        averages: Averages by name, from before they were put on.

    Returns:
        Averages by new name; tensors that were parametrized before, or cannot
        be taken back, are left out.
    """
    found: Dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, ParametrizationList):
            continue
        owner, _, weight = name.rpartition('parametrizations.')
        average = averages.get(f'{owner}{weight}')
        if average is None:
            continue
        value = average.clone()
        # a copy: some keep what they were last given
        for step in reversed(list(copy.deepcopy(module))):
            inverse: Any = getattr(step, 'right_inverse', None)
            # so does torch
            with contextlib.suppress(NotImplementedError):
                value = inverse(value) if inverse else value
        if isinstance(value, Tensor):
            found[f'{name}.original'] = value
        else:
            for i, part in enumerate(value):
                found[f'{name}.original{i}'] = part
    return found


def _labels(model: nn.Module) -> List[object]:
    """Return where the model has which kind of tensor."""
    return [
        (path, name, None if tensor is None else (_kind(tensor), shape))
        for path, module in model.named_modules()
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
        # under ZeRO-3 a tensor is whole or empty, as it happens
        for shape in [getattr(tensor, 'ds_shape', getattr(tensor, 'shape', 0))]
    ]


def _addresses(parameters: Sequence[Tensor]) -> List[int]:
    parts = map(local_part, parameters)
    return [part.data_ptr() if is_plain(part) else 0 for part in parts]


def _is_buffer(member: object) -> bool:
    return isinstance(member, Tensor) and not isinstance(member, nn.Parameter)


def _kind(tensor: Tensor) -> object:
    return tensor.device, tensor.dtype
