"""Where tensors lie in memory, asked of torch without Python in between.

Newer versions of torch (2.13 is one) have DLPack's table of functions for C;
see ``places.c``.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Callable, List, Optional, Sequence

from torch import Tensor

from mmdet_ema.core.native.layouts import integers
from mmdet_ema.core.native.loader import load


class NotedLayouts:
    """Where tensors lie; to be asked before each use if it is right.

    Args:
        tensors: Tensors.
        places: What was noted of them; see :func:`note`.
    """

    def __init__(self, tensors: Sequence[Tensor], places: Tensor):
        # whom torch is asked about has to be alive
        self._tensors, self._places = list(tensors), places

    def are_right(self) -> bool:
        """Return whether all tensors still lie where and how they lay."""
        kernels: Any = load()
        return _is_so(
            kernels.mmdet_ema_are_right,
            *(self._places.data_ptr(), len(self._tensors)),
        )


def note(tensors: Sequence[Tensor]) -> Optional[NotedLayouts]:
    """Note where tensors lie.

    Args:
        tensors: Plain tensors; see
            :func:`~mmdet_ema.core.native.layouts.is_plain`.

    Returns:
        None if torch has no such functions, or a tensor has more than five
        dimensions.
    """
    kernels = load()
    if kernels is None or _table() is None:
        return None
    count, size = len(tensors), kernels.mmdet_ema_bytes_of_place()
    known = integers([x for tensor in tensors for x in _known_as(tensor)])
    places = integers([0] * (count * size // 8))
    rows = known.data_ptr(), count, places.data_ptr()
    layouts = NotedLayouts(tensors, places)
    noted = _is_so(kernels.mmdet_ema_note, *rows)
    return layouts if noted and layouts.are_right() else None


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
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.argtypes = ctypes.py_object, ctypes.c_char_p
    pointer_of.restype = ctypes.c_void_p
    try:
        table: int = pointer_of(capsule, b'dlpack_exchange_api')
    except ValueError:
        # it was no capsule at first
        return None
    return table if kernels.mmdet_ema_understands(table) else None
