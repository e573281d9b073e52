"""Decay schedules: pure functions of the update number n = 1, 2, ...

A decay weighs the OLD average: ``avg = d(n) * avg + (1 - d(n)) * raw``.
Each function here returns a :class:`Schedule`, which is called with n and
returns d(n); any other callable from int to float will do instead. Lengths are
in updates; an option that is out of range raises :class:`OptionError`.

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
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, Union

from mmdet_ema.checks import check_count, check_number
from mmdet_ema.errors import OptionError, did_you_mean, show

AUTO = 'auto'
"""A decay that is chosen for the planned steps of a run."""


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

    def __reduce__(self) -> Tuple[Any, ...]:
        # functions that are made inside of others cannot be pickled
        made_here = getattr(self.function, '__module__', '') == __name__
        if made_here and self.name in SCHEDULES:
            return parse_schedule, (str(self),)
        fields = self.name, self.function, self.options, self.limit
        return Schedule, fields

    def __str__(self) -> str:
        options = ', '.join(f'{k}={v!r}' for k, v in self.options.items())
        return f'{self.name}({options})'


def exponential(
    decay: float = 0.9999, tau: float = 2000, init_updates: int = 0
) -> Schedule:
    """Exponential ramp, ``d(n) = decay * (1 - exp(-(init + n) / tau))``.

    The ramp of YOLOv5 (also YOLOX and RT-DETR).

    Args:
        decay: Decay at the end of the ramp, in [0, 1).
        tau: Time constant of the ramp, above 0.
        init_updates: ``init``: updates that count as done at the start, at
            least 0. BEVDet's 10,560 leaves no ramp.
    """
    decay = _below_one(decay)
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
    """Constant decay in [0, 1), ``d(n) = decay``: the textbook EMA.

    After n updates ``decay ** n`` of the average is initial weights: 37 %
    after 10,000 with the default.
    """
    decay = _below_one(decay)
    return Schedule('constant', lambda n: decay, dict(decay=decay), decay)


def inverse(decay: float = 0.9999) -> Schedule:
    """Inverse ramp to a decay in [0, 1), ``min(decay, (1 + n) / (10 + n))``.

    TensorFlow's ``ExponentialMovingAverage(num_updates=n)``, torch_ema.
    """
    decay = _below_one(decay)
    return Schedule(
        'inverse',
        lambda n: min(decay, (1 + n) / (10 + n)),
        dict(decay=decay),
        decay,
    )


def annealing(decay: float = 0.9999, gamma: float = 100) -> Schedule:
    """Annealed momentum, ``d(n) = 1 - max(1 - decay, g / (g + n - 1))``.

    mmengine's ``MomentumAnnealingEMA``; the first update copies.

    Args:
        decay: Largest decay, in [0, 1).
        gamma: ``g``, the constant of the annealing, above 0.
    """
    decay = _below_one(decay)
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

    Args:
        decay: Largest decay, in [0, 1).
        power: Exponent, above 0; 2/3 for runs of a million steps or more,
            3/4 for shorter ones.
        inv_gamma: Inverse multiplicative factor of the ramp, above 0.
        min_decay: Smallest decay after the copies, in [0, decay].
        update_after_step: Updates that only copy before the ramp begins.
    """
    decay = _below_one(decay)
    power = check_number('power', power, 0, math.inf, low_open=True)
    inv_gamma = check_number(
        'inv_gamma', inv_gamma, 0, math.inf, low_open=True
    )
    min_decay = check_number('min_decay', min_decay, 0, decay)
    after = check_count('update_after_step', update_after_step, 0)

    def function(n: int) -> float:
        s = n - after - 1
        if s <= 0:
            return 0.0
        ramp: float = 1 - (1 + s / inv_gamma) ** -power
        return min(max(ramp, min_decay), decay)

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
        total_steps: Length of the ramp, at least 1. In a hook it may be left
            out: the planned steps of the run are taken.
        decay: Decay at the start, in [0, 1].
        end_decay: Decay at the end, in [0, 1].
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
    """Arithmetic mean of the weights of all updates, ``d(n) = (n - 1) / n``.

    Stochastic weight averaging (SWA, arXiv:1803.05407).
    """
    return Schedule('mean', lambda n: (n - 1) / n)


