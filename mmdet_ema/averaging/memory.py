"""Which tensors share memory: by address, not by Python object or name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Iterator, List, Tuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class NamedTensor:
    """A tensor under one of its names.

    Attributes:
        name: Name in the model's ``state_dict``.
        tensor: The tensor, as the module owns it.
        saved: Whether the name is in the ``state_dict`` at all.
    """

    name: str
    tensor: Tensor
    saved: bool


def group_by_memory(named: List[NamedTensor]) -> List[List[NamedTensor]]:
    """Put names whose tensors share memory together, first name first.

    Args:
        named: Tensors by name.

    Returns:
        Groups in the order of their first names; the tensors of a group
        overlap, those of two groups do not.
    """
    position = {id(item): i for i, item in enumerate(named)}
    spaces: Dict[object, List[NamedTensor]] = {}
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


def _overlapping(items: List[NamedTensor]) -> Iterator[List[NamedTensor]]:
    """Split tensors of one address space into groups that touch."""
    group: List[NamedTensor] = []
    stop = 0
    for item in sorted(items, key=lambda item: span(item.tensor)[0]):
        low, high = span(item.tensor)
        if group and low >= stop:
            yield group
            group = []
        stop = max(stop, high) if group else high
        group.append(item)
    if group:
        yield group


def _interleaved(group: List[NamedTensor]) -> List[List[NamedTensor]]:
    """Tell apart tensors whose spans meet but that share no element.

    The columns of one matrix do so.
    """
    distinct = {geometry(item.tensor): item.tensor for item in group}
    if len(distinct) == 1:
        return [group]
    start = min(tensor.data_ptr() for tensor in distinct.values())
    stop = max(span(tensor)[1] for tensor in distinct.values())
    size = group[0].tensor.element_size()
    seen = torch.zeros((stop - start) // size, dtype=torch.bool)
    for tensor in distinct.values():
        offset = (tensor.data_ptr() - start) // size
        view = seen.as_strided(tensor.shape, tensor.stride(), offset)
        if bool(view.any()):
            return [group]
        view.fill_(True)
    apart: Dict[object, List[NamedTensor]] = {}
    for item in group:
        apart.setdefault(geometry(item.tensor), []).append(item)
    return list(apart.values())


def span(tensor: Tensor) -> Tuple[int, int]:
    """Return the address range of a tensor in bytes, end excluded.

    Args:
        tensor: A strided tensor.
    """
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start + 1
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    return start, start + (last + 1) * tensor.element_size()


def storage_key(tensor: Tensor) -> object:
    """Return a key of the storage that a tensor lives in.

    Args:
        tensor: Any tensor; one without storage is its own key.
    """
    if is_lazy(tensor) or tensor.data_ptr() == 0:
        return id(tensor)
    # torch before 2.0 has no untyped_storage()
    storage = getattr(tensor, 'untyped_storage', tensor.storage)()
    return storage.data_ptr()


def geometry(tensor: Tensor) -> object:
    """Return address, shape and strides: equal ones are one tensor.

    Args:
        tensor: A strided tensor.
    """
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether elements of a tensor share memory (``expand``).

    Args:
        tensor: A strided tensor.
    """
    start, stop = span(tensor)
    return tensor.numel() > (stop - start) // tensor.element_size()


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor fills its memory, each element once.

    Args:
        tensor: A strided tensor.
    """
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def is_alike(average: Tensor, raw: Tensor) -> bool:
    """Return whether two tensors have one dtype and lie in memory alike.

    That is: in the same order, densely.

    Args:
        average: A strided tensor.
        raw: Another one.
    """
    return (
        average.dtype == raw.dtype
        and average.device == raw.device
        and average.shape == raw.shape
        and average.stride() == raw.stride()
        and is_dense(raw)
    )
