"""What other projects call our options, and what to write here instead."""

from __future__ import annotations

_SAME = {
    'begin_epoch': ('ema_start_epoch', 'start_epoch'),
    'begin_iter': (
        'begin_step',
        'start_iter',
        'start_iters',
        'start_step',
        'update_after_step',
    ),
    'decay': ('beta', 'decay_rate', 'ema_decay', 'ema_rate', 'polyak'),
    'device': ('cpu_offload', 'ema_device', 'offload'),
    'ema_type': ('averaging', 'ema_model', 'swa'),
    'evaluate': ('eval_with_ema', 'use_ema', 'validate_original_weights'),
    'interval': (
        'ema_interval',
        'every_n_steps',
        'update_every',
        'update_freq',
        'update_interval',
    ),
    'tau': ('ramp', 'warmup', 'warmup_steps'),
    'update_buffers': ('average_buffers', 'include_buffers', 'use_buffers'),
}
_OPTIONS = {
    'alpha': 'decay=... if it weighs the old average (0.999), momentum=... '
    'if it weighs the new weights (0.001)',
    'end_momentum': "schedule=dict(type='cosine', decay=1 - momentum, "
    'end_decay=1 - end_momentum)',
    'evaluate_on_ema': "evaluate='ema', or 'both' with evaluate_on_origin",
    'evaluate_on_origin': "evaluate='raw', or 'both' with evaluate_on_ema",
    'init_updates': "schedule='constant', which has no ramp to skip",
    'resume_from': 'load_from=... and resume=True in the config, or --resume',
    'skip_buffers': 'update_buffers, which says the opposite',
    'total_iter': "ema_type='ExpMomentumEMA' with gamma=...",
    'warm_up': "ema_type='MomentumAnnealingEMA' with gamma=...",
}
_TYPES = {
    'AveragedModel': "ema_type='StochasticWeightAverage'",
    'CosineEMA': "schedule=dict(type='cosine', decay=1 - momentum)",
    'ModelEMA': 'no ema_type: decay=0.9999, tau=2000 are its ramp',
    'ModelEma': "schedule='constant' and decay=...",
    'ModelEmaV2': "schedule='constant' and decay=...",
    'RampUpEMA': "schedule=dict(type='half_life', half_life=...), in steps",
    'SWA': "ema_type='StochasticWeightAverage'",
}
_HOOKS = {
    'ExpMomentumEMAHook': "ema_type='ExpMomentumEMA', momentum=0.0002, "
    'gamma=2000 (its total_iter), update_buffers=True',
    'LinearMomentumEMAHook': "ema_type='MomentumAnnealingEMA', "
    'momentum=0.0002, gamma=100 (its warm_up), update_buffers=True',
    'MEGVIIEMAHook': 'decay=0.9990, tau=2000',
    'SWAHook': "ema_type='StochasticWeightAverage', begin_epoch=...",
}


def instead_of_option(name: str) -> str:
    """Return a sentence on an option of another project, or nothing."""
    for ours, theirs in _SAME.items():
        if name in theirs:
            return f' Did you mean {ours!r}?'
    return f' Write {_OPTIONS[name]}.' if name in _OPTIONS else ''


def instead_of_type(name: str) -> str:
    """Return a sentence on another project's ``ema_type``, or nothing."""
    return f' Write {_TYPES[name]}.' if name in _TYPES else ''


def instead_of_hook(name: str) -> str:
    """Return what to write for another project's hook, or nothing."""
    options = _HOOKS.get(name.rpartition('.')[2])
    return f"dict(type='EMAHook', {options})" if options else ''
