"""From what a user writes for ``schedule`` to a :class:`Schedule`."""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
from typing import Any, Callable, Dict, Mapping, Tuple, Union

from mmdet_ema import schedules
from mmdet_ema.errors import OptionError, did_you_mean, show
from mmdet_ema.schedules import Schedule

ScheduleSpec = Union[str, Mapping[str, Any], Callable[[int], float]]

SCHEDULES: Dict[str, Callable[..., Schedule]] = {
    'annealing': schedules.annealing,
    'constant': schedules.constant,
    'cosine': schedules.cosine,
    'exponential': schedules.exponential,
    'half_life': schedules.half_life,
    'inverse': schedules.inverse,
    'mean': schedules.mean,
    'power': schedules.power,
}


def build_schedule(spec: ScheduleSpec, **options: Any) -> Schedule:
    """Build a schedule from a name, a dict or a callable.

    Args:
        spec: A name of :data:`SCHEDULES`, ``dict(type=name, **its options)``,
            a callable from n = 1, 2, ... to a decay in [0, 1], or the dotted
            path of one (``'my_package.my_schedule'``).
        **options: Options for the named schedule; those in a dict win.

    Returns:
        The schedule.

    Raises:
        OptionError: If the name or an option is unknown or out of range.

    Example:
        >>> build_schedule('constant', decay=0.9)(1)
        0.9
        >>> str(build_schedule(dict(type='inverse', decay=0.5)))
        'inverse(decay=0.5)'
    """
    if callable(spec):
        _refuse_options(spec, options)
        return spec if isinstance(spec, Schedule) else _from_callable(spec)
    if isinstance(spec, str) and '.' in spec:
        return build_schedule(_imported(spec), **options)
    name, own = split_spec(spec)
    return make_schedule(name, {**options, **own})


def split_spec(
    spec: Union[str, Mapping[str, Any]],
) -> Tuple[str, Dict[str, Any]]:
    """Split a name or dict into a known name and the options in the dict.

    Args:
        spec: A name or ``dict(type=name, **its options)``.

    Returns:
        The name and the options.

    Raises:
        OptionError: If it is neither, or the name is unknown.
    """
    own = dict(spec) if isinstance(spec, Mapping) else {'type': spec}
    name = own.pop('type', None)
    if not isinstance(name, str) or name not in SCHEDULES:
        near = did_you_mean(name, SCHEDULES) if isinstance(name, str) else ''
        raise OptionError(
            f'schedule={show(spec)} is not known; use one of '
            f'{", ".join(map(repr, SCHEDULES))}, dict(type=name, **options) '
            f'or a callable n -> decay.{near}'
        )
    return name, own


def make_schedule(name: str, options: Mapping[str, Any]) -> Schedule:
    """Make the named schedule with these options.

    Args:
        name: A name of :data:`SCHEDULES`.
        options: Its options.

    Returns:
        The schedule.

    Raises:
        OptionError: If an option is unknown, missing or out of range.
    """
    taken = options_of(name)
    for option in options:
        if option not in taken:
            allowed = ', '.join(taken) or 'no options'
            raise OptionError(
                f'schedule {name!r} has no option {option!r}; it takes '
                f'{allowed}.{_hint(option, taken)}'
            )
    for option, required in taken.items():
        if required and option not in options:
            raise OptionError(
                f'schedule {name!r} needs the option {option!r}; write '
                f'schedule=dict(type={name!r}, {option}=...).'
            )
    return SCHEDULES[name](**options)


def options_of(name: str) -> Dict[str, bool]:
    """Return the options of a named schedule and whether each is required.

    Args:
        name: A name of :data:`SCHEDULES`.

    Returns:
        Option names, in order, with True for a required one.
    """
    parameters = inspect.signature(SCHEDULES[name]).parameters.values()
    return {p.name: p.default is inspect.Parameter.empty for p in parameters}


def check_decay(schedule: Schedule, n: int) -> float:
    """Return d(n), checked: a callable of the user may return anything.

    Args:
        schedule: The schedule.
        n: The update number, from 1.

    Returns:
        The decay.

    Raises:
        OptionError: If the schedule does not return a number in [0, 1].
    """
    try:
        decay = schedule(n)
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(
            f'schedule {schedule} failed for n = {n} '
            f'({type(error).__name__}: {error}).'
        ) from error
    if isinstance(decay, numbers.Real) and 0 <= decay <= 1:
        return float(decay)
    raise OptionError(
        f'schedule {schedule} returned {show(decay)} for n = {n}; it must '
        f'return a decay in [0, 1].'
    )


def _imported(path: str) -> Callable[[int], float]:
    module, _, name = path.rpartition('.')
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(
            f'schedule={show(path)} cannot be imported ({error}); give the '
            f'path of a callable n -> decay, or a name: '
            f'{", ".join(SCHEDULES)}.'
        ) from None
    if not callable(function):
        raise OptionError(
            f'schedule={show(path)} is {show(function)}, no callable.'
        )
    return function  # type: ignore[no-any-return]


def _hint(option: str, taken: Mapping[str, bool]) -> str:
    if option == 'momentum' and 'decay' in taken:
        return ' decay = 1 - momentum.'
    return did_you_mean(option, taken)


def _refuse_options(spec: object, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        raise OptionError(
            f'{name}={show(value)} has no meaning beside the callable '
            f'schedule {show(spec)}; leave it out, or name a schedule that '
            f'takes it.'
        )


def _from_callable(function: Callable[[int], float]) -> Schedule:
    module = getattr(function, '__module__', '')
    name = getattr(function, '__qualname__', type(function).__name__)
    schedule = Schedule(f'{module}.{name}', function)
    decay = check_decay(schedule, 1)
    assert math.isfinite(decay)
    return schedule
