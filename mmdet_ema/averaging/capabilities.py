"""What the installed torch can do, found out by trying it once.

The fast kernels are not part of torch's stable interface. Each is used only
where a trial on the same device and dtype gave the right numbers; everywhere
else slower, stable calls take its place.
"""

from __future__ import annotations

import functools
import math
from typing import Any, List, Optional

import torch
from torch import Tensor

HAS_FOREACH_LERP = hasattr(torch, '_foreach_lerp_')
HAS_FOREACH_COPY = hasattr(torch, '_foreach_copy_')
_FUSED_DTYPES = (torch.float32, torch.float64)


def fused_lerp(
    averages: List[Tensor],
    raws: List[Tensor],
    weight: float,
    skip: Optional[Tensor] = None,
) -> None:
    """Apply ``avg -= weight * (avg - raw)`` to every pair in one call.

    torch's fused SGD step does this when the raw tensors are its gradients,
    to be maximized, with a weight decay of 1. It reads memory as it lies: a
    pair has to have the same strides, without gaps.

    Args:
        averages: Tensors that are changed in place.
        raws: Tensors of the same device, dtype and strides.
        weight: Weight of the raw tensors.
        skip: A float32 scalar on their device; nothing changes where it is 1.
    """
    torch._fused_sgd_(
        averages,
        raws,
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=weight,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=skip,
    )


def can_fuse(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether :func:`fused_lerp` works for a device and a dtype.

    Args:
        device: Where the tensors are.
        dtype: What they are.
    """
    if dtype not in _FUSED_DTYPES or not hasattr(torch, '_fused_sgd_'):
        return False
    return _trial(_try_fused, device, dtype)


def norm_order(device: torch.device, dtype: torch.dtype) -> float:
    """Return an order of ``_foreach_norm`` that shows NaN and Inf.

    The largest magnitude cannot overflow where the values do not; the sum of
    squares can, but every torch has it.

    Args:
        device: Where the tensors are.
        dtype: What they are.
    """
    return math.inf if _trial(_try_max_norm, device, dtype) else 2.0


def _trial(trial: Any, device: torch.device, dtype: torch.dtype) -> bool:
    return bool(_remembered(trial, torch.device(device), dtype))


@functools.lru_cache(maxsize=None)
def _remembered(trial: Any, device: torch.device, dtype: torch.dtype) -> bool:
    with torch.no_grad(), torch.inference_mode(False):
        try:
            return bool(trial(dict(device=device, dtype=dtype)))
        except (RuntimeError, TypeError, NotImplementedError):
            return False


def _try_fused(kind: Any) -> bool:
    raw = torch.tensor([4.0, -2.0, 0.0], **kind)
    pair = [torch.ones(3, **kind), torch.ones(1, **kind)]
    raws = [raw, torch.full((1,), 5.0, **kind)]
    flag = torch.zeros((), device=kind['device'])
    fused_lerp(pair, raws, 0.25, flag)
    fused_lerp(pair, [raw * math.nan, raws[1]], 0.25, flag + 1)
    expected = torch.tensor([1.75, 0.25, 0.75], **kind)
    return bool((pair[0] == expected).all()) and pair[1].item() == 2.0


def _try_max_norm(kind: Any) -> bool:
    largest = torch.finfo(kind['dtype']).max
    values = (math.nan, math.inf, -math.inf, largest, -3.0)
    # long enough for vectorised code, which is another path
    row = [torch.tensor([0.5, value] * 64, **kind) for value in values]
    norms = torch._foreach_norm(row, math.inf)
    finite = [math.isfinite(norm) for norm in torch.stack(list(norms))]
    return finite == [False, False, False, True, True]
