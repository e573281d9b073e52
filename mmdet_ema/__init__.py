"""Exponential moving average (EMA) of weights for OpenMMLab detectors.

Importing the package registers ``EMAHook`` with the frameworks that are
installed; ``custom_imports = dict(imports=['mmdet_ema'])`` does so from a
config. Without a framework there is :class:`WeightAverager` alone.
"""

from typing import Any

from mmdet_ema.averaging import (
    CheckpointError,
    NonFiniteError,
    OptionError,
    Schedule,
    WeightAverager,
    build_schedule,
)
from mmdet_ema.frameworks import load_hook
from mmdet_ema.version import __version__

__all__ = [
    'CheckpointError',
    'EMAHook',
    'NonFiniteError',
    'OptionError',
    'Schedule',
    'WeightAverager',
    '__version__',
    'build_schedule',
]

_hook = load_hook()


def __getattr__(name: str) -> Any:
    """Return ``EMAHook``, or say what is missing to have it."""
    if name != 'EMAHook':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if _hook is None:
        raise ImportError(
            'EMAHook needs mmengine or mmcv 1.7; install one of them (pip '
            'install mmengine) or use mmdet_ema.WeightAverager in a plain '
            'PyTorch loop.'
        )
    return _hook
