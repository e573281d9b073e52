"""Compatible options: what OpenMMLab's configs and other projects say.

A config with ``ema_type``, ``momentum`` or ``gamma`` gets the numbers of the
class that it names, with mmengine's defaults: the first update is a copy,
float buffers are copied. The defects of those classes are not kept: tied
tensors are averaged once, and the averaging window does not change with
``interval``.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, Optional

from mmdet_ema import schedules
from mmdet_ema.checks import check_flag, check_number
from mmdet_ema.errors import OptionError, did_you_mean, show
from mmdet_ema.schedules import Schedule

COMPATIBLE = (
    *('ema_type', 'momentum', 'gamma'),
    *('evaluate_on_ema', 'evaluate_on_origin'),
)
MOMENTUM = 0.0002
GAMMA = {'ExpMomentumEMA': 2000.0, 'MomentumAnnealingEMA': 100.0}
_FAMILIES: Dict[str, Callable[[float, float], Schedule]] = {
    'ExpMomentumEMA': schedules.exponential,
    'ExponentialMovingAverage': lambda decay, gamma: schedules.constant(decay),
    'MomentumAnnealingEMA': schedules.annealing,
    'StochasticWeightAverage': lambda decay, gamma: schedules.mean(),
}


def decay_of(decay: Optional[float], momentum: Optional[float]) -> float:
    """Return the decay that ``decay`` or ``momentum`` says, or mmengine's."""
    if decay is not None:
        return check_number('decay', decay, 0, 1, high_open=True)
    if momentum is None:
        momentum = MOMENTUM
    ends = dict(low_open=True, high_open=True)
    hint = 'momentum weighs the NEW value: momentum = 1 - decay.'
    return 1 - check_number('momentum', momentum, 0, 1, **ends, hint=hint)


def evaluate_of(
    evaluate: Optional[str], on_ema: Any, on_origin: Any
) -> Optional[str]:
    """Return what to evaluate; mmpretrain's hook says so by two flags."""
    flags = {'evaluate_on_ema': on_ema, 'evaluate_on_origin': on_origin}
    given = {name: x for name, x in flags.items() if x is not None}
    for name, flag in given.items():
        check_flag(name, flag)
    if not given:
        return 'ema' if evaluate is None else evaluate
    meant = 'raw' if on_ema is False else 'both' if on_origin else 'ema'
    if evaluate not in (None, meant):
        words = ' and '.join(f'{name}={x}' for name, x in given.items())
        raise OptionError(
            f'evaluate={show(evaluate)} contradicts {words}, which is '
            f'evaluate={meant!r}; give evaluate alone.'
        )
    return meant


def family_schedule(
    ema_type: Any, decay: float, gamma: Optional[float], interval: int
) -> Schedule:
    """Return the schedule of one of OpenMMLab's averaging classes.

    ``ema_type`` is a class or its name, with or without a scope
    (``mmdet.ExpMomentumEMA``); None for ``ExponentialMovingAverage``.
    """
    name = 'ExponentialMovingAverage'
    if ema_type is not None:
        name = _name_of(ema_type)
    if name not in _FAMILIES:
        raise OptionError(
            f'ema_type={show(ema_type)} is not known; choose one of '
            f'{", ".join(map(repr, _FAMILIES))}.'
            f'{instead_of(name) or did_you_mean(name, _FAMILIES)}'
        )
    if gamma is not None and name not in GAMMA:
        raise OptionError(
            f'gamma={show(gamma)} has no meaning for ema_type={name!r}; leave '
            f'it out, or use one of {", ".join(GAMMA)}.'
        )
    gamma = GAMMA.get(name, 1.0) if gamma is None else gamma
    gamma = check_number('gamma', gamma, 0, math.inf, low_open=True)
    schedule = _FAMILIES[name](decay, gamma)
    if name == 'StochasticWeightAverage':

        def of_updates(n: int) -> float:
            # steps 1, 1 + interval, ... have the decays of updates 1, 2, ...
            updates, others = divmod(n - 1, interval)
            return 1.0 if others else schedule(updates + 1)

        return Schedule(name, of_updates)
    options = dict(momentum=round(1 - decay, 12))
    if name in GAMMA:
        options['gamma'] = gamma
    return Schedule(
        name, lambda n: schedule(n) if n > 1 else 0.0, options, decay
    )


def is_family(ema_type: Any) -> bool:
    """Return whether a class or its name is one of OpenMMLab's own."""
    return _name_of(ema_type) in _FAMILIES


def _name_of(ema_type: Any) -> str:
    name = getattr(ema_type, '__name__', ema_type)
    return name.rpartition('.')[2] if isinstance(name, str) else ''


_SAME = {
    'begin_epoch': ('ema_start_epoch', 'start_epoch'),
    'begin_iter': ('begin_step', 'start_iter', 'start_iters', 'start_step'),
    'decay': ('beta', 'decay_rate', 'ema_decay', 'ema_rate'),
    'device': ('cpu_offload', 'ema_device', 'offload'),
    'ema_type': ('ema_model', 'swa'),
    'evaluate': ('eval_with_ema', 'use_ema', 'validate_original_weights'),
    'interval': ('ema_interval', 'update_every', 'update_interval'),
    'tau': ('ramp', 'warmup_steps'),
    'update_buffers': ('average_buffers', 'include_buffers', 'use_buffers'),
}
_INSTEAD: Dict[str, str] = {
    # options
    'alpha': 'decay=... if it weighs the old average (0.999), momentum=... '
    'if it weighs the new weights (0.001)',
    'end_momentum': "schedule=dict(type='cosine', decay=1 - momentum, "
    'end_decay=1 - end_momentum)',
    'resume_from': 'load_from=... and resume=True in the config, or --resume',
    'skip_buffers': 'update_buffers, which says the opposite',
    'total_iter': "ema_type='ExpMomentumEMA' with gamma=...",
    'warm_up': "ema_type='MomentumAnnealingEMA' with gamma=...",
    # classes, as ema_type
    'CosineEMA': "schedule=dict(type='cosine', decay=1 - momentum)",
    'ModelEMA': 'no ema_type: decay=0.9999, tau=2000 are its ramp',
    'ModelEmaV2': "schedule='constant' and decay=...",
    'RampUpEMA': "schedule=dict(type='half_life', half_life=...), in steps",
    'SWA': "ema_type='StochasticWeightAverage'",
    # hooks
    'ExpMomentumEMAHook': "dict(type='EMAHook', ema_type='ExpMomentumEMA', "
    'momentum=0.0002, gamma=2000, update_buffers=True), with its total_iter '
    'as gamma',
    'LinearMomentumEMAHook': "dict(type='EMAHook', "
    "ema_type='MomentumAnnealingEMA', momentum=0.0002, gamma=100, "
    'update_buffers=True), with its warm_up as gamma',
    'MEGVIIEMAHook': "dict(type='EMAHook', schedule=dict(type='exponential', "
    'decay=0.999, tau=2000, init_updates=...))',
    'SWAHook': "dict(type='EMAHook', ema_type='StochasticWeightAverage', "
    'begin_epoch=...)',
}


def instead_of(name: str) -> str:
    """Return a sentence on an option, class or hook of another project."""
    name = name.rpartition('.')[2]
    for ours, theirs in _SAME.items():
        if name in theirs:
            return f' Did you mean {ours!r}?'
    return f' Write {_INSTEAD[name]}.' if name in _INSTEAD else ''
