"""The update ``avg = d * avg + (1 - d) * raw`` over many tensors at once.

:class:`UpdatePlan` is the fast path: tensors are grouped once, and an update
is one or two multi-tensor calls a group. :func:`reference_update` is its plain
twin; ``tests/averaging/test_kernels.py`` steps both, for every dtype.
"""

from __future__ import annotations

from typing import Callable, List, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor

from mmdet_ema.averaging import capabilities
from mmdet_ema.averaging.copying import group_pairs, placement
from mmdet_ema.averaging.layouts import Layouts, check_readable
from mmdet_ema.averaging.memory import is_alike

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
        fused: Whether to use kernels that a flag on the device can stop,
            where there are some; they pay on a GPU. Defaults to False.
    """

    def __init__(
        self,
        averages: Sequence[Tensor],
        raws: Sequence[Tensor],
        fused: bool = False,
    ):
        self._pairs = list(zip(averages, raws))
        key_of = _fused_key if fused else _plain_key
        self._groups = [
            _strategy(*key)(*lists)
            for key, lists in group_pairs(self._pairs, key_of).items()
        ]

    def can_skip(self, decay: float) -> bool:
        """Return whether :meth:`update` can take ``skip`` for this decay.

        Args:
            decay: Weight of the old averages.
        """
        self._check()
        return decay > 0 and all(group.is_fused for group in self._groups)

    def update(self, decay: float, skip: Optional[Tensor] = None) -> None:
        """Apply ``avg = decay * avg + (1 - decay) * raw`` to every pair.

        Args:
            decay: Weight of the old averages, in [0, 1].
            skip: A float32 scalar on the device: nothing changes where it is
                1. Only where :meth:`can_skip` says so.

        Raises:
            RuntimeError: If a raw tensor has another shape now, or its
                memory was freed; nothing is changed then.
        """
        self._check()
        for group in self._groups:
            group.update(decay, skip)

    def update_by(self, rule: Rule, step: int) -> None:
        """Let a rule update every pair, one by one: the slow path.

        Args:
            rule: Called with an average, its raw tensor and the step.
            step: The step, from 1.
        """
        for average, raw in self._pairs:
            rule(average, raw.detach().to(average), step)

    def _check(self) -> None:
        for group in self._groups:
            group.check()


class _Lerp:
    """Tensors of one dtype, of any strides."""

    is_fused = False

    def __init__(self, averages: List[Tensor], raws: List[Tensor]):
        self.averages, self.raws = averages, raws
        self._layouts = Layouts(averages, raws)

    def check(self) -> bool:
        """Return whether all is as it was; refuse what does not fit."""
        if self._layouts.are_right():
            return True
        check_readable(self.averages, self.raws)
        self._layouts = Layouts(self.averages, self.raws)
        return False

    def update(self, decay: float, skip: Optional[Tensor]) -> None:
        assert skip is None
        near = _alike(self.raws, self.averages, self.averages[0].dtype)
        if capabilities.HAS_FOREACH_LERP:
            torch._foreach_lerp_(self.averages, near, 1 - decay)
        elif self.averages[0].is_cuda:
            _add_weighted(self.averages, near, decay)
        else:
            for average, raw in zip(self.averages, near):
                average.lerp_(raw, 1 - decay)


class _Fused(_Lerp):
    """Tensors whose memory lies in the same order as that of their averages.

    One call that a flag on the device can stop. Where ``raw.data`` was
    replaced by memory in another order, the group goes on the other way.
    """

    is_fused = True

    def check(self) -> bool:
        as_before = super().check()
        if not as_before:
            self.is_fused = all(map(is_alike, self.averages, self.raws))
        return as_before

    def update(self, decay: float, skip: Optional[Tensor]) -> None:
        # where the raw tensor weighs more, lerp_ starts from it instead
        if skip is None and (not self.is_fused or decay <= 0.5):
            super().update(decay, None)
        else:
            weight = 1 - decay
            capabilities.fused_lerp(self.averages, self.raws, weight, skip)


class _Mixed(_Lerp):
    """Half-precision tensors and their float32 averages.

    On a processor converting one tensor after the other is faster than
    mixing dtypes. On a GPU it would be a launch more for each.
    """

    def update(self, decay: float, skip: Optional[Tensor]) -> None:
        assert skip is None
        if not self.averages[0].is_cuda:
            for average, raw in zip(self.averages, self.raws):
                reference_update(average, raw, decay)
            return
        near = _alike(self.raws, self.averages, self.raws[0].dtype)
        _add_weighted(self.averages, near, decay)


def _plain_key(average: Tensor, raw: Tensor) -> Tuple[object, ...]:
    return (*placement(average, raw), False)


def _fused_key(average: Tensor, raw: Tensor) -> Tuple[object, ...]:
    fused = is_alike(average, raw) and capabilities.can_fuse(
        raw.device, raw.dtype
    )
    return (*placement(average, raw), fused)


def _strategy(*key: object) -> Type[_Lerp]:
    raw_dtype, fused = key[3], key[4]
    if fused:
        return _Fused
    return _Mixed if raw_dtype in _PROMOTED else _Lerp


def _add_weighted(
    averages: List[Tensor], raws: List[Tensor], decay: float
) -> None:
    """Average tensors, of another dtype too, without converted copies.

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
