"""Decay schedules: pure functions of the update number n = 1, 2, ...

A decay weighs the OLD average: ``avg = d(n) * avg + (1 - d(n)) * raw``.
Every schedule here is a :class:`Schedule`, which is called with n and returns
d(n); any other callable from int to float will do in its place.

Operating points, the first n at which a schedule reaches a decay d (all with
their defaults; a test computes the table):

=================  ========  ========  =========
schedule           d = 0.9   d = 0.99  d = 0.999
=================  ========  ========  =========
``exponential``       4,607     9,231     14,027
``inverse``              80       890      8,990
``annealing``           901     9,901     99,901
``power``                32     1,000     31,623
``mean``                 10       100      1,000
=================  ========  ========  =========
"""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, Union

from mmdet_ema.checks import check_count, check_number
from mmdet_ema.errors import OptionError, did_you_mean, show

_FULL = 'decay = 1 would never move the average.'


@dataclass(frozen=True)
class Schedule:
    """A decay schedule with a name: call it with n to get d(n).

    Attributes:
        name: Name in the registry, or the qualified name of a callable.
        function: Maps the update number n = 1, 2, ... to the decay d(n).
        options: The options it was made with, plain values only.
        limit: The decay that it tends to, None where it has no such limit.
    """

    name: str
    function: Callable[[int], float]
    options: Dict[str, Any] = field(default_factory=dict)
    limit: Optional[float] = None

    def __call__(self, n: int) -> float:
        """Return the decay of update ``n``."""
        return self.function(n)

    def __str__(self) -> str:
        """Return ``name(option=value, ...)``."""
        options = ', '.join(f'{k}={v!r}' for k, v in self.options.items())
        return f'{self.name}({options})'


def exponential(
    decay: float = 0.9999, tau: float = 2000, init_updates: int = 0
) -> Schedule:
    """Exponential ramp, ``d(n) = decay * (1 - exp(-(init + n) / tau))``.

    The ramp of YOLOv5 (also YOLOX and RT-DETR). With the defaults it reaches
    0.9 at n = 4,607, 0.99 at 9,231 and 0.999 at 14,027. With init =
    ``init_updates`` it starts that far on: BEVDet's 10,560 leaves no ramp.

    Args:
        decay: Decay at the end of the ramp, in [0, 1).
        tau: Time constant of the ramp in updates, above 0.
        init_updates: Updates that count as done at the start, at least 0.

    Returns:
        The schedule.

    Raises:
        OptionError: If an option is out of range.
    """
    decay = check_number('decay', decay, 0, 1, high_open=True, hint=_FULL)
    hint = "For no ramp use schedule='constant'."
    tau = check_number('tau', tau, 0, math.inf, low_open=True, hint=hint)
    done = check_count('init_updates', init_updates, 0)
    options: Dict[str, Any] = dict(decay=decay, tau=tau)
    if done:  # else a schedule reads as it did in earlier checkpoints
        options['init_updates'] = done
    return Schedule(
        'exponential',
        lambda n: -decay * math.expm1(-(done + n) / tau),
        options,
        decay,
    )


def constant(decay: float = 0.9999) -> Schedule:
    """Constant decay, ``d(n) = decay``.

    The textbook EMA. The share of the initial weights that is left after n
    updates is ``decay ** n``: 37 % after 10,000 updates with the default.

    Args:
        decay: The decay, in [0, 1).

    Returns:
        The schedule.

    Raises:
        OptionError: If the decay is out of range.
    """
    decay = check_number('decay', decay, 0, 1, high_open=True, hint=_FULL)
    return Schedule('constant', lambda n: decay, dict(decay=decay), decay)


def inverse(decay: float = 0.9999) -> Schedule:
    """Inverse ramp, ``d(n) = min(decay, (1 + n) / (10 + n))``.

    TensorFlow's ``ExponentialMovingAverage(num_updates=n)``, torch_ema.
    Reaches 0.9 at n = 80, 0.99 at 890 and 0.999 at 8,990.

    Args:
        decay: Largest decay, in [0, 1).

    Returns:
        The schedule.

    Raises:
        OptionError: If the decay is out of range.
    """
    decay = check_number('decay', decay, 0, 1, high_open=True, hint=_FULL)
    return Schedule(
        'inverse',
        lambda n: min(decay, (1 + n) / (10 + n)),
        dict(decay=decay),
        decay,
    )


