"""The words of mmcv's ``EMAHook``, of mmdet 2's two hooks and of BEVDet's.

A config that says them gets what those hooks were meant to do, with their
defaults. Their defects are not kept: the warm-up fires (theirs compares a
ramp of the decay with the momentum), and the averaging window does not change
with ``interval``.
"""

from __future__ import annotations

import math
from typing import Any, Dict, Mapping, Optional

from mmdet_ema.checks import check_count, check_flag, check_number
from mmdet_ema.errors import OptionError, show
from mmdet_ema.schedules import Schedule, make_schedule
from mmdet_ema.training.openmmlab_words import check_words, decay_of
from mmdet_ema.training.options import (
    NAMES,
    HookOptions,
    parse_options,
    refuse_unknown,
)
from mmdet_ema.training.schedule_choice import ScheduleChoice, choose_native

WORDS = (
    *('warm_up', 'total_iter', 'skip_buffers', 'resume_from'),
    'state_dict_holds',
)
TOTAL_ITER = 2000.0
WARM_UP = 100
MEGVII_DECAY = 0.999

_EXP, _LINEAR = 'ExpMomentumEMAHook', 'LinearMomentumEMAHook'
_MEGVII = 'MEGVIIEMAHook'
_FIXED = {
    _EXP: ('total_iter', 'tau'),
    _LINEAR: ('warm_up',),
    _MEGVII: ('init_updates', 'tau'),
}
_RAMPS = ('warm_up', 'total_iter', 'tau', 'schedule', 'ema_type', 'gamma')


def parse_words(hook: str, given: Mapping[str, Any]) -> HookOptions:
    """Check the options of one of the hooks.

    Args:
        hook: Name of the hook: ``EMAHook``, ``ExpMomentumEMAHook``,
            ``LinearMomentumEMAHook`` or ``MEGVIIEMAHook``.
        given: Options by name; those that are None are left out.

    Returns:
        The checked options.

    Raises:
        OptionError: If an option is unknown, out of range or contradicts
            another one.
    """
    given = {name: x for name, x in given.items() if x is not None}
    megvii = ('init_updates', 'resume') if hook == _MEGVII else ()
    known = (*NAMES, *WORDS, *megvii)
    unknown = {name: x for name, x in given.items() if name not in known}
    refuse_unknown(unknown, hook, known)
    _check_ramps(hook, given)
    kind = _kind_of(hook, given)
    options = {n: x for n, x in given.items() if n not in (*WORDS, *megvii)}
    options.update(_update_buffers(kind, hook, given))
    if kind is None:
        return parse_options(**options)
    words = {n: options.pop(n, None) for n in ('decay', 'momentum')}
    tau = options.pop('tau', None)
    check_words(words['decay'], None, None, None, words['momentum'], None)
    if kind == _MEGVII and words['momentum'] is None:
        words['decay'] = given.get('decay', MEGVII_DECAY)
    rate = decay_of(words['decay'], words['momentum'])
    if kind == _MEGVII:
        ramp = dict(type='exponential', init_updates=given['init_updates'])
        choice = choose_native(ramp, rate, tau, None)
    elif kind == _EXP:
        choice = _exponential(rate, given.get('total_iter', tau))
    else:
        choice = _warm_up(rate, given.get('warm_up', WARM_UP), hook)
    return parse_options(choice=choice, **options)


def _exponential(decay: float, total_iter: Any) -> ScheduleChoice:
    """``d(n) = decay * (1 - exp(-n / total_iter))``: our own default."""
    total = TOTAL_ITER if total_iter is None else total_iter
    total = check_number('total_iter', total, 0, math.inf, low_open=True)
    schedule = make_schedule('exponential', dict(decay=decay, tau=total))
    return ScheduleChoice(lambda steps: schedule)


def _warm_up(decay: float, warm_up: Any, hook: str) -> ScheduleChoice:
    """``d(n) = min(decay, n / (warm_up + n - 1))``.

    mmcv's hook updates at the first of ``interval`` iterations, mmdet's at
    the last one.
    """
    warm_up = check_count('warm_up', warm_up, 1, hint='1 is no warm-up.')
    schedule = Schedule(
        'warm_up',
        lambda n: min(decay, n / (warm_up + n - 1)),
        dict(momentum=round(1 - decay, 12), warm_up=warm_up),
        decay,
    )
    phase = 1 if hook == 'EMAHook' else 0
    return ScheduleChoice(lambda steps: schedule, phase)


def _kind_of(hook: str, given: Mapping[str, Any]) -> Any:
    """Return which of the hooks the words mean; None for none of them."""
    if hook in _FIXED:
        return hook
    if 'total_iter' in given:
        return _EXP
    others = {'schedule', 'tau', 'ema_type', 'gamma'}
    if 'warm_up' in given or ('momentum' in given and not others & set(given)):
        return _LINEAR
    bare = not (others | {'decay'}) & set(given)
    return _LINEAR if 'skip_buffers' in given and bare else None


def _check_ramps(hook: str, given: Mapping[str, Any]) -> None:
    """Refuse words of two ramps, and those of another hook."""
    found = [word for word in _RAMPS if word in given]
    allowed = _FIXED.get(hook, _RAMPS)
    for word in found:
        if word not in allowed:
            raise OptionError(
                f'{word}={show(given[word])} has no meaning for {hook}, whose '
                f'ramp is set by {allowed[0]}; leave it out, or use '
                f"dict(type='EMAHook', {word}=...)."
            )
    own = {'warm_up', 'total_iter'} & set(found)
    if own and len(found) > 1:
        both = ' and '.join(f'{word}={show(given[word])}' for word in found)
        raise OptionError(
            f'{both} each choose a ramp of the decay; give one of them.'
        )


def _update_buffers(
    kind: Any, hook: str, given: Mapping[str, Any]
) -> Dict[str, bool]:
    """Return ``update_buffers`` where ``skip_buffers`` or a default says."""
    if 'skip_buffers' in given:
        skip = check_flag('skip_buffers', given['skip_buffers'])
        if given.get('update_buffers', not skip) == skip:
            raise OptionError(
                f'skip_buffers={skip} and update_buffers='
                f'{given["update_buffers"]} contradict each other; give '
                f'update_buffers alone.'
            )
        return {'update_buffers': not skip}
    if kind is None or 'update_buffers' in given:
        return {}
    return {'update_buffers': kind in (_EXP, _MEGVII) or hook == _LINEAR}


def check_path(name: str, value: Any) -> Optional[str]:
    """Return an option that names a file, None if it is left out.

    Args:
        name: Name of the option.
        value: What the user gave.

    Returns:
        The path or URL.

    Raises:
        OptionError: If it is no text, or empty.
    """
    if value is None or (isinstance(value, str) and value):
        return value
    raise OptionError(
        f'{name}={show(value)} is no path of a checkpoint; give one as a '
        f'string, or leave {name} out.'
    )