def half_life(half_life: float = 1000) -> Schedule:
    """Constant decay by its half-life, ``d(n) = 2 ** (-1 / half_life)``.

    Composer's unit: weights that are ``half_life`` updates old, above 0, count
    half. 693 updates are a decay of 0.999, 6,931 one of 0.9999.
    """
    steps = check_number('half_life', half_life, 0, math.inf, low_open=True)
    decay = 2 ** (-1 / steps)
    if decay == 1:
        raise OptionError(
            f'half_life={half_life!r} is so long that the average would '
            f'never move; use at most 1e15.'
        )
    return Schedule('half_life', lambda n: decay, dict(half_life=steps), decay)


def _below_one(decay: Any) -> float:
    hint = 'decay = 1 would never move the average.'
    return check_number('decay', decay, 0, 1, high_open=True, hint=hint)


def to_the_power(schedule: Schedule, kappa: float) -> Schedule:
    """Return ``d(n) ** kappa``, with ``kappa`` among its options.

    Keeps the averaging window in samples when a step takes kappa times as
    many (Busbridge et al. 2023, arXiv:2307.13813).
    """
    limit = schedule.limit
    return Schedule(
        schedule.name,
        lambda n: schedule(n) ** kappa,
        {**schedule.options, 'kappa': kappa},
        None if limit is None else limit**kappa,
    )


def a_tenth(schedule: Schedule) -> Schedule:
    """Return the ramp to a decay whose window is a tenth of a schedule's.

    Its ``tau`` is a quarter of the one that the schedule has, if it has one;
    else half of the new window.
    """
    limit = schedule.limit
    if limit is None or limit < 0.9:
        found = 'no limit' if limit is None else f'the limit {limit:g}'
        raise OptionError(
            f'posthoc=True adds an average with a tenth of the window of the '
            f'main one, but the decay of {schedule} has {found}; use one of '
            f"0.9 or more, as schedule='exponential' and decay=0.9999, or "
            f'name the other average yourself, as '
            f'averages=dict(fast=dict(decay=0.999, tau=500)).'
        )
    # without the last digits, which a difference from 1 has lost
    momentum = round(10 * (1 - limit), 12)
    tau = schedule.options.get('tau', 2 / momentum) / 4
    return exponential(round(1 - momentum, 12), tau)


def is_auto(decay: Any) -> bool:
    """Return whether the planned steps are to choose a decay."""
    return isinstance(decay, str) and decay == AUTO  # it may be an array


