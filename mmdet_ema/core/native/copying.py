"""Exact copies of many small tensors in host memory by one compiled call."""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple

from torch import Tensor

from mmdet_ema.core.memory import is_alike
from mmdet_ema.core.native.dlpack import NotedLayouts, note
from mmdet_ema.core.native.layouts import integers, is_plain
from mmdet_ema.core.native.loader import load

# in bytes: beyond, torch's copies are as fast and use its threads
_SMALL = 4096


class NativeCopy:
    """Pairs of tensors that are copied exactly, where that can be done here.

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

    def copy(self) -> bool:
        """Copy every raw tensor.

        Returns:
            False if nothing was copied: it is for torch to do.
        """
        if self._layouts is not None and not self._layouts.are_right():
            self._plan_anew()
        if self._layouts is None:
            return False
        kernels = load()
        assert kernels is not None
        kernels.mmdet_ema_copy(self._rows.data_ptr(), len(self._lists[0]))
        return True

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
        and is_alike(copy, raw)
    )
