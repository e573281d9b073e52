"""Whether tensors fit a model, and what averages of it take."""

from __future__ import annotations

from collections import Counter
from typing import Dict, List, Mapping

import torch
from torch import Tensor

from mmdet_ema.averaging.kernels import average_dtype
from mmdet_ema.averaging.tensors import Entry, Role
from mmdet_ema.errors import CheckpointError


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


def _some(names: List[str], word: str) -> str:
    few = f' ({", ".join(names[:3])})' if names else ''
    return f'{len(names)} {word}{few}'


def count_roles(entries: List[Entry]) -> Dict[str, int]:
    """Count tensors a role and the bytes that their averages take.

    Args:
        entries: The entries of a model.

    Returns:
        Counts under 'averaged', 'copied', 'shared' and 'bytes'.
    """
    counts = Counter(entry.role.value for entry in entries)
    size = 0
    for entry in entries:
        if entry.role is not Role.SHARED:
            averaged = entry.role is Role.AVERAGED
            dtype = entry.raw.dtype
            dtype = average_dtype(dtype) if averaged else dtype
            width = torch.empty((), dtype=dtype).element_size()
            size += entry.raw.numel() * width
    return {**{role.value: counts[role.value] for role in Role}, 'bytes': size}
