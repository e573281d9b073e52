"""Allow-list what mmengine's own checkpoints hold, and nothing more.

torch from 2.6 on reads files with ``weights_only=True``; mmengine 0.10.7 does
not know of it and cannot read what it wrote.
"""

from __future__ import annotations

from typing import Any, List

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


def allow_framework_types() -> None:
    """Allow-list the types in mmengine's checkpoints for this process."""
    if hasattr(torch.serialization, 'add_safe_globals'):
        torch.serialization.add_safe_globals(_types())


def _types() -> List[Any]:
    multiarray = getattr(np, '_core', None) or np.core
    arrays = multiarray.multiarray
    dtypes = [type(np.dtype(kind)) for kind in ('f4', 'f8', 'i4', 'i8', '?')]
    return [
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        arrays._reconstruct,
        arrays.scalar,
        *dtypes,
    ]
