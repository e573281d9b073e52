"""A lock that keeps two set-ups at once from breaking each other."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from .console import say


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds the lock file at ``path``; waits, and says so, while another does.

    Child processes inherit the lock: where the set-up is killed and its
    compiler is not, the next set-up waits for that compiler to end.

    Args:
        path (Path): The lock file. Made if it is not there, never removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    os.set_inheritable(descriptor, True)
    try:
        _take(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f'another set-up is at work; waiting for it ({path})')
        fcntl.flock(descriptor, fcntl.LOCK_EX)
