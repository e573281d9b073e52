"""Where tensors lie in memory, asked of torch without Python in between.

Newer versions of torch (2.13 is one) have DLPack's table of functions for C;
see ``places.c``.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Callable, List, Optional, Sequence

from torch import Tensor

from mmdet_ema.core.native.interface import integers, reserve
from mmdet_ema.core.native.loader import load


class NotedLayouts:
    """Where tensors lie; to be asked before each use if it is right.

    Args:
        tensors: Tensors.
        kernels: The compiled kernels.

    Attributes:
        are_noted: Whether torch could tell at all where they lie, and none
            has more than five dimensions.
    """

    def __init__(self, tensors: Sequence[Tensor], kernels: Any):
        # What C is given the address of is held as long as this object, not
        # as a local variable: a tracing compiler drops those early. So is
        # whom torch is asked about.
        self._tensors, count = list(tensors), len(tensors)
        self._known = integers([x for t in tensors for x in _known_as(t)])
        self._places = reserve(count * kernels.mmdet_ema_bytes_of_place())
        rows = self._known.data_ptr(), count, self._places.data_ptr()
        self.are_noted = _is_so(kernels.mmdet_ema_note, *rows)

    def are_right(self) -> bool:
        """Return whether all tensors still lie where and how they lay."""
        kernels: Any = load()
        places, count = self._places.data_ptr(), len(self._tensors)
        return _is_so(kernels.mmdet_ema_are_right, places, count)


def note(tensors: Sequence[Tensor]) -> Optional[NotedLayouts]:
    """Note where tensors lie.

    Args:
        tensors: Plain tensors; see
            :func:`~mmdet_ema.core.memory.is_plain`.

    Returns:
        None if torch has no such functions, or a tensor has more than five
        dimensions.
    """
    kernels = load()
    if kernels is None or _table() is None:
        return None
    layouts = NotedLayouts(tensors, kernels)
    return layouts if layouts.are_noted and layouts.are_right() else None


def _is_so(ask: Callable[..., int], *rows: int) -> bool:
    try:
        return bool(ask(_table(), *rows))
    except Exception:
        # torch cannot tell: it is for Python to find out what they are
        return False


def _known_as(tensor: Tensor) -> List[int]:
    """Return a tensor's addresses for Python and, as hints, for torch."""
    storage = tensor.untyped_storage()
    hints = (getattr(x, '_cdata', 0) for x in (tensor, storage))
    return [id(tensor), *hints]


@functools.lru_cache(maxsize=None)
def _table() -> Optional[int]:
    """Return the address of torch's ``DLPackExchangeAPI``, if it is known."""
    capsule = getattr(Tensor, '__dlpack_c_exchange_api__', None)
    kernels = load()
    if capsule is None or kernels is None:
        return None
    # a prototype of our own: that of ``ctypes.pythonapi`` is everybody's
    prototype = ctypes.PYFUNCTYPE(
        ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p
    )
    pointer_of = prototype(('PyCapsule_GetPointer', ctypes.pythonapi))
    try:
        table: int = pointer_of(capsule, b'dlpack_exchange_api')
    except ValueError:
        # it was no capsule at first
        return None
    return table if kernels.mmdet_ema_understands(table) else None
