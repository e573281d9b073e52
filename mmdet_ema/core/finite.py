"""Whether tensors are free of NaN and Inf."""

from __future__ import annotations

from typing import Dict, Iterable, List, Optional, Sequence

import torch
from torch import Tensor

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
    if all(bool(ok) for ok in _norms_finite(tensors)):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


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


def _norms_finite(tensors: Sequence[Tensor]) -> Iterable[Tensor]:
    groups: Dict[object, List[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for group in groups.values():
        norms = torch._foreach_norm(group, 2)
        yield torch.isfinite(torch.stack(list(norms))).all()
