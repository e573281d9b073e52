"""What this package and ``kernels.c`` have to agree on."""

from __future__ import annotations

import ctypes

LINE = 16
"""Elements that go to the log together."""

BLOCK = 4 * LINE
"""Elements that are written together; a log has room for them at least."""

BYTES_OF_LINE = 8 + 8 + 4 * LINE
"""Size of ``Kept``."""

BYTES_OF_PART = 5 * 8
"""Size of ``Part``."""


class Plan(ctypes.Structure):
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


def fingerprint() -> int:
    """Return what ``mmdet_ema_interface`` returns for kernels that fit.

    Its number, to be raised with every change, and the sizes of all structs.
    """
    number = 4
    sizes = ctypes.sizeof(Plan) << 16 | BYTES_OF_PART << 8 | BYTES_OF_LINE
    return number << 24 | sizes
