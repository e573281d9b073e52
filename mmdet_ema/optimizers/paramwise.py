"""``paramwise_cfg``: the frameworks' options and ours, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Dict, Mapping, Optional, Tuple

from mmdet_ema.checks import (
    check_choice,
    check_count,
    check_flag,
    check_number,
)
from mmdet_ema.errors import OptionError, did_you_mean, show
from mmdet_ema.optimizers.kinds import KINDS, WEIGHT

NOMINAL = 64
MULTIPLIERS = (
    'norm_decay_mult',
    'bias_lr_mult',
    'bias_decay_mult',
    'dwconv_decay_mult',
    'flat_decay_mult',
    'dcn_offset_lr_mult',
)
_CUSTOM = ('lr_mult', 'decay_mult')
NAMES = (
    'custom_keys',
    *MULTIPLIERS,
    'bypass_duplicate',
    'decay_kinds',
    'nominal_batch_size',
    'batch_size',
    'accumulation',
)


@dataclass(frozen=True)
class Paramwise:
    """Checked options of the constructor.

    Attributes:
        custom_keys: Part of a parameter's name -> options of its group.
        multipliers: Option of the framework -> factor, where it was given.
        decay_kinds: Kinds whose weight decay is 1 where no option says more.
        nominal_batch_size: Samples a step that the weight decay was chosen
            for; None for a weight decay that is not scaled.
        batch_size: Samples that one process takes in an iteration; None
            where a hook has to find it.
        accumulation: Iterations to one optimizer step; None for what the
            framework is told.
    """

    custom_keys: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    multipliers: Mapping[str, float] = field(default_factory=dict)
    decay_kinds: Tuple[str, ...] = (WEIGHT,)
    nominal_batch_size: Optional[int] = NOMINAL
    batch_size: Optional[int] = None
    accumulation: Optional[int] = None

    def default_decay(self, kind: str) -> float:
        """Return the factor of the weight decay of a kind."""
        return 1.0 if kind in self.decay_kinds else 0.0


def parse_paramwise(cfg: Optional[Mapping[str, Any]]) -> Paramwise:
    """Check ``paramwise_cfg``.

    Args:
        cfg: What the config says; None for nothing.

    Returns:
        The options.

    Raises:
        OptionError: If an option is unknown or its value is not allowed.
    """
    if not isinstance(cfg, (Mapping, type(None))):
        raise OptionError(
            f'paramwise_cfg={show(cfg)} is not allowed; use a dict.'
        )
    given = dict(cfg or {})
    _refuse_unknown(given)
    check_flag('bypass_duplicate', given.pop('bypass_duplicate', False))
    nominal = given.get('nominal_batch_size', NOMINAL)
    return Paramwise(
        custom_keys=_custom_keys(given.get('custom_keys', {})),
        multipliers=_multipliers(given),
        decay_kinds=_kinds(given.get('decay_kinds', (WEIGHT,))),
        nominal_batch_size=_count('nominal_batch_size', nominal),
        batch_size=_count('batch_size', given.get('batch_size')),
        accumulation=_count('accumulation', given.get('accumulation')),
    )


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    for name in given:
        if name not in NAMES:
            raise OptionError(
                f'paramwise_cfg has no option {name!r} (given: '
                f'{name}={show(given[name])}); it takes {", ".join(NAMES)}.'
                f'{did_you_mean(str(name), NAMES)}'
            )


def _custom_keys(given: Any) -> Dict[str, Mapping[str, Any]]:
    if not isinstance(given, Mapping):
        raise OptionError(
            f'custom_keys={show(given)} is not allowed; use a dict from a '
            f'part of a name to a dict, as in '
            f'dict(backbone=dict(lr_mult=0.1)).'
        )
    return {key: _custom(key, options) for key, options in given.items()}


def _custom(key: str, options: Any) -> Dict[str, Any]:
    """Check the options of one key; unknown ones are the optimizer's."""
    name = f'custom_keys[{key!r}]'
    if not isinstance(options, Mapping):
        raise OptionError(
            f'{name}={show(options)} is not allowed; use a dict, as in '
            f'dict(lr_mult=0.1, decay_mult=0.0).'
        )
    checked = dict(options)
    for word, value in options.items():
        if word in _CUSTOM:
            checked[word] = check_number(f'{name} {word}', value, 0, math.inf)
        elif did_you_mean(word, _CUSTOM):
            raise OptionError(
                f'{name} has no option {word!r}.{did_you_mean(word, _CUSTOM)}'
            )
    return checked


def _multipliers(given: Mapping[str, Any]) -> Dict[str, float]:
    return {
        name: check_number(name, given[name], 0, math.inf)
        for name in MULTIPLIERS
        if given.get(name) is not None
    }


def _kinds(given: Any) -> Tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, (list, tuple)):
        raise OptionError(
            f'decay_kinds={show(given)} is not allowed; use a list of some of '
            f'{", ".join(map(repr, KINDS))}.'
        )
    return tuple(check_choice('decay_kinds', kind, KINDS) for kind in given)


def _count(name: str, value: Any) -> Optional[int]:
    return None if value is None else check_count(name, value, 1)
