"""Checks of single option values: each names value, range and remedy."""

from __future__ import annotations

import math
import numbers
from typing import Any, Optional, Sequence, Tuple, Union

import torch

from mmdet_ema.errors import OptionError, did_you_mean, show


def check_number(
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    low_open: bool = False,
    high_open: bool = False,
    hint: str = '',
) -> float:
    """Return ``value`` as a float if it is a real number in the range.

    Args:
        name: Name of the option, as the user writes it.
        value: Value that was given.
        low: Lower end of the range.
        high: Upper end of the range; may be infinite.
        low_open: Whether ``low`` itself is excluded. Defaults to False.
        high_open: Whether ``high`` itself is excluded. Defaults to False.
        hint: A sentence on what to do. Defaults to ''.

    Returns:
        The value as a float.

    Raises:
        OptionError: If the value is no finite number or out of range.
    """
    allowed = _interval(low, high, low_open, high_open)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise OptionError(
            f'{name}={show(value)} is not a number; use one in {allowed}.'
        )
    number = _as_float(value)
    above = number > low if low_open else number >= low
    below = number < high if high_open else number <= high
    if not (math.isfinite(number) and above and below):
        raise OptionError(
            f'{name}={show(value)} is out of range; use a number in '
            f'{allowed}.{" " + hint if hint else ""}'
        )
    return number


def check_count(name: str, value: Any, least: int, hint: str = '') -> int:
    """Return ``value`` if it is a whole number of at least ``least``.

    Args:
        name: Name of the option, as the user writes it.
        value: Value that was given.
        least: Smallest value allowed.
        hint: A sentence on what to do. Defaults to ''.

    Returns:
        The value as an int.

    Raises:
        OptionError: If the value is no int or too small.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise OptionError(
            f'{name}={show(value)} is out of range; use a whole number of at '
            f'least {least}.{" " + hint if hint else ""}'
        )
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """Return ``value`` if it is a bool.

    Args:
        name: Name of the option, as the user writes it.
        value: Value that was given.

    Returns:
        The value.

    Raises:
        OptionError: If the value is not a bool.
    """
    if not isinstance(value, bool):
        raise OptionError(
            f'{name}={show(value)} is not allowed; use True or False.'
        )
    return value


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """Return ``value`` if it is one of the allowed words.

    Args:
        name: Name of the option, as the user writes it.
        value: Value that was given.
        allowed: Words that may be given.

    Returns:
        The value.

    Raises:
        OptionError: If the value is not among them.
    """
    if not isinstance(value, str) or value not in allowed:
        words = ', '.join(repr(word) for word in allowed)
        near = did_you_mean(value, allowed) if isinstance(value, str) else ''
        raise OptionError(
            f'{name}={show(value)} is not known; choose one of {words}.{near}'
        )
    return value


def check_patterns(name: str, value: Any) -> Tuple[str, ...]:
    """Return patterns of names if they are a list of text.

    Args:
        name: Name of the option, as the user writes it.
        value: Value that was given.

    Returns:
        The patterns.

    Raises:
        OptionError: If the value is no list or tuple of non-empty strings.
    """
    right = isinstance(value, (list, tuple)) and all(
        isinstance(pattern, str) and pattern for pattern in value
    )
    if not right:
        raise OptionError(
            f'{name}={value!r} is not allowed; use a list of names of the '
            f"model's state_dict, in which '*' stands for any text, as "
            f"{name}=['*.queue']."
        )
    return tuple(value)


def check_device(
    device: Union[str, torch.device, None],
) -> Optional[torch.device]:
    """Return the device of the averages, None for the parameters' own.

    Args:
        device: What the user gave.

    Returns:
        The device.

    Raises:
        OptionError: If it is no device, or not on this machine.
    """
    if device is None:
        return None
    try:
        found = torch.empty(0, device=device).device
        reason = 'it holds no values' if found.type == 'meta' else ''
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    if reason:
        raise OptionError(
            f'device={show(device)} cannot be used here ({reason}); use None, '
            f"'cpu' or a device of this machine."
        )
    return torch.device(device)


def _as_float(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an int beyond the floats
        return math.inf


def _interval(low: float, high: float, low_open: bool, high_open: bool) -> str:
    left = '(' if low_open else '['
    right = ')' if high_open or math.isinf(high) else ']'
    return f'{left}{low:g}, {high:g}{right}'
