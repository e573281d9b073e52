"""Read saved state that may be anything: it came from a file."""

from __future__ import annotations

from typing import Any, Dict, Mapping, NamedTuple, Optional

from torch import Tensor

from mmdet_ema.errors import CheckpointError, show

_LONGEST_INTERVAL = 100_000


class Progress(NamedTuple):
    """Counters of an average.

    Attributes:
        steps: Steps that were taken in.
        updates: Updates of the averages.
        skipped: Steps that were left out because of NaN or Inf.
        averaged: The step of the last update.
    """

    steps: int = 0
    updates: int = 0
    skipped: int = 0
    averaged: int = 0


def read_progress(state: Any) -> Progress:
    """Return the counters of a saved state.

    Args:
        state: The state; counters left out of it are derived.

    Returns:
        The counters.

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
        skipped=read_count(state, 'num_skipped', 0),
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

    Returns:
        The counter.

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
            f'damaged, or not what WeightAverager.state_dict() gave.'
        )
    return dict(tensors)
