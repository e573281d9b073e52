"""Checks of single option values: each names value, range and remedy.

Each returns the value, of the type that it should have, or raises an
:class:`OptionError` with the name of the option as the user writes it.
"""

from __future__ import annotations

import math
import numbers
import re
from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Tuple

import torch

from mmdet_ema.errors import OptionError, did_you_mean, show

# words of `evaluate` and of files, and what posthoc=True adds
_TAKEN = ('all', 'both', 'ema', 'posthoc', 'raw')


def check_names(
    owner: str,
    given: Mapping[str, Any],
    allowed: Iterable[str],
    hint: Callable[[str, Any], str] = lambda name, value: '',
) -> None:
    """Refuse options that ``owner`` does not have."""
    for name, value in given.items():
        if name not in allowed:
            near = hint(name, value) or did_you_mean(str(name), allowed)
            raise OptionError(
                f'{owner} has no option {name!r} (given: {name}='
                f'{show(value)}); it takes {", ".join(allowed)}.{near}'
            )


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
    """Check for a finite number between ``low`` and ``high``.

    An end that is open is not in the range; ``hint`` says what to do instead.
    """
    left = '(' if low_open else '['
    right = ')' if high_open or math.isinf(high) else ']'
    allowed = f'{left}{low:g}, {high:g}{right}'
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise OptionError(
            f'{name}={show(value)} is not a number; use one in {allowed}.'
        )
    try:
        number = float(value)
    except OverflowError:  # an int beyond the floats
        number = math.inf
    above = number > low if low_open else number >= low
    below = number < high if high_open else number <= high
    if not (math.isfinite(number) and above and below):
        raise OptionError(
            f'{name}={show(value)} is out of range; use a number in '
            f'{allowed}.{" " + hint if hint else ""}'
        )
    return number


def check_count(name: str, value: Any, least: int, hint: str = '') -> int:
    """Check for a whole number of at least ``least``."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise OptionError(
            f'{name}={show(value)} is out of range; use a whole number of at '
            f'least {least}.{" " + hint if hint else ""}'
        )
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """Check for a bool."""
    if not isinstance(value, bool):
        raise OptionError(
            f'{name}={show(value)} is not allowed; use True or False.'
        )
    return value


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Check for one of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        near = did_you_mean(value, allowed) if isinstance(value, str) else ''
        raise OptionError(
            f'{name}={show(value)} is not known; choose one of '
            f'{", ".join(map(repr, allowed))}.{near}'
        )
    return value


def check_patterns(name: str, value: Any) -> Tuple[str, ...]:
    """Check for a list or tuple of non-empty patterns of names."""
    listed = isinstance(value, (list, tuple))
    if not listed or not all(isinstance(x, str) and x for x in value):
        raise OptionError(
            f'{name}={show(value)} is not allowed; use a list of names of the '
            f"model's state_dict, in which '*' stands for any text, as "
            f"{name}=['*.queue']."
        )
    return tuple(value)


def check_epochs(name: str, value: Any) -> Tuple[int, ...]:
    """Check for a list or tuple of epochs that something begins before."""
    if not isinstance(value, (list, tuple)):
        raise OptionError(
            f'{name}={show(value)} is not allowed; use a list of epochs, '
            f'counted from 1, as {name}=[281].'
        )
    hint = 'The average starts before epoch 1 anyway.'
    return tuple(check_count(name, epoch, 2, hint) for epoch in value)


def check_averages(name: str, value: Any) -> Dict[str, Dict[str, Any]]:
    """Check for options of further averages by name, or None for none."""
    found = {} if value is None else value
    if not isinstance(found, Mapping) or not all(
        isinstance(key, str)
        and re.fullmatch(r'[A-Za-z]\w*', key)
        and isinstance(options, Mapping)
        for key, options in found.items()
    ):
        raise OptionError(
            f'{name}={show(value)} is not allowed; use a dict of options by '
            f'name, as {name}=dict(fast=dict(decay=0.999, tau=500)).'
        )
    for key in found:
        if key in _TAKEN:
            raise OptionError(
                f'{name}: the name {key!r} is taken ({", ".join(_TAKEN)}); '
                f'choose another one.'
            )
    return {key: dict(options) for key, options in found.items()}


def check_path(name: str, value: Any) -> Optional[str]:
    """Check for the path or URL of a checkpoint, or None."""
    if value is None or (isinstance(value, str) and value):
        return value
    raise OptionError(
        f'{name}={show(value)} is no path of a checkpoint; give one as a '
        f'string, or leave {name} out.'
    )


def check_device(device: Any) -> Optional[torch.device]:
    """Check for a device of this machine, or None for the parameters' own."""
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
