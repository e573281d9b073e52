"""What the figures were measured on."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.caches import MEGABYTE, flush_bytes
from benchmarks.loading import find_peers

_PACKAGES = ('mmengine', 'mmdet', 'ema-pytorch', 'timm')


def describe() -> dict[str, str]:
    """Return the machine, versions and date, in words."""
    find_peers()
    return {
        'date': datetime.date.today().isoformat(),
        'processor': _processor(),
        'cores': str(cores()),
        'memory': _memory(),
        'gpu': _gpu(),
        'system': f'{platform.system()} {platform.machine()}',
        'python': platform.python_version(),
        'torch': torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        'read between cold calls': f'{flush_bytes("cpu") // MEGABYTE} MB',
        'load before the run': _load(),
    }


def cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    table = Path('/proc/cpuinfo')
    if table.is_file():
        for line in table.read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or 'unknown'


def _memory() -> str:
    total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return f'{total / 2**30:.0f} GiB'


def _gpu() -> str:
    if not torch.cuda.is_available():
        return 'none'
    return f'{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}'


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'not installed'


def _load() -> str:
    return f'{os.getloadavg()[0]:.2f}' if hasattr(os, 'getloadavg') else '?'