def annealing(decay: float = 0.9999, gamma: float = 100) -> Schedule:
    """Annealed momentum, ``d(n) = 1 - max(1 - decay, g / (g + n - 1))``.

    mmengine's ``MomentumAnnealingEMA`` with g = ``gamma``; the first update
    copies. Reaches 0.9 at n = 901, 0.99 at 9,901 and 0.999 at 99,901.

    Args:
        decay: Largest decay, in [0, 1).
        gamma: Constant of the annealing in updates, above 0.

    Returns:
        The schedule.

    Raises:
        OptionError: If an option is out of range.
    """
    decay = check_number('decay', decay, 0, 1, high_open=True, hint=_FULL)
    gamma = check_number('gamma', gamma, 0, math.inf, low_open=True)
    return Schedule(
        'annealing',
        lambda n: 1 - max(1 - decay, gamma / (gamma + (n - 1))),
        dict(decay=decay, gamma=gamma),
        decay,
    )


def power(
    decay: float = 0.9999,
    power: float = 2 / 3,
    inv_gamma: float = 1.0,
    min_decay: float = 0.0,
    update_after_step: int = 0,
) -> Schedule:
    """Power ramp, ``d(n) = 1 - (1 + s / inv_gamma) ** -power``.

    With ``s = n - update_after_step - 1``, clipped to [min_decay, decay], and
    0 (a copy) while s <= 0: timm's ``ModelEmaV3(use_warmup=True)``, diffusers'
    ``EMAModel(use_ema_warmup=True)``, ema-pytorch (its ``beta`` is ``decay``).
    With power = 2/3 it reaches 0.9 at n = 32, 0.99 at 1,000 and 0.999 at
    31,623 (the last value that timm's documentation quotes).

    Args:
        decay: Largest decay, in [0, 1).
        power: Exponent, above 0; 2/3 for runs of a million steps or more,
            3/4 for shorter ones.
        inv_gamma: Inverse multiplicative factor of the ramp, above 0.
        min_decay: Smallest decay after the copies, in [0, decay].
        update_after_step: Updates that only copy before the ramp begins.

    Returns:
        The schedule.

    Raises:
        OptionError: If an option is out of range.
    """
    decay = check_number('decay', decay, 0, 1, high_open=True, hint=_FULL)
    power = check_number('power', power, 0, math.inf, low_open=True)
    inv_gamma = check_number(
        'inv_gamma', inv_gamma, 0, math.inf, low_open=True
    )
    min_decay = check_number('min_decay', min_decay, 0, decay)
    after = check_count('update_after_step', update_after_step, 0)

    def function(n: int) -> float:
        s = n - after - 1
        ramp = 1 - (1 + s / inv_gamma) ** -power if s > 0 else 0.0
        return min(max(ramp, min_decay), decay) if s > 0 else 0.0

    options = dict(
        decay=decay,
        power=power,
        inv_gamma=inv_gamma,
        min_decay=min_decay,
        update_after_step=after,
    )
    return Schedule('power', function, options, decay)


def cosine(
    total_steps: int, decay: float = 0.996, end_decay: float = 1.0
) -> Schedule:
    """Cosine ramp from ``decay`` to ``end_decay`` over ``total_steps``.

    ``d(n) = end_decay - (end_decay - decay) * (cos(pi * t) + 1) / 2`` with
    ``t = min(n - 1, total_steps) / total_steps``: mmpretrain's ``CosineEMA``
    (momentum 0.004 to 0), from BYOL (arXiv:2006.07733).

    Args:
        total_steps: Length of the ramp in updates, at least 1. In a hook it
            may be left out: the planned steps of the run are taken.
        decay: Decay at the start, in [0, 1].
        end_decay: Decay at the end, in [0, 1].

    Returns:
        The schedule.

    Raises:
        OptionError: If an option is out of range.
    """
    total = check_count('total_steps', total_steps, 1)
    decay = check_number('decay', decay, 0, 1)
    end_decay = check_number('end_decay', end_decay, 0, 1)

    def function(n: int) -> float:
        t = min(n - 1, total) / total
        return (
            end_decay - (end_decay - decay) * (math.cos(math.pi * t) + 1) / 2
        )

    options = dict(total_steps=total, decay=decay, end_decay=end_decay)
    return Schedule('cosine', function, options)


