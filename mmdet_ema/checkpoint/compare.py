"""Compare tensors a piece at a time: nothing whole is in memory twice."""

from __future__ import annotations

import math
from typing import Dict, Iterator, Mapping, NamedTuple, Tuple

import torch
from torch import Tensor

_PIECE = 2**20
# their distance says nothing of the weights
STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')


class Gap(NamedTuple):
    """The largest absolute difference, and sums of squares.

    Of the differences, and of the second tensor. All are infinite where one
    is not finite and the other is something else.
    """

    largest: float
    squares: float
    size: float


def gap(first: Tensor, second: Tensor) -> Gap:
    """Return how far two tensors of one shape are apart, in float64."""
    largest = squares = size = 0.0
    for left, right in _pieces(first, second):
        off = left - right
        # equal infinities and NaN on both sides are no difference
        same = (left == right) | (left.isnan() & right.isnan())
        off[same] = 0
        off = off.abs()
        if not bool(torch.isfinite(off).all()):
            return Gap(math.inf, math.inf, math.inf)
        largest = max(largest, float(off.max()))
        squares += float(off.square().sum())
        size += float(right.abs().square().sum())
    return Gap(largest, squares, size)


def count_nonfinite(tensor: Tensor) -> int:
    """Return how many elements are NaN or infinite."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return 0
    flat = tensor.detach().reshape(-1)
    return sum(
        int((~torch.isfinite(_wide(x))).sum())
        for x in torch.split(flat, _PIECE)
    )


def distances(
    averages: Mapping[str, Tensor], raws: Mapping[str, Tensor]
) -> Dict[str, float]:
    """Return ``||average - raw|| / ||raw||`` by module; the total is ``''``.

    A module is the first part of a name.
    """
    sums: Dict[str, Tuple[float, float]] = {'': (0.0, 0.0)}
    seen = set()
    for name, average in averages.items():
        raw = raws.get(name)
        if raw is None or raw.shape != average.shape or id(raw) in seen:
            continue
        if not raw.is_floating_point() or name.endswith(STATISTICS):
            continue
        seen.add(id(raw))
        found = gap(average, raw)
        for key in ('', name.partition('.')[0]):
            squares, size = sums.get(key, (0.0, 0.0))
            sums[key] = squares + found.squares, size + found.size
    return {
        key: math.sqrt(squares / size) if 0 < size < math.inf else math.nan
        for key, (squares, size) in sums.items()
    }


def _pieces(first: Tensor, second: Tensor) -> Iterator[Tuple[Tensor, Tensor]]:
    flats = (x.detach().reshape(-1) for x in (first, second))
    for left, right in zip(*(torch.split(x, _PIECE) for x in flats)):
        if left.numel():
            yield _wide(left), _wide(right)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(
        torch.complex128 if tensor.is_complex() else torch.float64
    )
