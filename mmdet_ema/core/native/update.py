"""Averages in host memory, updated and guarded by one compiled call."""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import List, Sequence, Tuple

import torch
from torch import Tensor

from mmdet_ema.core.memory import lies_alike
from mmdet_ema.core.native.library import library, parallel, threads_for
from mmdet_ema.core.native.pointers import Pointers, integers, is_plain

# elements a thread takes at a time, at least; 1 MiB
_PART = 2**18
_MOST_PARTS = 256
# as kernels.c has them
_LINE, _BYTES_OF_LINE, _WORDS_OF_PART = 16, 80, 5
_KINDS = (torch.float32, torch.bfloat16, torch.float16)
# the part of all lines that the log has room for
_LOGGED = 16


class _Plan(ctypes.Structure):
    """``Plan`` of ``kernels.c``."""

    _fields_ = [
        ('averages', ctypes.c_void_p),
        ('raws', ctypes.c_void_p),
        ('kinds', ctypes.c_void_p),
        ('starts', ctypes.c_void_p),
        ('num_tensors', ctypes.c_int64),
        ('parts', ctypes.c_void_p),
        ('num_parts', ctypes.c_int64),
        ('room', ctypes.c_int64),
    ]


class NativeUpdate:
    """Pairs of averages and raw tensors that :func:`can_update` takes.

    Args:
        averages: The averages; an update changes them in place.
        raws: The raw tensors, in the same order.
    """

    def __init__(self, averages: Sequence[Tensor], raws: Sequence[Tensor]):
        self._pairs = list(zip(averages, raws))
        self._averages, self._raws = Pointers(averages), Pointers(raws)
        sizes = [average.numel() for average in averages]
        self._starts = integers([0, *itertools.accumulate(sizes)])
        self._kinds = integers([_KINDS.index(raw.dtype) for raw in raws])
        self._numel = sum(sizes)
        self._lay_out()
        self._wide = [raw for raw in raws if raw.dim() > 1]
        self._strides = self._strides_now()
        self._fits = True

    def fits(self) -> bool:
        """Return whether all raw tensors still lie as their averages do.

        To be asked before each update.
        """
        strides = self._strides_now()
        if self._raws.follow() or strides != self._strides:
            self._strides = strides
            self._fits = all(can_update(*pair) for pair in self._pairs)
            if self._fits:
                dtypes = [raw.dtype for _, raw in self._pairs]
                self._kinds = integers(list(map(_KINDS.index, dtypes)))
                self._plan.kinds = self._kinds.data_ptr()
            self._plan.raws = self._raws.address
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
        done = library().mmdet_ema_update(  # type: ignore[union-attr]
            ctypes.addressof(self._plan),
            weight,
            gated,
            parallel() if threads > 1 else None,
            threads,
        )
        return bool(done)

    def _lay_out(self) -> None:
        """Share the elements out, and reserve memory for the logs.

        Memory that is not written to is none: few lines are ever logged.
        """
        bounds = _bounds(self._numel)
        longest = max(stop - start for start, stop in bounds)
        room = longest // (_LINE * _LOGGED) + 1
        with torch.inference_mode(False):
            self._logs = torch.empty(
                room * _BYTES_OF_LINE * len(bounds),
                dtype=torch.uint8,
                device='cpu',
            )
        rows: List[int] = []
        for i, (start, stop) in enumerate(bounds):
            log = self._logs.data_ptr() + i * room * _BYTES_OF_LINE
            rows += [start, stop, start, log, 0]
        self._parts = integers(rows)
        self._plan = _Plan(
            self._averages.address,
            self._raws.address,
            self._kinds.data_ptr(),
            self._starts.data_ptr(),
            len(self._pairs),
            self._parts.data_ptr(),
            len(bounds),
            room,
        )

    def _strides_now(self) -> List[Tuple[int, ...]]:
        return list(map(Tensor.stride, self._wide))


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
    length = -(-numel // (parts * _LINE)) * _LINE
    starts = range(0, numel, length)
    return [(start, min(start + length, numel)) for start in starts]


def _gives_torchs_bits() -> bool:
    return library() is not None and _trial()


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
