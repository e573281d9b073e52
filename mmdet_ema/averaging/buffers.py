"""Averages of buffers, each with a verdict of its own.

NaN in the statistics of one layer says nothing about the weights: the average
of that buffer stays as it is, and everything else goes on.
"""

from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from mmdet_ema.averaging.copying import (
    CopyPlan,
    copy_all,
    group_pairs,
    placement,
)
from mmdet_ema.averaging.finite import FiniteCheck, finite_each
from mmdet_ema.averaging.kernels import Rule, UpdatePlan, reference_update
from mmdet_ema.averaging.tensors import Entry

Row = Tuple[Entry, Tensor, Tensor]
"""An entry, its average, and where its values are read from."""


class BufferUpdate:
    """Float buffers and their averages.

    Args:
        rows: The buffers.
        on_device: Whether the verdicts stay on the device, all tensors being
            on one.
    """

    def __init__(self, rows: Sequence[Row], on_device: bool):
        self._rows = rows
        averages = [row[1] for row in rows]
        sources = [row[2] for row in rows]
        self._updates = self._plan(averages, sources)
        self._check = FiniteCheck(
            [part for entry, _, raw in rows for part in entry.parts_of(raw)]
        )
        whole = all(row[0].labels[0].view is None for row in rows)
        pairs = list(zip(averages, sources))
        self._groups: List[Tuple[List[Tensor], List[Tensor], Tensor]] = []
        if on_device and whole:
            groups = group_pairs(pairs, placement).values()
            self._groups = [(a, r, _owners(a)) for a, r in groups]

    def update(
        self, decay: float, gated: bool, skip: Optional[Tensor] = None
    ) -> None:
        """Apply ``avg = decay * avg + (1 - decay) * raw`` where it is finite.

        Args:
            decay: Weight of the old averages, in [0, 1].
            gated: Whether a buffer that holds NaN or Inf is left out.
            skip: A scalar on the device: nothing changes where it is 1.
        """
        if gated and self._groups:
            for averages, raws, owners in self._groups:
                _update_finite(averages, raws, owners, decay, skip)
            return
        if gated and not self._check.passes():
            for _, average, raw in self._finite_rows():
                reference_update(average, raw, decay)
        else:
            self._update_all(decay)

    def update_by(self, rule: Rule, step: int, gated: bool) -> None:
        """Let a rule update them; see :meth:`UpdatePlan.update_by`."""
        for _, average, raw in self._finite_rows() if gated else self._rows:
            rule(average, raw.detach().to(average), step)

    def _plan(self, averages: List[Tensor], sources: List[Tensor]) -> Any:
        return UpdatePlan(averages, sources)

    def _update_all(self, decay: float) -> None:
        self._updates.update(decay)

    def _finite_rows(self) -> List[Row]:
        return [
            (entry, average, raw)
            for entry, average, raw in self._rows
            if all(bool(torch.isfinite(p).all()) for p in entry.parts_of(raw))
        ]


class BufferCopy(BufferUpdate):
    """Float buffers that are copied, exactly: ``update`` with a decay of 0."""

    def check(self) -> None:
        """Refuse what could not be copied; see :meth:`CopyPlan.check`."""
        self._updates.check()

    def _plan(self, averages: List[Tensor], sources: List[Tensor]) -> Any:
        return CopyPlan(averages, sources)

    def _update_all(self, decay: float) -> None:
        self._updates.copy()


def _owners(tensors: Sequence[Tensor]) -> Tensor:
    """Return, for every element of a row of tensors, which one it is of."""
    device = tensors[0].device
    sizes = torch.tensor([tensor.numel() for tensor in tensors])
    return torch.repeat_interleave(torch.arange(len(tensors)), sizes).to(
        device
    )


def _update_finite(
    averages: List[Tensor],
    raws: List[Tensor],
    owners: Tensor,
    decay: float,
    skip: Optional[Tensor],
) -> None:
    """Update without the host knowing which of the tensors are finite."""
    moves = finite_each(raws)
    if skip is not None:
        moves = moves & (skip == 0)
    old = torch.cat([average.reshape(-1) for average in averages])
    raw = torch.cat([raw.reshape(-1) for raw in raws]).to(old.dtype)
    new = torch.lerp(old, raw, 1 - decay) if decay else raw
    parts = torch.split(
        torch.where(moves[owners], new, old),
        [average.numel() for average in averages],
    )
    shaped = [part.view(a.shape) for part, a in zip(parts, averages)]
    copy_all(averages, shaped)
