"""What this package and ``kernels.c`` agree on, and memory for C to read."""

from __future__ import annotations

import ctypes
from typing import Sequence

import torch
from torch import Tensor

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


def integers(values: Sequence[int]) -> Tensor:
    """Return int64 numbers in a row of memory.

    Args:
        values: The numbers.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int64, device='cpu')


def reserve(size: int) -> Tensor:
    """Return bytes; what is never written to takes no memory.

    Args:
        size: How many.
    """
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, device='cpu')
