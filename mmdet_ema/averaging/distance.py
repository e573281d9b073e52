"""How far averages are from the raw weights."""

from __future__ import annotations

import math
from typing import Iterable, Iterator, List, Tuple

import torch
from torch import Tensor

from mmdet_ema.averaging.memory import is_dense

# elements: what is subtracted is still in a core's cache when it is squared
_CHUNK = 2**16


@torch.no_grad()
def relative_distance(pairs: Iterable[Tuple[Tensor, Tensor]]) -> float:
    """Return ``||average - raw|| / ||raw||``, in the L2 norm.

    Args:
        pairs: Averages and raw tensors, of any devices and dtypes.

    Returns:
        The distance; 0 where the raw tensors are zero or missing.
    """
    gaps: List[Tensor] = []
    sizes: List[Tensor] = []
    for average, raw in pairs:
        raw = raw.to(average.device)
        for left, right in _pieces(average, raw):
            right = right.to(left.dtype)
            gaps.append(_squares(left - right))
            sizes.append(_squares(right))
    size = _total(sizes)
    return math.sqrt(_total(gaps) / size) if size else 0.0


def _pieces(average: Tensor, raw: Tensor) -> Iterator[Tuple[Tensor, Tensor]]:
    """Cut a large pair in host memory into pieces."""
    alike = average.stride() == raw.stride() and is_dense(raw)
    if raw.device.type != 'cpu' or raw.numel() <= _CHUNK or not alike:
        yield average, raw
        return
    shape, stride = (raw.numel(),), (1,)
    flat = (tensor.as_strided(shape, stride) for tensor in (average, raw))
    yield from zip(*(torch.split(tensor, _CHUNK) for tensor in flat))


def _squares(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.reshape(-1)
    return torch.dot(flat, flat)


def _total(sums: List[Tensor]) -> float:
    """Add scalars up; wait for each device once."""
    devices = {item.device for item in sums}
    rows = [torch.stack([n for n in sums if n.device == d]) for d in devices]
    return sum(float(row.double().sum()) for row in rows)
