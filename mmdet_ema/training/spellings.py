"""What other projects call our options, and what to write here instead."""

from __future__ import annotations

from typing import Dict

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
    'evaluate_on_ema': "evaluate='ema', or 'both' with evaluate_on_origin",
    'evaluate_on_origin': "evaluate='raw', or 'both' with evaluate_on_ema",
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
    """Return a sentence on a word of another project, or nothing.

    Args:
        name: An option, an averaging class or a hook, with or without scope.
    """
    name = name.rpartition('.')[2]
    for ours, theirs in _SAME.items():
        if name in theirs:
            return f' Did you mean {ours!r}?'
    return f' Write {_INSTEAD[name]}.' if name in _INSTEAD else ''
