"""Averages in host memory, updated and guarded by one compiled call."""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import List, Sequence, Tuple

import torch
from torch import Tensor

from mmdet_ema.core.layouts import Layouts
from mmdet_ema.core.memory import is_plain, lies_alike
from mmdet_ema.core.native.dlpack import note
from mmdet_ema.core.native.interface import (
    BLOCK,
    BYTES_OF_LINE,
    LINE,
    Plan,
    integers,
    reserve,
)
from mmdet_ema.core.native.loader import load, parallel, threads_for

# elements a thread takes at a time, at least; 1 MiB
_PART = 2**18
_MOST_PARTS = 256
_KINDS = (torch.float32, torch.bfloat16, torch.float16)
# the part of all lines that the log has room for
_LOGGED = 16


class NativeUpdate:
    """Pairs of averages and raw tensors that :func:`can_update` takes.

    Args:
        averages: The averages; an update changes them in place.
        raws: The raw tensors, in the same order.
    """

    def __init__(self, averages: Sequence[Tensor], raws: Sequence[Tensor]):
        self._lists = list(averages), list(raws)
        # where it was pickled the kernels may have been there
        self._fits = load() is not None
        self._plan_anew()

    def __reduce__(self) -> Tuple[object, ...]:
        """Copy and pickle the tensors: addresses mean nothing elsewhere."""
        return type(self), self._lists

    def fits(self) -> bool:
        """Return whether all raw tensors still lie as their averages do.

        To be asked before each update: it follows tensors whose memory was
        replaced.
        """
        if self._layouts.are_right():
            return self._fits
        self._fits = all(map(can_update, *self._lists))
        if self._fits:
            self._plan_anew()
        return self._fits

    def update(self, weight: float, gated: bool) -> bool:
        """Apply ``avg += weight * (raw - avg)`` to every pair.

        Args:
            weight: Weight of the raw tensors, in [0, 1].
            gated: Whether nothing is to change if there is NaN or Inf in any
                raw tensor.

        Returns:
            False if nothing was changed.
        """
        threads = threads_for(self._numel)
        done = load().mmdet_ema_update(  # type: ignore[union-attr]
            ctypes.addressof(self._plan),
            weight,
            gated,
            parallel() if threads > 1 else None,
            threads,
        )
        return bool(done)

    def _plan_anew(self) -> None:
        averages, raws = self._lists
        self._layouts = note([*averages, *raws]) or Layouts(averages, raws)
        self._addresses = integers(
            [tensor.data_ptr() for tensor in (*averages, *raws)]
        )
        first = self._addresses.data_ptr()
        sizes = [average.numel() for average in averages]
        self._numel = sum(sizes)
        self._kinds = integers([_KINDS.index(raw.dtype) for raw in raws])
        self._starts = integers([0, *itertools.accumulate(sizes)])
        bounds = _bounds(self._numel)
        room = _room(bounds)
        self._logs = reserve(room * BYTES_OF_LINE * len(bounds))
        self._parts = _parts(bounds, self._logs.data_ptr(), room)
        self._plan = Plan(
            first,
            first + 8 * len(averages),
            self._kinds.data_ptr(),
            self._starts.data_ptr(),
            len(averages),
            self._parts.data_ptr(),
            len(bounds),
            room,
        )


def can_update(average: Tensor, raw: Tensor) -> bool:
    """Return whether :class:`NativeUpdate` takes a pair.

    Args:
        average: The average.
        raw: Its raw tensor.
    """
    return (
        raw.dtype in _KINDS
        and average.dtype == torch.float32
        and raw.numel() > 0
        and is_plain(raw)
        and lies_alike(average, raw)
        and _gives_torchs_bits()
    )


def _bounds(numel: int) -> List[Tuple[int, int]]:
    """Share elements out evenly, in whole lines but for the last part."""
    parts = min(max(numel // _PART, 1), _MOST_PARTS)
    length = -(-numel // (parts * LINE)) * LINE
    starts = range(0, numel, length)
    return [(start, min(start + length, numel)) for start in starts]


def _room(bounds: List[Tuple[int, int]]) -> int:
    """Return how many lines the log of each part takes."""
    longest = max(stop - start for start, stop in bounds)
    return longest // (LINE * _LOGGED) + BLOCK // LINE


def _parts(bounds: List[Tuple[int, int]], log: int, room: int) -> Tensor:
    """Return the rows of ``Part`` in ``kernels.c``."""
    rows: List[int] = []
    for i, (start, stop) in enumerate(bounds):
        rows += [start, stop, start, log + i * room * BYTES_OF_LINE, 0]
    return integers(rows)


def _gives_torchs_bits() -> bool:
    return load() is not None and _trial()


@functools.lru_cache(maxsize=None)
def _trial() -> bool:
    """Return whether an update gives the bits of torch's ``lerp_``."""
    with torch.no_grad(), torch.inference_mode(False):
        row = torch.linspace(-3, 5, 1001, dtype=torch.float32, device='cpu')
        raws = [row.sin(), row.exp()[:3], row.cos() * 1e-3]
        averages = [raw * 1.01 + 1e-6 for raw in raws]
        update = NativeUpdate(averages, raws)
        twins = [average.clone() for average in averages]
        for weight in (1.0, 0.9, 0.5, 0.25, 2e-3, 2e-4):
            update.update(weight, gated=True)
            for twin, raw in zip(twins, raws):
                twin.lerp_(raw, weight)
        return all(torch.equal(a, b) for a, b in zip(averages, twins))
