"""The compiled kernels, where they were built, and the threads for them."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
import pathlib
from typing import Any, Optional

import torch

from mmdet_ema.core.native.interface import fingerprint

Library = Any
"""A ``ctypes.CDLL``, whose functions mypy cannot know."""


@functools.lru_cache(maxsize=None)
def load() -> Optional[Library]:
    """Return the compiled kernels, or None where torch's have to do.

    The environment variable ``MMDET_EMA_NATIVE=0`` switches them off.
    """
    path = _path()
    if path is None or os.environ.get('MMDET_EMA_NATIVE') == '0':
        return None
    try:
        loaded = _declared(ctypes.CDLL(str(path)))
    except (OSError, AttributeError):
        # built for another machine
        return None
    # 0 for another processor, another number for another version
    return loaded if loaded.mmdet_ema_interface() == fingerprint() else None


@functools.lru_cache(maxsize=None)
def parallel() -> Optional[int]:
    """Return the address of OpenMP's ``GOMP_parallel``, None without it.

    torch has loaded an OpenMP library, so its threads are taken: threads of
    our own would have to compete with them while they wait for work.
    """
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def threads_for(numel: int) -> int:
    """Return how many threads torch would use.

    Args:
        numel: Number of elements; a thread is given 32,768 at least.
    """
    return max(min(torch.get_num_threads(), numel // 2**15), 1)


def _path() -> Optional[pathlib.Path]:
    folder = pathlib.Path(__file__).parent
    names = [f'_kernels{s}' for s in importlib.machinery.EXTENSION_SUFFIXES]
    return next(
        filter(pathlib.Path.is_file, map(folder.joinpath, names)), None
    )


def _declared(loaded: Library) -> Library:
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    loaded.mmdet_ema_update.argtypes = (
        *(pointer, ctypes.c_float, integer),
        *(pointer, ctypes.c_uint),
    )
    loaded.mmdet_ema_interface.argtypes = ()
    loaded.mmdet_ema_copy.argtypes = pointer, ctypes.c_int64
    loaded.mmdet_ema_copy.restype = None
    loaded.mmdet_ema_bytes_of_place.restype = ctypes.c_int64
    loaded.mmdet_ema_understands.argtypes = (pointer,)
    # these ask torch about objects of Python, so they hold its lock
    counted = pointer, pointer, ctypes.c_int64
    ask = ctypes.PYFUNCTYPE(integer, *counted)
    note = ctypes.PYFUNCTYPE(integer, *counted, pointer)
    loaded.mmdet_ema_are_right = ask(('mmdet_ema_are_right', loaded))
    loaded.mmdet_ema_note = note(('mmdet_ema_note', loaded))
    return loaded
