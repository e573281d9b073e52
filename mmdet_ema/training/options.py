"""Options of the hook: from what a config says to what will be done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Mapping, Optional, Sequence, Tuple, Union

import torch

from mmdet_ema.averaging.averager import NONFINITE
from mmdet_ema.averaging.update import Rule
from mmdet_ema.checks import (
    check_choice,
    check_count,
    check_device,
    check_flag,
    check_patterns,
)
from mmdet_ema.errors import OptionError, did_you_mean, show
from mmdet_ema.schedules import (
    SCHEDULES,
    Schedule,
    ScheduleSpec,
    options_of,
)
from mmdet_ema.training.openmmlab_words import check_words
from mmdet_ema.training.schedule_choice import (
    ScheduleChoice,
    choose_family,
    choose_native,
    choose_rule,
)
from mmdet_ema.training.spellings import instead_of

EVALUATE = ('ema', 'raw', 'both')
NAMES = (
    'decay',
    'tau',
    'schedule',
    'interval',
    'begin_iter',
    'begin_epoch',
    'update_buffers',
    'device',
    'overlap',
    'evaluate',
    'nonfinite',
    'strict_load',
    'scale_decay',
    'copied',
    'ema_type',
    'momentum',
    'gamma',
    'priority',
)


@dataclass(frozen=True)
class HookOptions:
    """Checked options of an EMA hook.

    Attributes:
        schedule_for: Makes the schedule, given the steps that are planned.
        interval: Steps between updates.
        phase: Which step of an interval updates.
        begin_iter: First iteration that counts, from 1 (0 is 1).
        begin_epoch: First epoch that counts, from 1 (0 is 1).
        update_buffers: Whether float buffers are averaged.
        device: Where the averages live; None for where the parameters are.
        overlap: Whether an update runs beside the next forward pass.
        evaluate: Which weights validation and test run on.
        nonfinite: What is done with NaN and Inf.
        strict_load: Whether a missing average is an error on resume.
        scale_decay: Whether another batch size scales the decay on resume.
        copied: Patterns of names that are copied, not averaged.
        no_effect: Options that were given and change nothing.
        rule: Updates one average in the place of the schedule.
    """

    schedule_for: Callable[[int], Schedule]
    interval: int
    phase: int
    begin_iter: int
    begin_epoch: int
    update_buffers: bool
    device: Optional[torch.device]
    overlap: bool
    evaluate: str
    nonfinite: str
    strict_load: bool
    scale_decay: bool = False
    copied: Tuple[str, ...] = ()
    no_effect: Tuple[str, ...] = ()
    rule: Optional[Rule] = None


FindRule = Callable[[Any, Mapping[str, Any]], Optional[Rule]]
"""Finds a user's averaging class by ``ema_type`` and its options."""


def parse_options(
    *,
    decay: Optional[float] = None,
    tau: Optional[float] = None,
    schedule: Optional[ScheduleSpec] = None,
    interval: int = 1,
    begin_iter: int = 0,
    begin_epoch: int = 0,
    update_buffers: Optional[bool] = None,
    device: Union[str, torch.device, None] = None,
    overlap: bool = False,
    evaluate: str = 'ema',
    nonfinite: str = 'skip',
    strict_load: bool = False,
    scale_decay: bool = False,
    copied: Sequence[str] = (),
    ema_type: Any = None,
    momentum: Optional[float] = None,
    gamma: Optional[float] = None,
    find_rule: Optional[FindRule] = None,
    choice: Optional[ScheduleChoice] = None,
    **more: Any,
) -> HookOptions:
    """Check the options of a hook; see ``EMAHook`` for what they mean.

    ``find_rule`` finds averaging classes of the user in the framework, and
    whatever else is given are options of such a class. ``choice`` is a
    schedule that an adapter has chosen by words of its own.

    Returns:
        The checked options.

    Raises:
        OptionError: If an option is unknown, out of range or contradicts
            another one.
    """
    own = {'momentum': momentum, 'gamma': gamma, 'interval': interval, **more}
    rule = find_rule(ema_type, own) if find_rule and ema_type else None
    if rule is None:
        refuse_unknown(more)
    interval = check_count('interval', interval, 1)
    _check_begin(begin_iter, begin_epoch)
    words = check_words(decay, tau, schedule, ema_type, momentum, gamma)
    if update_buffers is None:
        update_buffers = not words
    if choice is not None:
        pass
    elif rule is not None:
        choice = choose_rule(getattr(ema_type, '__name__', ema_type), rule)
    elif ema_type is not None or (words and schedule is None):
        choice = choose_family(ema_type, decay, momentum, gamma, interval)
    else:
        choice = choose_native(schedule, decay, tau, momentum)
    return HookOptions(
        schedule_for=choice.make,
        interval=interval,
        phase=choice.phase,
        begin_iter=begin_iter,
        begin_epoch=begin_epoch,
        update_buffers=check_flag('update_buffers', update_buffers),
        device=check_device(device),
        overlap=check_flag('overlap', overlap),
        evaluate=check_choice('evaluate', evaluate, EVALUATE),
        nonfinite=check_choice('nonfinite', nonfinite, NONFINITE),
        strict_load=check_flag('strict_load', strict_load),
        scale_decay=check_flag('scale_decay', scale_decay),
        copied=check_patterns('copied', copied),
        no_effect=choice.no_effect,
        rule=choice.rule,
    )


def refuse_unknown(
    unknown: Mapping[str, Any],
    hook: str = 'EMAHook',
    names: Sequence[str] = NAMES,
) -> None:
    """Refuse options that a hook does not have.

    Args:
        unknown: Their values by name.
        hook: Name of the hook. Defaults to 'EMAHook'.
        names: The options that it has.

    Raises:
        OptionError: If there are any.
    """
    for name, value in unknown.items():
        homes = [kind for kind in SCHEDULES if name in options_of(kind)]
        hint = did_you_mean(name, names)
        if homes:
            own = f'schedule=dict(type={homes[0]!r}, {name}={show(value)})'
            hint = f' It is an option of a schedule: {own}.'
        raise OptionError(
            f'{hook} has no option {name!r} (given: {name}={show(value)}); it '
            f'takes {", ".join(names)}.{instead_of(name) or hint}'
        )


def _check_begin(begin_iter: int, begin_epoch: int) -> None:
    check_count('begin_iter', begin_iter, 0)
    check_count('begin_epoch', begin_epoch, 0)
    if begin_iter and begin_epoch:
        raise OptionError(
            f'begin_iter={begin_iter} and begin_epoch={begin_epoch} are both '
            f'given; give the one that the average should start at.'
        )
