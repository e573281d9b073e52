"""Whether tensors are free of NaN and Inf."""

from __future__ import annotations

from typing import Dict, Iterable, List, Optional, Sequence

import torch
from torch import Tensor

from mmdet_ema.core.capabilities import norm_order
from mmdet_ema.core.selection import Entry


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether no element of any tensor is NaN or Inf.

    NaN and Inf survive a sum of squares, so one multi-tensor norm decides.
    The sum of finite but huge values may overflow too: only then is every
    element looked at. On a GPU the answer costs one synchronisation.

    Args:
        tensors: Floating point or complex tensors of any shape and device.

    Returns:
        True if all elements are finite.
    """
    verdicts = [_are_finite(norms) for norms in _norms(tensors, 2.0)]
    if all(bool(verdict) for verdict in verdicts):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def nonfinite_flag(tensors: Sequence[Tensor]) -> Tensor:
    """Return, on the device, whether any element is NaN or Inf.

    The host does not wait for the answer.

    Args:
        tensors: Floating point tensors of one device, at least one.

    Returns:
        A float32 scalar: 1 if there is NaN or Inf, else 0.
    """
    order = norm_order(tensors[0].device, tensors[0].dtype)
    verdicts = [_are_finite(norms) for norms in _norms(tensors, order)]
    return (~torch.stack(verdicts).all()).to(torch.float32)


def first_nonfinite(entries: Iterable[Entry]) -> Optional[str]:
    """Return the name of the first tensor that holds NaN or Inf.

    Args:
        entries: Entries to look through, in order.

    Returns:
        The name, or None if all are finite.
    """
    for entry in entries:
        if not all(bool(torch.isfinite(p).all()) for p in entry.parts):
            return entry.name
    return None


def _are_finite(norms: List[Tensor]) -> Tensor:
    return torch.isfinite(torch.stack(norms)).all()


def _norms(tensors: Sequence[Tensor], order: float) -> Iterable[List[Tensor]]:
    """Return norms of tensors, those of one device and dtype together."""
    groups: Dict[object, List[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            key = (tensor.device, tensor.dtype)
            groups.setdefault(key, []).append(tensor)
    return [list(torch._foreach_norm(g, order)) for g in groups.values()]
