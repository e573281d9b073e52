"""What the set-up says: one short line a step, one line for a failure."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

PREFIX = 'setup:'


class SetupError(Exception):
    """A failure that is expected; its text says what to do about it."""


def say(text: str) -> None:
    """Prints one line.

    Args:
        text (str): The line, without its prefix.
    """
    print(PREFIX, text, flush=True)


def complain(text: str) -> None:
    """Prints one line to the error stream.

    Args:
        text (str): The line, without its prefix.
    """
    print(PREFIX, 'error:', text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Prints the name of a step, and its seconds when it is done.

    Args:
        name (str): What the step does, in a few words.
    """
    print(PREFIX, name, end=' ... ', flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print('stopped', flush=True)
        raise
    print(f'{time.monotonic() - start:.1f} s', flush=True)
