"""``paramwise_cfg``: the frameworks' options and ours, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Tuple

from mmdet_ema.checks import (
    check_choice,
    check_count,
    check_flag,
    check_number,
)
from mmdet_ema.errors import OptionError, did_you_mean, show
from mmdet_ema.optimizers.kinds import KINDS, WEIGHT

FACTORS = ('lr_mult', 'decay_mult')
MULTIPLIERS = (
    'norm_decay_mult',
    'bias_lr_mult',
    'bias_decay_mult',
    'dwconv_decay_mult',
    'flat_decay_mult',
    'dcn_offset_lr_mult',
)
_COUNTS = ('nominal_batch_size', 'batch_size', 'accumulation')
_NAMES = (
    'custom_keys',
    *MULTIPLIERS,
    'bypass_duplicate',
    'decay_kinds',
    *_COUNTS,
)


@dataclass(frozen=True)
class Paramwise:
    """Checked options of the constructor, as its docstring explains them.

    Attributes:
        custom_keys: Part of a parameter's name -> options of its group.
        multipliers: Option of the framework -> factor, where it was given.
        decay_kinds: Kinds whose weight decay is 1 where no option says more.
    """

    custom_keys: Mapping[str, Mapping[str, Any]]
    multipliers: Mapping[str, float]
    decay_kinds: Tuple[str, ...]
    nominal_batch_size: Optional[int]
    batch_size: Optional[int]
    accumulation: Optional[int]


def parse_paramwise(cfg: Optional[Mapping[str, Any]]) -> Paramwise:
    """Check ``paramwise_cfg``.

    Raises:
        OptionError: If an option is unknown or its value is not allowed.
    """
    if not isinstance(cfg, (Mapping, type(None))):
        raise OptionError(
            f'paramwise_cfg={show(cfg)} is not allowed; use a dict.'
        )
    given = {'nominal_batch_size': 64, **(cfg or {})}
    for name, value in given.items():
        if name not in _NAMES:
            raise OptionError(
                f'paramwise_cfg has no option {name!r} (given: '
                f'{name}={show(value)}); it takes {", ".join(_NAMES)}.'
                f'{did_you_mean(str(name), _NAMES)}'
            )
    # a tied parameter comes once, whatever this says
    check_flag('bypass_duplicate', given.get('bypass_duplicate', False))
    return Paramwise(
        custom_keys=_custom_keys(given.get('custom_keys', {})),
        multipliers={
            name: check_number(name, given[name], 0, math.inf)
            for name in MULTIPLIERS
            if given.get(name) is not None
        },
        decay_kinds=_kinds(given.get('decay_kinds', (WEIGHT,))),
        **{
            name: None
            if given.get(name) is None
            else check_count(name, given[name], 1)
            for name in _COUNTS
        },
    )


def _custom_keys(given: Any) -> Dict[str, Dict[str, Any]]:
    if not isinstance(given, Mapping):
        raise OptionError(
            f'custom_keys={show(given)} is not allowed; use a dict from a '
            f'part of a name to a dict, as in '
            f'dict(backbone=dict(lr_mult=0.1)).'
        )
    checked: Dict[str, Dict[str, Any]] = {}
    for key, options in given.items():
        name = f'custom_keys[{key!r}]'
        if not isinstance(options, Mapping):
            raise OptionError(
                f'{name}={show(options)} is not allowed; use a dict, as in '
                f'dict(lr_mult=0.1, decay_mult=0.0).'
            )
        checked[key] = dict(options)
        for word, value in options.items():
            near = did_you_mean(word, FACTORS)
            if word in FACTORS:
                number = check_number(f'{name} {word}', value, 0, math.inf)
                checked[key][word] = number
            elif near:  # other words are options of the optimizer
                raise OptionError(f'{name} has no option {word!r}.{near}')
    return checked


def _kinds(given: Any) -> Tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, (list, tuple)):
        raise OptionError(
            f'decay_kinds={show(given)} is not allowed; use a list of some of '
            f'{", ".join(map(repr, KINDS))}.'
        )
    return tuple(check_choice('decay_kinds', kind, KINDS) for kind in given)
