"""Which schedule the options of a hook ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

from mmdet_ema.averaging.update import Rule
from mmdet_ema.errors import OptionError, show
from mmdet_ema.schedules import (
    Schedule,
    ScheduleSpec,
    build_schedule,
    make_schedule,
    options_of,
    split_spec,
)
from mmdet_ema.training.openmmlab_words import decay_of, family_schedule

Maker = Callable[[int], Schedule]


@dataclass(frozen=True)
class ScheduleChoice:
    """A schedule as the options ask for it.

    Attributes:
        make: Makes it, given the steps that are planned.
        phase: Which step of an interval updates.
        no_effect: Sentences on options that change nothing.
        rule: Updates one average in the place of the schedule.
    """

    make: Maker
    phase: int = 0
    no_effect: Tuple[str, ...] = ()
    rule: Optional[Rule] = None


def choose_native(
    spec: Optional[ScheduleSpec],
    decay: Optional[float],
    tau: Optional[float],
    momentum: Optional[float],
) -> ScheduleChoice:
    """Choose one of our schedules.

    Args:
        spec: The option ``schedule``, None if left out; so for all of them.
        decay: The option ``decay``.
        tau: The option ``tau``.
        momentum: The option ``momentum``, in the place of ``decay``.

    Returns:
        The choice.

    Raises:
        OptionError: If an option is unknown, out of range or said twice.
    """
    spec = 'exponential' if spec is None else spec
    words = {'decay': decay, 'tau': tau, 'momentum': momentum}
    given = {k: v for k, v in words.items() if v is not None}
    if callable(spec) or (isinstance(spec, str) and '.' in spec):
        unused = tuple(_unused(w, 'a callable schedule') for w in given)
        return ScheduleChoice(_always(build_schedule(spec)), 0, unused)
    name, own = split_spec(spec)
    no_effect: List[str] = []
    for word, value in given.items():
        option, value = _as_option(word, value)
        if option not in options_of(name):
            no_effect.append(_unused(word, f'schedule {name!r}'))
        elif option not in own:
            own[option] = value
        elif not _agree(own[option], value):
            raise OptionError(
                f'{word}={show(given[word])} contradicts '
                f'schedule={show(spec)}; give {option} once.'
            )
    return ScheduleChoice(_late(name, own), 0, tuple(no_effect))


def choose_family(
    ema_type: Any,
    decay: Optional[float],
    momentum: Optional[float],
    gamma: Optional[float],
    interval: int,
) -> ScheduleChoice:
    """Choose the schedule of one of OpenMMLab's classes.

    Args:
        ema_type: Name of the class, None for ``ExponentialMovingAverage``.
        decay: The option ``decay``, None if left out; so for all of them.
        momentum: The option ``momentum``.
        gamma: The option ``gamma``.
        interval: Steps between updates; the first step updates.

    Returns:
        The choice.

    Raises:
        OptionError: If the name is unknown or an option out of range.
    """
    rate = decay_of(decay, momentum)
    schedule = family_schedule(ema_type, rate, gamma, interval)
    given = {'decay': decay, 'momentum': momentum}
    words = [k for k, v in given.items() if v is not None]
    unused: List[str] = []
    if schedule.limit is None:
        unused = [_unused(word, f'ema_type {ema_type!r}') for word in words]
    return ScheduleChoice(_always(schedule), 1, tuple(unused))


def choose_rule(name: str, rule: Rule) -> ScheduleChoice:
    """Choose a user's own rule.

    Args:
        name: What to call it.
        rule: Updates one average in place.

    Returns:
        The choice.
    """
    return ScheduleChoice(_always(Schedule(name, _no_decay)), 1, (), rule)


def _no_decay(n: int) -> float:
    raise AssertionError('a rule has no decay')


def _as_option(word: str, value: float) -> Tuple[str, float]:
    if word == 'momentum':
        return 'decay', decay_of(None, value)
    return word, value


def _agree(left: Any, right: Any) -> bool:
    """Compare two values; 1 - momentum is next to the decay, not on it."""
    try:
        return math.isclose(left, right, rel_tol=1e-9)
    except TypeError:
        return False


def _late(name: str, options: Dict[str, Any]) -> Maker:
    """Return a maker; what can be wrong with the options is found now."""
    waits = 'total_steps' in options_of(name) and 'total_steps' not in options
    if not waits:
        return _always(make_schedule(name, options))
    make_schedule(name, {'total_steps': 1, **options})
    return lambda steps: make_schedule(
        name, {'total_steps': max(steps, 1), **options}
    )


def _always(schedule: Schedule) -> Maker:
    return lambda steps: schedule


def _unused(option: str, by: str) -> str:
    return f'{option} has no effect with {by}.'
