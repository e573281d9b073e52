"""Allow-list what mmengine's own checkpoints hold, and nothing more.

torch from 2.6 on reads files with ``weights_only=True``; mmengine 0.10.7 does
not know of it and cannot read what it wrote: its ``HistoryBuffer`` (with its
statistics methods, pickled as ``getattr(HistoryBuffer, 'mean')``) and NumPy
values. An older torch needs no list.
"""

from __future__ import annotations

import importlib
import pickle
from typing import Any, List

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from mmdet_ema.checkpoint.files import LOADS_SAFELY, STATISTICS

_ARRAYS = ('numpy._core.multiarray', 'numpy.core.multiarray')
_DTYPES = '?bBhHiIlLqQefdgFDGSU'


def allow_framework_types() -> None:
    """Allow-list the types in mmengine's checkpoints for this process."""
    if LOADS_SAFELY:
        torch.serialization.add_safe_globals(_globals())


def _globals() -> List[Any]:
    try:
        arrays = importlib.import_module(_ARRAYS[0])
    except ImportError:  # NumPy 1
        arrays = importlib.import_module(_ARRAYS[1])
    renamed = [
        (getattr(arrays, name), f'{module}.{name}')
        for module in _ARRAYS
        for name in ('_reconstruct', 'scalar')
    ]
    dtypes = {type(np.dtype(kind)) for kind in _DTYPES}
    own = [HistoryBuffer, (_statistics_method, 'builtins.getattr')]
    return [*own, np.ndarray, np.dtype, *renamed, *dtypes]


def _statistics_method(owner: Any, name: str) -> Any:
    """Stand in for ``getattr`` while a file is read.

    The real one would hand a malicious file any attribute of what is
    allow-listed.
    """
    if owner is HistoryBuffer and name in STATISTICS:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(
        f'the file asks for the attribute {name!r} of {owner!r}, which a '
        f'checkpoint of mmengine does not hold.'
    )
