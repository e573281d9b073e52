"""The state of the caches in which a call is timed.

'cold': a large buffer is read just before, as a forward and a backward pass
would, so that weights and averages come from memory. 'hot': the same call was
made just before.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable

import torch

MEGABYTE = 2**20
_L3 = Path('/sys/devices/system/cpu/cpu0/cache/index3/size')
_SETTINGS = ('cold', 'hot')

Prepare = Callable[[Callable[[], object]], object]


def prepare_for(setting: str, device: str) -> Prepare:
    """Return what makes the caches ready for a call.

    Args:
        setting: 'cold' or 'hot'.
        device: 'cpu' or 'cuda'.

    Returns:
        Called with the call that is timed next.
    """
    assert setting in _SETTINGS
    if setting == 'hot':
        return lambda call: call()
    size = flush_bytes(device)
    # read, not written: foreign dirty lines would be written back in the call
    buffer = torch.ones(size // 4, device=device)
    return lambda _: buffer.sum()


def flush_bytes(device: str) -> int:
    """Return twice the last cache: 64 to 512 MB, or 256 MB on a GPU."""
    if device != 'cpu':
        return 256 * MEGABYTE
    return min(max(2 * _last_cache(), 64 * MEGABYTE), 512 * MEGABYTE)


def _last_cache() -> int:
    if not _L3.is_file():
        return 0
    found = re.fullmatch(r'(\d+)([KM])\s*', _L3.read_text())
    if found is None:
        return 0
    return int(found[1]) * (MEGABYTE if found[2] == 'M' else 1024)
