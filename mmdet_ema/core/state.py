"""Read saved state that may be anything: it came from a file."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional

from torch import Tensor

from mmdet_ema.core.errors import CheckpointError


def read_count(
    state: Mapping[str, Any], key: str, default: Optional[int] = None
) -> int:
    """Return a counter of a saved state.

    Args:
        state: The state.
        key: Name of the counter.
        default: Value where it is left out; None if it must be there.

    Returns:
        The counter.

    Raises:
        CheckpointError: If it is missing, or no whole number from 0 on.
    """
    value = state.get(key, default)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 0:
        raise CheckpointError(
            f'{key}={value!r} in the saved state is no number of steps; the '
            f'state is damaged, or not one of an average.'
        )
    return int(value)


def read_tensors(state: Mapping[str, Any], key: str) -> Dict[str, Tensor]:
    """Return the tensors of a saved state by name.

    Args:
        state: The state.
        key: Where they are in it.

    Returns:
        The tensors.

    Raises:
        CheckpointError: If there is no dict of tensors.
    """
    tensors = state.get(key)
    if not isinstance(tensors, Mapping) or not all(
        isinstance(tensor, Tensor) for tensor in tensors.values()
    ):
        raise CheckpointError(
            f'the saved state has no tensors by name under {key!r}; it is '
            f'damaged, or not the state of an average.'
        )
    return dict(tensors)
