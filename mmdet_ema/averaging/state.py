"""What is saved of averages: counters and tensors by name, checked."""

from __future__ import annotations

from typing import Any, Dict, Mapping, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from mmdet_ema.errors import CheckpointError, show

_LONGEST_INTERVAL = 100_000


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


def own_memory(
    named: Mapping[str, Tensor], copies: bool = False
) -> Dict[str, Tensor]:
    """Return tensors by name, with a copy of what is a part of a storage.

    A file would hold the whole of it, and safetensors refuses parts. Names
    of one tensor stay names of one. With ``copies`` all are copies.
    """
    own: Dict[int, Tensor] = {}
    for tensor in named.values():
        if id(tensor) not in own:
            own[id(tensor)] = (
                tensor.clone() if copies or is_part(tensor) else tensor
            )
    return {name: own[id(tensor)] for name, tensor in named.items()}


def is_part(tensor: Tensor) -> bool:
    """Return whether a tensor is a part of a larger storage."""
    if tensor.layout is not torch.strided:
        return False  # a sparse one has no storage
    # torch before 2.0 has no untyped_storage()
    storage = getattr(tensor, 'untyped_storage', tensor.storage)()
    return bool(storage.nbytes() > tensor.numel() * tensor.element_size())


def _some(names: Sequence[str], word: str) -> str:
    few = f' ({", ".join(names[:3])})' if names else ''
    return f'{len(names)} {word}{few}'
