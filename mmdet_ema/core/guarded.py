"""Averages that keep NaN and Inf out by themselves.

Elsewhere all weights are read to see whether they are finite, and then once
more to be averaged. The compiled kernels do both in one reading.
"""

from __future__ import annotations

import functools
from typing import Sequence

from torch import Tensor

from mmdet_ema.core.finite import FiniteCheck
from mmdet_ema.core.kernels import Rule, UpdatePlan
from mmdet_ema.core.layouts import check_readable
from mmdet_ema.core.native.update import NativeUpdate


class GuardedUpdate:
    """Pairs of averages and raw tensors in host memory.

    Args:
        averages: The averages; an update changes them in place.
        raws: The raw tensors, in the same order, such that
            :func:`~mmdet_ema.core.native.update.can_update` takes each pair.
    """

    def __init__(self, averages: Sequence[Tensor], raws: Sequence[Tensor]):
        self._lists = averages, raws
        self._native = NativeUpdate(averages, raws) if averages else None

    def __bool__(self) -> bool:
        """Return whether there are pairs."""
        return self._native is not None

    def update(self, decay: float, gated: bool) -> bool:
        """Apply ``avg = decay * avg + (1 - decay) * raw`` to every pair.

        Args:
            decay: Weight of the old averages, in [0, 1].
            gated: Whether nothing is to change if there is NaN or Inf in any
                raw tensor.

        Returns:
            False if nothing was changed.

        Raises:
            RuntimeError: If a raw tensor has another shape now, or its
                memory was freed.
        """
        if self._native is None:
            return True
        if self._native.fits():
            return self._native.update(1 - decay, gated)
        check_readable(*self._lists)
        if gated and not self._check.passes():
            return False
        self._plain.update(decay)
        return True

    # planned where they are needed: some models make the plans anew each step
    @functools.cached_property
    def _plain(self) -> UpdatePlan:
        return UpdatePlan(*self._lists)

    @functools.cached_property
    def _check(self) -> FiniteCheck:
        return FiniteCheck(self._lists[1])

    def update_by(self, rule: Rule, step: int) -> None:
        """Let a rule update every pair; see :meth:`UpdatePlan.update_by`."""
        self._plain.update_by(rule, step)
