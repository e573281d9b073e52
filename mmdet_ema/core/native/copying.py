"""Exact copies of many small tensors in host memory by one compiled call."""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple

from torch import Tensor

from mmdet_ema.core.memory import is_alike, is_plain
from mmdet_ema.core.native.dlpack import NotedLayouts, note
from mmdet_ema.core.native.interface import integers
from mmdet_ema.core.native.loader import load

# in bytes: beyond, torch's copies are as fast and use its threads
_SMALL = 4096


class NativeCopy:
    """Pairs of tensors that are copied exactly, where :meth:`fits` says so.

    Torch takes half a microsecond a tensor, whatever its size.

    Args:
        copies: Where to; changed in place.
        raws: Where from, in the same order.
    """

    def __init__(self, copies: Sequence[Tensor], raws: Sequence[Tensor]):
        self._lists = list(copies), list(raws)
        self._plan_anew()

    def __reduce__(self) -> Tuple[object, ...]:
        """Copy and pickle the tensors: addresses mean nothing elsewhere."""
        return type(self), self._lists

    def fits(self) -> bool:
        """Return whether the pairs can be copied here; to be asked before."""
        if self._layouts is not None and not self._layouts.are_right():
            self._plan_anew()
        return self._layouts is not None

    def copy(self) -> None:
        """Copy every raw tensor."""
        kernels = load()
        assert kernels is not None
        kernels.mmdet_ema_copy(self._rows.data_ptr(), len(self._lists[0]))

    def _plan_anew(self) -> None:
        copies, raws = self._lists
        self._layouts: Optional[NotedLayouts] = None
        if copies and all(map(_can_copy, copies, raws)):
            self._layouts = note([*copies, *raws])
            rows: List[int] = []
            for copy, raw in zip(copies, raws):
                size = raw.numel() * raw.element_size()
                rows += copy.data_ptr(), raw.data_ptr(), size
            self._rows = integers(rows)


def _can_copy(copy: Tensor, raw: Tensor) -> bool:
    return (
        0 < raw.numel() * raw.element_size() <= _SMALL
        and is_plain(copy)
        and is_plain(raw)
        and not raw.is_quantized
        # whether they are conjugated would have to be asked each time
        and not raw.is_complex()
        and is_alike(copy, raw)
    )
