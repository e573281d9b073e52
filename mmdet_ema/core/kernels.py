"""The update ``avg = d * avg + (1 - d) * raw`` over many tensors at once.

:class:`UpdatePlan` is the fast path: tensors are grouped once, and an update
is one or two multi-tensor calls a group. :func:`reference_update` is its plain
twin; ``tests/core/test_kernels.py`` steps both, for every dtype.
"""

from __future__ import annotations

from typing import Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor

# torch adds these to float32 without a converted copy, but no 8-bit floats
_PROMOTED = (torch.float16, torch.bfloat16)


def average_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a tensor of ``dtype`` is averaged.

    In half precision an average stands still: with 8 bits of mantissa
    ``avg + 2e-4 * (raw - avg)`` rounds back to ``avg``.

    Args:
        dtype: dtype of the raw tensor.

    Returns:
        float32 for float16, bfloat16 and 8-bit floats, else ``dtype``.
    """
    narrow = dtype.is_floating_point and torch.finfo(dtype).bits < 32
    return torch.float32 if narrow else dtype


def reference_update(average: Tensor, raw: Tensor, decay: float) -> None:
    """Update one average in place, the plain way.

    Args:
        average: The average, of any shape.
        raw: The new value, of the same shape.
        decay: Weight of the old average, in [0, 1].
    """
    average.lerp_(raw.to(average), 1 - decay)


Rule = Callable[[Tensor, Tensor, int], None]
"""Updates one average in place, given the raw tensor and the step n."""


class UpdatePlan:
    """Pairs of averages and raw tensors, grouped once for fast updates.

    Args:
        averages: The averages; an update changes them in place.
        raws: The raw tensors, in the same order, of the same shapes. They are
            kept by reference, so an update reads their present values.
    """

    def __init__(self, averages: Sequence[Tensor], raws: Sequence[Tensor]):
        self._pairs = list(zip(averages, raws))
        self._same: List[Tuple[List[Tensor], List[Tensor]]] = []
        self._mixed: List[Tuple[List[Tensor], List[Tensor]]] = []
        for pair in _group(averages, raws):
            mixed = pair[1][0].dtype in _PROMOTED
            (self._mixed if mixed else self._same).append(pair)

    def update(self, decay: float) -> None:
        """Apply ``avg = decay * avg + (1 - decay) * raw`` to every pair.

        Args:
            decay: Weight of the old averages, in [0, 1].
        """
        for averages, raws in self._same:
            near = _alike(raws, averages, averages[0].dtype)
            torch._foreach_lerp_(averages, near, 1 - decay)
        for averages, raws in self._mixed:
            near = _alike(raws, averages, raws[0].dtype)
            _lerp_mixed(averages, near, decay)

    def update_by(self, rule: Rule, step: int) -> None:
        """Let a rule update every pair, one by one: the slow path.

        Args:
            rule: Called with an average, its raw tensor and the step.
            step: The step, from 1.
        """
        for average, raw in self._pairs:
            rule(average, raw.detach().to(average), step)


class CopyPlan:
    """Pairs of tensors that are copied exactly, grouped once.

    Args:
        copies: Where to; changed in place.
        raws: Where from, in the same order, of the same shapes and dtypes.
    """

    def __init__(self, copies: Sequence[Tensor], raws: Sequence[Tensor]):
        self._groups = _group(copies, raws)

    def copy(self) -> None:
        """Copy every raw tensor."""
        for copies, raws in self._groups:
            torch._foreach_copy_(copies, raws)


def _group(
    averages: Sequence[Tensor], raws: Sequence[Tensor]
) -> List[Tuple[List[Tensor], List[Tensor]]]:
    groups: Dict[object, Tuple[List[Tensor], List[Tensor]]] = {}
    for average, raw in zip(averages, raws):
        key = (average.device, raw.device, average.dtype, raw.dtype)
        pair = groups.setdefault(key, ([], []))
        pair[0].append(average)
        pair[1].append(raw)
    return list(groups.values())


def _lerp_mixed(
    averages: List[Tensor], raws: List[Tensor], decay: float
) -> None:
    """Average tensors of another dtype without converting them first.

    For d >= 0.5 as ``(avg + w / d * raw) * (1 - w)`` with ``w = 1 - d``, not
    as ``avg * d + w * raw``: float32 rounds d = 0.9999 by up to 3e-8, which
    is 3e-4 of w, and the average would not tend to the weights.
    """
    weight = 1 - decay
    if decay < 0.5:
        torch._foreach_mul_(averages, decay)
        torch._foreach_add_(averages, raws, alpha=weight)
    else:
        torch._foreach_add_(averages, raws, alpha=weight / decay)
        torch._foreach_add_(averages, averages, alpha=-weight)


def _alike(
    raws: List[Tensor], averages: List[Tensor], dtype: torch.dtype
) -> List[Tensor]:
    """Bring raw tensors to the device of the averages, and to a dtype."""
    device = averages[0].device
    if raws[0].device == device and raws[0].dtype == dtype:
        return raws
    return [raw.to(device=device, dtype=dtype) for raw in raws]
