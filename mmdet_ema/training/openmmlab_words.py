"""OpenMMLab's words: ``ema_type``, ``momentum``, ``gamma``.

A config that says them gets the numbers of the class that it names, with
mmengine's defaults: the first update is a copy, float buffers are copied. The
defects of those classes are not kept: tied tensors are averaged once, and the
averaging window does not change with ``interval``.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, Optional

from mmdet_ema.checks import check_number
from mmdet_ema.errors import OptionError, did_you_mean, show
from mmdet_ema.schedules import Schedule
from mmdet_ema.training.spellings import instead_of

MOMENTUM = 0.0002
GAMMA = {'ExpMomentumEMA': 2000.0, 'MomentumAnnealingEMA': 100.0}
_HINT = 'momentum weighs the NEW value: momentum = 1 - decay.'


def check_words(
    decay: Any,
    tau: Any,
    schedule: Any,
    ema_type: Any,
    momentum: Any,
    gamma: Any,
) -> bool:
    """Return whether OpenMMLab's words are used; refuse contradictions.

    Args:
        decay: The option ``decay``, None if left out; so for all of them.
        tau: The option ``tau``.
        schedule: The option ``schedule``.
        ema_type: The option ``ema_type``.
        momentum: The option ``momentum``.
        gamma: The option ``gamma``.

    Returns:
        True if any of ``ema_type``, ``momentum``, ``gamma`` is given.

    Raises:
        OptionError: If the words contradict each other.
    """
    if decay is not None and momentum is not None:
        raise OptionError(
            f'decay={show(decay)} and momentum={show(momentum)} are both '
            f'given; they are one option, momentum = 1 - decay. Give decay '
            f'alone.'
        )
    word = 'ema_type' if ema_type is not None else 'gamma'
    if (ema_type is not None or gamma is not None) and schedule is not None:
        raise OptionError(
            f'schedule={show(schedule)} and {word} are both given; write '
            f'schedule=dict(type=..., **options) without {word}.'
        )
    words = any(x is not None for x in (ema_type, momentum, gamma))
    if words and tau is not None and schedule is None:
        raise OptionError(
            f"tau={show(tau)} goes with schedule='exponential'; with "
            f'ema_type, momentum or gamma the ramp constant is called gamma '
            f"(ema_type='ExpMomentumEMA')."
        )
    return words


def decay_of(decay: Optional[float], momentum: Optional[float]) -> float:
    """Return the decay that ``decay`` or ``momentum`` says.

    Args:
        decay: The option, None if left out.
        momentum: The option, None if left out; 0.0002 if both are.

    Returns:
        The decay.

    Raises:
        OptionError: If the momentum is not in (0, 1).
    """
    if decay is not None:
        return check_number('decay', decay, 0, 1, high_open=True)
    momentum = MOMENTUM if momentum is None else momentum
    ends = dict(low_open=True, high_open=True, hint=_HINT)
    return 1 - check_number('momentum', momentum, 0, 1, **ends)  # type: ignore[arg-type]


def family_schedule(
    ema_type: Any, decay: float, gamma: Optional[float], interval: int
) -> Schedule:
    """Return the schedule of one of OpenMMLab's averaging classes.

    Args:
        ema_type: Name of the class, with or without its scope
            (``mmdet.ExpMomentumEMA``); None for ``ExponentialMovingAverage``.
        decay: ``1 - momentum``.
        gamma: The class's ``gamma``; None for its default.
        interval: Steps between updates.

    Returns:
        The schedule; its first update is a copy.

    Raises:
        OptionError: If the name is unknown or the class has no gamma.
    """
    name = _family_name(ema_type)
    if gamma is not None and name not in GAMMA:
        raise OptionError(
            f'gamma={show(gamma)} has no meaning for ema_type={name!r}; leave '
            f'it out, or use one of {", ".join(GAMMA)}.'
        )
    gamma = GAMMA.get(name, 1.0) if gamma is None else gamma
    gamma = check_number('gamma', gamma, 0, math.inf, low_open=True)
    function = _FAMILIES[name](decay, gamma, interval)
    if name == 'StochasticWeightAverage':
        return Schedule(name, function)
    options = dict(momentum=round(1 - decay, 12))
    if name in GAMMA:
        options['gamma'] = gamma
    return Schedule(name, function, options, decay)


def is_family(ema_type: Any) -> bool:
    """Return whether ``ema_type`` names one of OpenMMLab's own classes.

    Args:
        ema_type: A name, with or without scope, or a class.
    """
    name = getattr(ema_type, '__name__', ema_type)
    return isinstance(name, str) and name.rpartition('.')[2] in _FAMILIES


def _family_name(ema_type: Any) -> str:
    if ema_type is None:
        return 'ExponentialMovingAverage'
    name = getattr(ema_type, '__name__', ema_type)
    short = name.rpartition('.')[2] if isinstance(name, str) else ''
    if short not in _FAMILIES:
        raise OptionError(
            f'ema_type={show(ema_type)} is not known; choose one of '
            f'{", ".join(map(repr, _FAMILIES))}.'
            f'{instead_of(short) or did_you_mean(short, _FAMILIES)}'
        )
    return str(short)


def _constant(decay: float, gamma: float, interval: int) -> _Function:
    return lambda n: decay if n > 1 else 0.0


def _annealing(decay: float, gamma: float, interval: int) -> _Function:
    return lambda n: 1 - max(1 - decay, gamma / (gamma + (n - 1)))


def _exponential(decay: float, gamma: float, interval: int) -> _Function:
    return lambda n: -decay * math.expm1(-n / gamma) if n > 1 else 0.0


def _mean(decay: float, gamma: float, interval: int) -> _Function:
    """Equal weights for the weights of steps 1, 1 + interval, ..."""

    def function(n: int) -> float:
        taken = (n - 1) // interval + 1
        return (taken - 1) / taken if (n - 1) % interval == 0 else 1.0

    return function


_Function = Callable[[int], float]
_FAMILIES: Dict[str, Callable[[float, float, int], _Function]] = {
    'ExpMomentumEMA': _exponential,
    'ExponentialMovingAverage': _constant,
    'MomentumAnnealingEMA': _annealing,
    'StochasticWeightAverage': _mean,
}
