"""Exact copies of many small tensors in host memory by one compiled call."""

from __future__ import annotations

from typing import Sequence

from torch import Tensor

from mmdet_ema.core.memory import is_alike
from mmdet_ema.core.native.library import library
from mmdet_ema.core.native.pointers import Pointers, integers, is_plain

# bytes; larger tensors are for torch and its threads
_SMALL = 2**16


class NativeCopy:
    """Pairs of tensors that :func:`can_copy` takes.

    Args:
        targets: Where to; changed in place.
        sources: Where from, in the same order.
    """

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]):
        self._pairs = list(zip(targets, sources))
        self._targets, self._sources = Pointers(targets), Pointers(sources)
        self._sizes = integers([t.numel() * t.element_size() for t in targets])
        self._fits = True

    def fits(self) -> bool:
        """Return whether all sources still lie as their targets do.

        To be asked before each copy.
        """
        if self._sources.follow():
            self._fits = all(can_copy(*pair) for pair in self._pairs)
        return self._fits

    def copy(self) -> None:
        """Copy every source."""
        library().mmdet_ema_copy(  # type: ignore[union-attr]
            self._targets.address,
            self._sources.address,
            self._sizes.data_ptr(),
            len(self._pairs),
        )


def can_copy(target: Tensor, source: Tensor) -> bool:
    """Return whether :class:`NativeCopy` takes a pair.

    Args:
        target: Where to.
        source: Where from.
    """
    return (
        is_plain(source)
        and is_alike(target, source)
        and source.dim() <= 1
        and 0 < source.numel() * source.element_size() <= _SMALL
        and library() is not None
    )
