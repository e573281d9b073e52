"""How long a call takes, on the CPU or on a GPU."""

from __future__ import annotations

import time
import warnings
from typing import Any, Callable, Dict

import torch

Call = Callable[[], object]
_CYCLES_PER_SECOND = 2e9
_SYNC_WARNING = 'called a synchronizing CUDA operation'


class HostClock:
    """Times a call on the CPU: 'wall', in seconds."""

    def measure(self, call: Call) -> Dict[str, float]:
        """Return the seconds that a call takes."""
        start = time.perf_counter()
        call()
        return {'wall': time.perf_counter() - start}


class DeviceClock:
    """Times a call on a GPU, in seconds.

    'wall' is from an idle device to an idle device, 'host' how long the call
    keeps the host, 'device' how long it keeps the device when the host is
    ahead, as in training: the device sleeps while the call is launched.
    """

    def measure(self, call: Call) -> Dict[str, float]:
        """Return the seconds that a call takes; it is called twice."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
        device = self._on_device(call, host)
        return {'wall': wall, 'host': host, 'device': device}

    def _on_device(self, call: Call, host: float) -> float:
        # untyped in torch
        event: Any = torch.cuda.Event
        sleep: Any = torch.cuda._sleep
        begin, end = (event(enable_timing=True) for _ in range(2))
        sleep(int((2 * host + 1e-4) * _CYCLES_PER_SECOND))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def clock_of(device: str) -> HostClock | DeviceClock:
    """Return the clock of a device."""
    return HostClock() if device == 'cpu' else DeviceClock()


def count_syncs(call: Call) -> int:
    """Return how often a call makes the host wait for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    return sum(_SYNC_WARNING in str(w.message) for w in caught)
