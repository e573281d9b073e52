"""Exponential moving average (EMA) of weights for OpenMMLab detectors.

Importing the package registers ``EMAHook`` with the frameworks that are
installed; ``custom_imports = dict(imports=['mmdet_ema'])`` does so from a
config. Without a framework there is :class:`WeightAverager` alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mmdet_ema.frameworks import is_own_command, load_hook
from mmdet_ema.version import __version__

if TYPE_CHECKING:
    from mmdet_ema.averaging import (
        CheckpointError,
        NonFiniteError,
        OptionError,
        Schedule,
        WeightAverager,
        build_schedule,
    )

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


def __getattr__(name: str) -> Any:
    """Import what is asked for, or say what is missing to have it."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if name != 'EMAHook':
        return getattr(importlib.import_module('mmdet_ema.averaging'), name)
    hook = load_hook()
    if hook is None:
        raise ImportError(
            'EMAHook needs mmengine or mmcv 1.7; install one of them (pip '
            'install mmengine) or use mmdet_ema.WeightAverager in a plain '
            'PyTorch loop.'
        )
    return hook


# custom_imports relies on this; a command that needs the hooks loads them
if not is_own_command():
    load_hook()
