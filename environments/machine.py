"""What the set-up needs of the machine, looked at before anything is done."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from .console import SetupError

TESTED_PYTHON = (3, 11)
GIBIBYTE = 2**30
BYTES_PER_JOB = 3 * GIBIBYTE // 2


def check_python() -> None:
    """Refuses a Python that the pinned versions were not tested with.

    Raises:
        SetupError: If this is another Python, or one without ensurepip.
    """
    if sys.version_info[:2] != TESTED_PYTHON:
        raise SetupError(
            f'this is Python {sys.version.split()[0]} ({sys.executable}); the '
            'pinned versions were tested with Python 3.11: install it and run '
            'again with PYTHON=python3.11'
        )
    if importlib.util.find_spec('ensurepip') is None:
        raise SetupError(
            'this Python cannot make virtual environments (no ensurepip): '
            'install python3.11-venv'
        )


def check_compiler() -> None:
    """Refuses a machine that cannot compile mmcv's operators.

    Raises:
        SetupError: If a C++ compiler or Python's headers are missing.
    """
    compiler = os.environ.get('CXX') or 'c++'
    if shutil.which(compiler.split()[0]) is None:
        raise SetupError(
            f'no C++ compiler ({compiler}), and mmcv has to be compiled: '
            'install g++ (Debian, Ubuntu: build-essential)'
        )
    header = Path(sysconfig.get_path('include')) / 'Python.h'
    if not header.is_file():
        raise SetupError(
            f'no {header}, and mmcv has to be compiled: install the headers '
            'of this Python (Debian, Ubuntu: python3.11-dev)'
        )


def check_disk(folder: Path, gibibytes: float) -> None:
    """Refuses a disk that is too full.

    Args:
        folder (Path): A folder that is, or will be, on that disk.
        gibibytes (float): What is going to be written there.

    Raises:
        SetupError: If less than that is free.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIBIBYTE
    if free < gibibytes:
        raise SetupError(
            f'{free:.1f} GiB are free at {folder}, but {gibibytes} GiB are '
            'needed: free some disk space and run again'
        )


def compile_jobs() -> int:
    """Returns how many files to compile at once: ``MAX_JOBS`` if it is set.

    Else one a core, but no more than fit into the free memory at 1.5 GiB each.
    """
    asked = os.environ.get('MAX_JOBS', '')
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(1, min(_cores(), _free_memory() // BYTES_PER_JOB))


def _cores() -> int:
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _free_memory(table: Path = Path('/proc/meminfo')) -> int:
    if table.exists():
        for line in table.read_text(encoding='ascii').splitlines():
            if line.startswith('MemAvailable:'):
                return int(line.split()[1]) * 1024
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