def mean() -> Schedule:
    """Equal weights, ``d(n) = (n - 1) / n``.

    Stochastic weight averaging (SWA, arXiv:1803.05407): after n updates the
    average is the arithmetic mean of the n weights taken in. Reaches 0.99 at
    n = 100 and 0.999 at n = 1,000.

    Returns:
        The schedule.
    """
    return Schedule('mean', lambda n: (n - 1) / n)


def half_life(half_life: float = 1000) -> Schedule:
    """Constant decay given as a half-life, ``d(n) = 2 ** (-1 / half_life)``.

    Composer's unit: weights that are ``half_life`` updates old count half.
    A half-life of 693 updates is a decay of 0.999, 6,931 one of 0.9999.

    Args:
        half_life: Half-life in updates, above 0.

    Returns:
        The schedule.

    Raises:
        OptionError: If the half-life is out of range.
    """
    steps = check_number('half_life', half_life, 0, math.inf, low_open=True)
    decay = 2 ** (-1 / steps)
    if decay == 1:
        raise OptionError(
            f'half_life={half_life!r} is so long that the average would '
            f'never move; use at most 1e15.'
        )
    return Schedule('half_life', lambda n: decay, dict(half_life=steps), decay)


def to_the_power(schedule: Schedule, kappa: float) -> Schedule:
    """Return the schedule ``d(n) ** kappa``.

    Keeps the averaging window in samples when a step takes kappa times as
    many (Busbridge et al. 2023, arXiv:2307.13813).

    Args:
        schedule: The schedule.
        kappa: The exponent, above 0.

    Returns:
        The schedule; ``kappa`` is among its options.
    """
    limit = schedule.limit
    return Schedule(
        schedule.name,
        lambda n: schedule(n) ** kappa,
        {**schedule.options, 'kappa': kappa},
        None if limit is None else limit**kappa,
    )


ScheduleSpec = Union[str, Mapping[str, Any], Callable[[int], float]]

SCHEDULES: Dict[str, Callable[..., Schedule]] = {
    'annealing': annealing,
    'constant': constant,
    'cosine': cosine,
    'exponential': exponential,
    'half_life': half_life,
    'inverse': inverse,
    'mean': mean,
    'power': power,
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
        decay = schedule.function(n)
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


_NOTHING_LEFT = 1e-12


def decay_over(schedule: Schedule, first: int, last: int) -> float:
    """Return the decay of one update that stands for several steps.

    The product ``d(first) * ... * d(last)``: for a constant d over k steps
    ``d ** k``, so that the averaging window does not depend on the interval.

    Args:
        schedule: The schedule.
        first: First step that the update stands for, from 1.
        last: Last step that it stands for.

    Returns:
        The decay.

    Raises:
        OptionError: If the schedule returns no decay in [0, 1].
    """
    if first == last:
        return check_decay(schedule, last)
    return math.prod(check_decay(schedule, n) for n in range(first, last + 1))


def window(decay: float) -> float:
    """Return the effective averaging window of a decay in steps.

    ``1 / (1 - decay)``, the mean age plus one of what a constant decay
    averages; infinite for a decay of 1.

    Args:
        decay: A decay in [0, 1].

    Returns:
        The window in steps, at least 1.
    """
    return math.inf if decay >= 1 else 1 / (1 - decay)


def initial_share(schedule: Schedule, steps: int, first: int = 1) -> float:
    """Return the share of the initial weights in the average after a run.

    Args:
        schedule: The schedule.
        steps: Number of steps in the run.
        first: The step to begin with. Defaults to 1.

    Returns:
        ``d(first) * ... * d(steps)``; 0 as soon as it is below 1e-12.

    Raises:
        OptionError: If the schedule returns no decay in [0, 1].
    """
    share = 1.0
    for n in range(first, steps + 1):
        share *= check_decay(schedule, n)
        if share < _NOTHING_LEFT:
            return 0.0
    return share