def suited_window(planned: int) -> int:
    """Return the window in steps that suits a run: a tenth of it."""
    return max(planned // 10, 2)


def suited_ramp(window: int) -> int:
    """Return the ``tau`` that reaches most of it by the middle of the run."""
    return max(window // 2, 1)


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


def build_schedule(
    spec: ScheduleSpec, planned: Optional[int] = None, **options: Any
) -> Schedule:
    """Build a schedule from a name, a dict or a callable.

    Args:
        spec: A name of :data:`SCHEDULES`, ``dict(type=name, **its options)``,
            a callable from n = 1, 2, ... to a decay in [0, 1], or the dotted
            path of one (``'my_package.my_schedule'``).
        planned: Steps of the run, for ``decay='auto'`` and a 'cosine' without
            total_steps. Defaults to None, for not known.
        **options: Options for the named schedule; those in a dict win.

    Raises:
        OptionError: If the name or an option is unknown or out of range.

    Example:
        >>> build_schedule('constant', decay=0.9)(1)
        0.9
        >>> str(build_schedule(dict(type='inverse', decay=0.5)))
        'inverse(decay=0.5)'
    """
    if isinstance(spec, str) and '.' in spec:
        spec = _imported(spec)
    if not callable(spec):
        name, own = split_spec(spec)
        return make_schedule(name, {**options, **own}, planned)
    for name, value in options.items():
        raise OptionError(
            f'{name}={show(value)} has no meaning beside the callable '
            f'schedule {show(spec)}; leave it out, or name a schedule that '
            f'takes it.'
        )
    if isinstance(spec, Schedule):
        return spec
    module = getattr(spec, '__module__', '')
    name = getattr(spec, '__qualname__', type(spec).__name__)
    schedule = Schedule(f'{module}.{name}', spec)
    check_decay(schedule, 1)
    return schedule


def split_spec(
    spec: Union[str, Mapping[str, Any]],
) -> Tuple[str, Dict[str, Any]]:
    """Split a name or dict into a known name and the options in the dict."""
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


def make_schedule(
    name: str, given: Mapping[str, Any], planned: Optional[int] = None
) -> Schedule:
    """Make the named schedule with these options, for so many steps."""
    taken, options = options_of(name), dict(given)
    if planned is not None and 'total_steps' in taken:
        options.setdefault('total_steps', max(planned, 1))
    for option in options:
        if option not in taken:
            hint = did_you_mean(option, taken)
            if option == 'momentum' and 'decay' in taken:
                hint = ' decay = 1 - momentum.'
            raise OptionError(
                f'schedule {name!r} has no option {option!r}; it takes '
                f'{", ".join(taken) or "no options"}.{hint}'
            )
    for option, required in taken.items():
        if required and option not in options:
            raise OptionError(
                f'schedule {name!r} needs the option {option!r}; write '
                f'schedule=dict(type={name!r}, {option}=...).'
            )
    if is_auto(options.get('decay')):
        if planned is None:
            raise OptionError(
                f'decay={AUTO!r} needs the planned steps of a run, which a '
                f'hook knows and WeightAverager does not; give a number, '
                f'1 - 1 / window.'
            )
        if 'total_steps' in taken:
            raise OptionError(
                f'decay={AUTO!r} has no meaning for schedule {name!r}, of '
                f'which it is the decay at the start; give a number.'
            )
        suited = suited_window(planned)
        options['decay'] = 1 - 1 / suited
        if 'tau' in taken:
            options.setdefault('tau', suited_ramp(suited))
    return SCHEDULES[name](**options)


def parse_schedule(text: str) -> Schedule:
    """Return the schedule that a text names, as ``str`` of one does.

    Nothing is imported or run: a file may hold the text.
    """
    match = re.fullmatch(r'\s*(\w+)\(([^()]*)\)\s*', text)
    name, inside = match.groups() if match else ('', '')
    try:
        pairs = [x.split('=') for x in inside.split(',') if x.strip()]
        options: Dict[str, Any] = {
            key.strip(): int(x) if x.strip().isdigit() else float(x)
            for key, x in pairs
        }
        name, _ = split_spec(name)
    except ValueError:
        raise OptionError(
            f'{show(text)} is not the text of a schedule with a name; those '
            f'are {", ".join(SCHEDULES)}, as constant(decay=0.999).'
        ) from None
    kappa = options.pop('kappa', None)
    schedule = make_schedule(name, options)
    if kappa is None:
        return schedule
    kappa = check_number('kappa', kappa, 0, math.inf, low_open=True)
    return to_the_power(schedule, kappa)


def options_of(name: str) -> Dict[str, bool]:
    """Return the options of a named schedule and whether each is required."""
    parameters = inspect.signature(SCHEDULES[name]).parameters.values()
    return {p.name: p.default is inspect.Parameter.empty for p in parameters}


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


def check_decay(schedule: Schedule, n: int) -> float:
    """Return d(n), checked: a callable of the user may return anything."""
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


def decay_over(schedule: Schedule, first: int, last: int) -> float:
    """Return ``d(first) * ... * d(last)``: one update for several steps.

    For a constant d over k steps ``d ** k``, so that the averaging window does
    not depend on the interval.
    """
    decay = 1.0
    for n in range(first, last + 1):
        decay *= check_decay(schedule, n)
    return decay


def window(decay: float) -> float:
    """Return the effective averaging window of a decay in steps.

    ``1 / (1 - decay)``, the mean age plus one of what a constant decay
    averages; infinite for a decay of 1.
    """
    return math.inf if decay >= 1 else 1 / (1 - decay)


def initial_share(schedule: Schedule, steps: int, first: int = 1) -> float:
    """Return the share of the initial weights in the average after a run.

    ``d(first) * ... * d(steps)``; 0 as soon as it is below 1e-12.
    """
    share = 1.0
    for n in range(first, steps + 1):
        share *= check_decay(schedule, n)
        if share < 1e-12:
            return 0.0
    return share
