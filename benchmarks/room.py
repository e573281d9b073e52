"""Memory that is free, and that this process takes."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

_MEMINFO = Path('/proc/meminfo')
_STATUS = Path('/proc/self/status')
_CLEAR = Path('/proc/self/clear_refs')


def free_bytes(device: str) -> int:
    """Return the bytes that can be taken on a device; 0 if unknown."""
    if device != 'cpu':
        return int(torch.cuda.mem_get_info()[0])
    return _entry(_MEMINFO, 'MemAvailable')


def give_back(device: str) -> None:
    """Let the allocator of a device return to the system what is free."""
    gc.collect()
    if device != 'cpu':
        torch.cuda.empty_cache()
    # glibc's; others have none
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)


def check_room(needed: int, device: str) -> None:
    """Refuse what would not fit: the system would end this process.

    Args:
        needed: Bytes.
        device: 'cpu' or 'cuda'.

    Raises:
        MemoryError: If fewer are free.
    """
    give_back(device)
    free = free_bytes(device)
    if 0 < free < needed:
        raise MemoryError(
            f'{needed / 1e9:.1f} GB of memory are needed, '
            f'{free / 1e9:.1f} are free'
        )


class Gauge:
    """Bytes that are in use, and the most that were since :meth:`reset`.

    On the CPU the resident memory of this process.

    Args:
        device: 'cpu' or 'cuda'.
    """

    def __init__(self, device: str):
        self._device, self._cpu = device, device == 'cpu'

    def reset(self) -> None:
        """Forget the most that was in use."""
        give_back(self._device)
        if self._cpu:
            _CLEAR.write_text('5')
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def used(self) -> int:
        """Return the bytes in use."""
        if self._cpu:
            return _entry(_STATUS, 'VmRSS')
        return torch.cuda.memory_allocated()

    def most(self) -> int:
        """Return the most bytes that were in use since the reset."""
        if self._cpu:
            return _entry(_STATUS, 'VmHWM')
        return torch.cuda.max_memory_allocated()


def _entry(table: Path, name: str) -> int:
    """Return a row of a table of kilobytes, in bytes."""
    if table.is_file():
        for line in table.read_text().splitlines():
            if line.startswith(f'{name}:'):
                return int(line.split()[1]) * 1024
    return 0
