"""Errors that a user can cause; every message says what to do."""

from __future__ import annotations

import difflib
from typing import Any, Iterable

_LONGEST = 100


class OptionError(ValueError):
    """An option of the hook, the averager or a schedule is wrong."""


class CheckpointError(ValueError):
    """A checkpoint file cannot be used for what was asked of it."""


class NonFiniteError(FloatingPointError):
    """A step left NaN or Inf in the weights under ``nonfinite='raise'``."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for a near miss, else an empty string.

    Args:
        word: What was given.
        allowed: What could have been given.

    Returns:
        A sentence with a leading space, or an empty string.
    """
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f' Did you mean {close[0]!r}?' if close else ''


def show(value: Any) -> str:
    """Return ``repr(value)`` for a message: on one line, and not endless.

    Args:
        value: What a user gave; of any kind and size.

    Returns:
        The text; its middle is left out where it is longer than 100.
    """
    text = ' '.join(repr(value).split())
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2
    return f'{text[:half]} ... {text[-half:]} ({len(text)} characters)'
