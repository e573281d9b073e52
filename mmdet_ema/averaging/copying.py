"""Exact copies of many tensors at once, and the grouping that needs."""

from __future__ import annotations

from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from mmdet_ema.averaging import capabilities
from mmdet_ema.averaging.layouts import Layouts, check_readable


class CopyPlan:
    """Pairs of tensors that are copied exactly, grouped once.

    Args:
        copies: Where to; changed in place.
        raws: Where from, in the same order, of the same shapes and dtypes.
    """

    def __init__(self, copies: Sequence[Tensor], raws: Sequence[Tensor]):
        pairs = list(zip(copies, raws))
        self._lists = copies, raws
        self._groups = list(group_pairs(pairs, placement).values())
        self._layouts = Layouts(copies, raws)

    def check(self) -> None:
        """Refuse what could not be copied, before anything is changed.

        Raises:
            RuntimeError: If a raw tensor has another shape now, or its
                memory was freed.
        """
        if not self._layouts.are_right():
            check_readable(*self._lists)
            self._layouts = Layouts(*self._lists)

    def copy(self, skip: Optional[Tensor] = None, wait: bool = True) -> None:
        """Copy every raw tensor.

        Args:
            skip: A float32 scalar on the device: nothing changes where it is
                1.
            wait: See :func:`copy_all`. Defaults to True.
        """
        for copies, raws in self._groups:
            if skip is None:
                copy_all(copies, raws, wait)
            else:
                _copy_unless(skip, copies, raws)


def copy_all(
    targets: List[Tensor], sources: List[Tensor], wait: bool = True
) -> None:
    """Copy tensors.

    Args:
        targets: Where to.
        sources: Where from, of the same shapes.
        wait: Whether to wait where a GPU copies to pinned host memory.
            Defaults to True.
    """
    if capabilities.HAS_FOREACH_COPY:
        torch._foreach_copy_(targets, sources, non_blocking=not wait)
        return
    for target, source in zip(targets, sources):
        target.copy_(source, non_blocking=not wait)


def group_pairs(
    pairs: Sequence[Tuple[Tensor, Tensor]],
    key_of: Callable[[Tensor, Tensor], Tuple[object, ...]],
) -> Dict[Tuple[object, ...], Tuple[List[Tensor], List[Tensor]]]:
    """Put pairs of tensors that a multi-tensor call can take together.

    Args:
        pairs: The pairs; empty tensors are left out.
        key_of: Equal for pairs that go together.

    Returns:
        The left and the right tensors by key.
    """
    groups: Dict[Tuple[object, ...], Tuple[List[Tensor], List[Tensor]]] = {}
    for left, right in pairs:
        if left.numel():
            lists = groups.setdefault(key_of(left, right), ([], []))
            lists[0].append(left)
            lists[1].append(right)
    return groups


def placement(copy: Tensor, raw: Tensor) -> Tuple[object, ...]:
    """Return devices and dtypes of a pair: a key for :func:`group_pairs`."""
    return copy.device, raw.device, copy.dtype, raw.dtype


def _copy_unless(
    skip: Tensor, copies: List[Tensor], raws: List[Tensor]
) -> None:
    """Copy where ``skip`` is not 1; what is copied is a few small buffers."""
    old = torch.cat([copy.reshape(-1) for copy in copies])
    new = torch.cat([raw.reshape(-1) for raw in raws])
    # as bytes: torch.where knows no float8 before torch 2.5
    kept = torch.where(skip > 0, old.view(torch.uint8), new.view(torch.uint8))
    kept = kept.view(old.dtype)
    parts = torch.split(kept, [copy.numel() for copy in copies])
    shaped = [part.view(copy.shape) for part, copy in zip(parts, copies)]
    copy_all(copies, shaped)
