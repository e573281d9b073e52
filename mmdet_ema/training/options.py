"""Options of the hook: each is written here, and checked once."""

from __future__ import annotations

import functools
import inspect
import math
from dataclasses import dataclass, field, fields
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple

import torch

from mmdet_ema import checks, schedules
from mmdet_ema.averaging.averager import NONFINITE, further_schedules
from mmdet_ema.averaging.averages import MAIN, POSTHOC
from mmdet_ema.averaging.update import Rule
from mmdet_ema.checks import check_choice, check_count, check_flag
from mmdet_ema.errors import OptionError, show
from mmdet_ema.schedules import Schedule, ScheduleSpec, is_auto, options_of
from mmdet_ema.training import compatible
from mmdet_ema.training.compatible import COMPATIBLE, decay_of, instead_of

RAW = 'raw'
"""Name of the raw weights among the sets that are evaluated."""
_SIZES = ('s', 'm', 'l')


@dataclass(frozen=True)
class Choice:
    """What the options say of the decay."""

    make: Callable[[int], Schedule]  # given the steps that are planned
    phase: int = 0  # which step of an interval updates
    no_effect: Tuple[str, ...] = ()  # sentences on what changes nothing
    rule: Optional[Rule] = None  # updates one average without a schedule


def _option(
    default: Any, check: Any, averager: bool = False, **allowed: Any
) -> Any:
    """Define an option; the averager has those of that mark as well."""
    check = functools.partial(check, **allowed)
    metadata = {'check': check, 'averager': averager}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """Checked options of an EMA hook; ``EMAHook`` says what they mean.

    Raises:
        OptionError: If an option is out of range or contradicts another one.
    """

    decay: Any = None
    tau: Optional[float] = None
    schedule: Optional[ScheduleSpec] = None
    interval: int = _option(1, check_count, averager=True, least=1)
    begin_iter: int = _option(0, check_count, least=0)
    begin_epoch: int = _option(0, check_count, least=0)
    update_buffers: bool = _option(None, check_flag, averager=True)
    device: Optional[torch.device] = _option(  # noqa: RUF009
        None, lambda name, value: checks.check_device(value), averager=True
    )
    overlap: bool = _option(False, check_flag, averager=True)
    evaluate: Any = None
    nonfinite: str = _option(
        'skip', check_choice, averager=True, allowed=NONFINITE
    )
    strict_load: bool = _option(False, check_flag)
    scale_decay: bool = _option(False, check_flag)
    copied: Tuple[str, ...] = _option((), checks.check_patterns, averager=True)
    enabled: bool = _option(True, check_flag)
    averages: Any = _option(  # noqa: RUF009
        None, checks.check_averages, averager=True
    )
    posthoc: bool = _option(False, check_flag, averager=True)
    deploy: str = MAIN
    restart_epochs: Tuple[int, ...] = _option((), checks.check_epochs)
    recalibrate: int = _option(0, check_count, least=0)
    safe_save: bool = _option(True, check_flag)
    save_on_sigterm: bool = _option(False, check_flag)
    verify_ranks: bool = _option(False, check_flag)
    ema_type: Any = None
    momentum: Optional[float] = None
    gamma: Optional[float] = None
    evaluate_on_ema: Optional[bool] = None
    evaluate_on_origin: Optional[bool] = None
    # made of the others
    choice: Choice = None  # type: ignore[assignment]
    passes: Tuple[str, ...] = ()

    def __post_init__(self) -> None:
        theirs = _uses_compatible(self)
        if self.update_buffers is None:
            self._set('update_buffers', not theirs)
        on = (self.evaluate_on_ema, self.evaluate_on_origin)
        self._set('evaluate', compatible.evaluate_of(self.evaluate, *on))
        for option in fields(self):
            if option.metadata:
                value = getattr(self, option.name)
                check = option.metadata['check']
                self._set(option.name, check(option.name, value))
        check_choice('deploy', self.deploy, (MAIN, *self.further))
        self._set('passes', self._passes())
        if self.begin_iter and self.begin_epoch:
            raise OptionError(
                f'begin_iter={self.begin_iter} and begin_epoch='
                f'{self.begin_epoch} are both given; give the one that the '
                f'average should start at.'
            )
        if self.save_on_sigterm and not self.safe_save:
            raise OptionError(
                'save_on_sigterm=True needs safe_save=True: a scheduler does '
                'not wait until a file is whole. Leave safe_save out.'
            )
        if self.choice is None:
            family = self.ema_type is not None or self.schedule is None
            choose = _of_a_family if theirs and family else _of_our_own
            self._set('choice', choose(self))
        self.schedules_for(10**9)  # what is wrong is found now
        if self.scale_decay and self.fits_the_run:
            raise OptionError(
                "scale_decay=True and decay='auto' both choose the window; "
                'leave scale_decay out.'
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _passes(self) -> Tuple[str, ...]:
        """Return the sets of weights to evaluate, the main one last."""
        names, given = (MAIN, RAW, *self.further), self.evaluate
        if isinstance(given, str):
            check_choice('evaluate', given, (*names, 'both', 'all'))
            given = {'both': (MAIN, RAW), 'all': names}.get(given, (given,))
        if not isinstance(given, (list, tuple)) or not given:
            raise OptionError(
                f'evaluate={show(given)} is not allowed; use one of '
                f"{', '.join(map(repr, names))}, a list, 'both' or 'all'."
            )
        for name in given:
            check_choice('evaluate', name, names)
        # its metrics have the plain names, and hooks hear of all then
        main = self.deploy if self.deploy in given else given[0]
        passes = (*(x for x in dict.fromkeys(given) if x != main), main)
        for name in passes[:-1]:
            if name in _SIZES:
                raise OptionError(
                    f'averages {name!r} cannot be evaluated beside others: '
                    f'the name of their metric, bbox_mAP_{name}, is that of '
                    f'small, medium or large boxes. Choose another name.'
                )
        return passes

    @property
    def further(self) -> Tuple[str, ...]:
        """Names of the averages next to the main one."""
        return (*self.averages, *((POSTHOC,) if self.posthoc else ()))

    @property
    def fits_the_run(self) -> bool:
        """Whether the planned steps choose the decay of an average."""
        mine = dict(decay=self.decay, schedule=self.schedule)
        specs = [mine, *self.averages.values()]
        nested = [x.get('schedule') for x in specs]
        specs += [x for x in nested if isinstance(x, Mapping)]
        return any(is_auto(x.get('decay')) for x in specs)

    def schedules_for(self, planned: int) -> Dict[str, Schedule]:
        """Return all schedules by name, given the steps that are planned."""
        main = self.choice.make(planned)
        more = further_schedules(self.averages, planned)
        if self.posthoc:
            more[POSTHOC] = schedules.a_tenth(main)
        return {MAIN: main, **more}

    def of_the_averager(self, made: Mapping[str, Schedule]) -> Dict[str, Any]:
        """Return the options of :class:`WeightAverager`, schedules made."""
        shared = [f.name for f in fields(self) if f.metadata.get('averager')]
        further = {name: {'schedule': made[name]} for name in self.averages}
        for name, given in self.averages.items():
            if 'device' in given:
                further[name]['device'] = given['device']
        return {
            **{name: getattr(self, name) for name in shared},
            'schedule': made[MAIN],
            'averages': further,
            'phase': self.choice.phase,
            'rule': self.choice.rule,
        }


_DEFAULTS = {
    f.name: f.default
    for f in fields(Options)
    if f.name not in ('choice', 'passes')
}
NAMES = (*_DEFAULTS, 'priority')


def parse_options(choice: Optional[Choice] = None, **given: Any) -> Options:
    """Check the options of a hook; an adapter may know a choice of decay."""
    refuse_unknown({k: x for k, x in given.items() if k not in _DEFAULTS})
    return Options(choice=choice, **given)  # type: ignore[arg-type]


def refuse_unknown(
    unknown: Mapping[str, Any],
    hook: str = 'EMAHook',
    names: Sequence[str] = NAMES,
) -> None:
    """Refuse options that a hook does not have."""

    def hint(name: str, value: Any) -> str:
        kinds = schedules.SCHEDULES
        homes = [kind for kind in kinds if name in options_of(kind)]
        if instead_of(name) or not homes:
            return instead_of(name)
        own = f'schedule=dict(type={homes[0]!r}, {name}={show(value)})'
        return f' It is an option of a schedule: {own}.'

    checks.check_names(hook, unknown, names, hint)


def show_options(init: Any, **more: Any) -> None:
    """Let ``inspect.signature`` show what ``**options`` of a hook may be.

    ``more`` are the defaults of what a hook has besides ours.
    """
    parameters = dict(inspect.signature(init).parameters)
    kind = parameters.pop('options').KEYWORD_ONLY
    for name, default in {**_DEFAULTS, **more}.items():
        parameter = inspect.Parameter(name, kind, default=default)
        parameters.setdefault(name, parameter)
    init.__signature__ = inspect.Signature(list(parameters.values()))


def _uses_compatible(options: Options) -> bool:
    """Return whether compatible options are given; refuse contradictions."""
    decay, tau, schedule = options.decay, options.tau, options.schedule
    ema_type, momentum = options.ema_type, options.momentum
    if decay is not None and momentum is not None:
        raise OptionError(
            f'decay={show(decay)} and momentum={show(momentum)} are both '
            f'given; they are one option, momentum = 1 - decay. Give decay '
            f'alone.'
        )
    word = 'ema_type' if ema_type is not None else 'gamma'
    if schedule is not None and getattr(options, word) is not None:
        raise OptionError(
            f'schedule={show(schedule)} and {word} are both given; write '
            f'schedule=dict(type=..., **options) without {word}.'
        )
    given = any(getattr(options, x) is not None for x in COMPATIBLE)
    if given and tau is not None and schedule is None:
        raise OptionError(
            f"tau={show(tau)} goes with schedule='exponential'; with "
            f'{", ".join(COMPATIBLE)} the ramp constant is called gamma '
            f"(ema_type='ExpMomentumEMA')."
        )
    return given


def _of_a_family(options: Options) -> Choice:
    """Choose the schedule of one of OpenMMLab's classes."""
    kind = options.ema_type
    rate = decay_of(options.decay, options.momentum)
    schedule = compatible.family_schedule(
        kind, rate, options.gamma, options.interval
    )
    no_effect = [
        f'{word} has no effect with ema_type {kind!r}.'
        for word in ('decay', 'momentum')
        if schedule.limit is None and getattr(options, word) is not None
    ]
    return Choice(lambda planned: schedule, 1, tuple(no_effect))


def _of_our_own(options: Options) -> Choice:
    """Choose one of our schedules; its options may stand next to it."""
    spec = 'exponential' if options.schedule is None else options.schedule
    words = ('decay', 'tau', 'momentum')
    beside = {x: getattr(options, x) for x in words}
    beside = {word: x for word, x in beside.items() if x is not None}
    no_effect = []
    if callable(spec) or (isinstance(spec, str) and '.' in spec):
        schedule, by = schedules.build_schedule(spec), 'a callable schedule'
        no_effect = [f'{word} has no effect with {by}.' for word in beside]
        return Choice(lambda planned: schedule, 0, tuple(no_effect))
    name, own = schedules.split_spec(spec)
    for word, given in beside.items():
        option, value = word, given
        if word == 'momentum':
            option, value = 'decay', decay_of(None, given)
        if option not in options_of(name):
            no_effect.append(f'{word} has no effect with schedule {name!r}.')
        elif not _agree(own.setdefault(option, value), value):
            raise OptionError(
                f'{word}={show(given)} contradicts '
                f'schedule={show(spec)}; give {option} once.'
            )
    make = schedules.make_schedule
    return Choice(lambda planned: make(name, own, planned), 0, (*no_effect,))


def _agree(left: Any, right: Any) -> bool:
    """Compare two values; 1 - momentum is next to the decay, not on it."""
    try:
        same = left is right or (is_auto(left) and is_auto(right))
        return same or math.isclose(left, right, rel_tol=1e-9)
    except TypeError:
        return False
