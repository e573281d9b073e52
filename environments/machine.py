"""What the set-up needs of the machine, looked at before anything is done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .console import SetupError
from .generation import Generation
from .interpreter import Interpreter

TESTED_PYTHON = '3.11'
GIBIBYTE = 2**30
BYTES_PER_JOB = 3 * GIBIBYTE // 2


def check_python(python: Interpreter, generation: Generation) -> None:
    """Refuses a Python that the pinned versions were not tested with.

    Args:
        python (Interpreter): The Python.
        generation (Generation): What it is for.

    Raises:
        SetupError: If it is another Python, or one that lacks something.
    """
    if not python.version.startswith(f'{TESTED_PYTHON}.'):
        raise SetupError(
            f'this is Python {python.version} ({python.executable}); the '
            'pinned versions were tested with Python 3.11: install it and run '
            f'again with {generation.variable}=python3.11'
        )
    if not python.ensurepip:
        raise SetupError(
            f'{python.executable} cannot make virtual environments (no '
            'ensurepip): install python3.11-venv'
        )
    _check_packages(python, generation)


def _check_packages(python: Interpreter, generation: Generation) -> None:
    for name, start in generation.system_packages.items():
        version = python.package_version(name)
        if not version.startswith(start):
            raise SetupError(
                f'{python.executable} has {version or "no"} {name}, but '
                f'{start}* is needed: {generation.advice}'
            )


def check_compiler(python: Interpreter) -> None:
    """Refuses a machine that cannot compile mmcv's operators.

    Args:
        python (Interpreter): The Python that the operators are for.

    Raises:
        SetupError: If a C++ compiler or headers are missing.
    """
    compiler = os.environ.get('CXX') or 'c++'
    if shutil.which(compiler.split()[0]) is None:
        raise SetupError(
            f'no C++ compiler ({compiler}), and mmcv has to be compiled: '
            'install g++ (Debian, Ubuntu: build-essential)'
        )
    _check_header(Path(python.headers, 'Python.h'), 'python3.11-dev')
    if 'torch' in python.packages:
        torch = Path(python.packages['torch'][1])
        header = torch / 'include' / 'torch' / 'extension.h'
        _check_header(header, 'libtorch-dev')


def _check_header(header: Path, package: str) -> None:
    if not header.is_file():
        raise SetupError(
            f'no {header}, and mmcv has to be compiled: install the headers '
            f'(Debian, Ubuntu: {package})'
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
