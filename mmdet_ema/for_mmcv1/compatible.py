"""Compatible options: mmcv's ``EMAHook``, mmdet 2's two hooks and BEVDet's.

A config that has them gets what those hooks were meant to do, with their
defaults. Their defects are not kept: the warm-up fires (theirs compares a
ramp of the decay with the momentum), and the averaging window does not change
with ``interval``.
"""

from __future__ import annotations

import math
from typing import Any, Mapping, Optional

from mmdet_ema.checks import check_count, check_flag, check_number
from mmdet_ema.errors import OptionError, show
from mmdet_ema.schedules import Schedule, exponential
from mmdet_ema.training import options as ours
from mmdet_ema.training.compatible import decay_of
from mmdet_ema.training.options import NAMES, Choice, Options

COMPATIBLE = (
    *('warm_up', 'total_iter', 'skip_buffers', 'resume_from'),
    'state_dict_holds',
)

_TOTAL_ITER, _WARM_UP, _MEGVII_DECAY = 2000.0, 100, 0.999
_EXP, _LINEAR = 'ExpMomentumEMAHook', 'LinearMomentumEMAHook'
_MEGVII = 'MEGVIIEMAHook'
# hooks with a ramp of their own, and what sets it
_FIXED = {
    _EXP: ('total_iter', 'tau'),
    _LINEAR: ('warm_up',),
    _MEGVII: ('init_updates', 'tau'),
}
_RAMPS = ('warm_up', 'total_iter', 'tau', 'schedule', 'ema_type', 'gamma')


def parse_compatible(hook: str, given: Mapping[str, Any]) -> Options:
    """Check the options of the hook of that name; None is left out."""
    given = {name: x for name, x in given.items() if x is not None}
    megvii = ('init_updates', 'resume') if hook == _MEGVII else ()
    others = (*COMPATIBLE, *megvii)
    known = (*NAMES, *others)
    unknown = {name: x for name, x in given.items() if name not in known}
    ours.refuse_unknown(unknown, hook, known)
    _check_ramps(hook, given)
    kind = hook if hook in _FIXED else _meant(given)
    options = {name: x for name, x in given.items() if name not in others}
    options['update_buffers'] = _update_buffers(kind, hook, given)
    if kind is None:
        return ours.parse_options(**options)
    decay, momentum = given.get('decay'), given.get('momentum')
    if kind == _MEGVII and decay is momentum is None:
        decay = _MEGVII_DECAY
    rate, tau = decay_of(decay, momentum), options.pop('tau', _TOTAL_ITER)
    phase = 0
    if kind == _LINEAR:
        warm_up = check_count(
            'warm_up', given.get('warm_up', _WARM_UP), 1, '1 is no warm-up.'
        )
        schedule = Schedule(
            'warm_up',
            lambda n: min(rate, n / (warm_up + n - 1)),
            dict(momentum=round(1 - rate, 12), warm_up=warm_up),
            rate,
        )
        # mmcv's hook updates at the first of ``interval`` iterations, mmdet's
        # at the last one
        phase = 1 if hook == 'EMAHook' else 0
    else:
        if 'total_iter' in given:
            total = given['total_iter']
            tau = check_number('total_iter', total, 0, math.inf, low_open=True)
        schedule = exponential(rate, tau, given.get('init_updates', 0))
    return ours.parse_options(
        Choice(lambda planned: schedule, phase), **options
    )


def _meant(given: Mapping[str, Any]) -> Optional[str]:
    """Return which of the hooks an ``EMAHook`` means; None for our own."""
    if 'total_iter' in given:
        return _EXP
    alone = not {'schedule', 'tau', 'ema_type', 'gamma'} & set(given)
    bare = 'skip_buffers' in given and 'decay' not in given
    linear = 'warm_up' in given or (alone and ('momentum' in given or bare))
    return _LINEAR if linear else None


def _check_ramps(hook: str, given: Mapping[str, Any]) -> None:
    """Refuse options of two ramps, and those of another hook."""
    found = [name for name in _RAMPS if name in given]
    allowed = _FIXED.get(hook, _RAMPS)
    for name in found:
        if name not in allowed:
            raise OptionError(
                f'{name}={show(given[name])} has no meaning for {hook}, whose '
                f'ramp is set by {allowed[0]}; leave it out, or use '
                f"dict(type='EMAHook', {name}=...)."
            )
    if {'warm_up', 'total_iter'} & set(found) and len(found) > 1:
        both = ' and '.join(f'{name}={show(given[name])}' for name in found)
        raise OptionError(
            f'{both} each choose a ramp of the decay; give one of them.'
        )


def _update_buffers(
    kind: Optional[str], hook: str, given: Mapping[str, Any]
) -> Any:
    """Return what is given, what ``skip_buffers`` says, or the default."""
    update = given.get('update_buffers')
    if 'skip_buffers' in given:
        skip = check_flag('skip_buffers', given['skip_buffers'])
        if update == skip:
            raise OptionError(
                f'skip_buffers={skip} and update_buffers={update} contradict '
                f'each other; give update_buffers alone.'
            )
        return not skip
    if kind is None or update is not None:
        return update
    return kind in (_EXP, _MEGVII) or hook == _LINEAR
