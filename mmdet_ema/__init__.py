"""Exponential moving average (EMA) of weights for OpenMMLab detectors.

Importing the package registers ``EMAHook`` with the frameworks that are
installed; ``custom_imports = dict(imports=['mmdet_ema'])`` does so from a
config. Without a framework there is :class:`WeightAverager` alone.
"""

import importlib
from typing import TYPE_CHECKING, Any, List

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

    # editors are shown mmengine's generation; mmcv 1.x has the same names
    from mmdet_ema.for_mmengine.bias_warmup_hook import BiasWarmupHook
    from mmdet_ema.for_mmengine.ema_hook import EMAHook
    from mmdet_ema.for_mmengine.optimizer_constructor import (
        EMAOptimizerConstructor,
    )

__all__ = [
    'BiasWarmupHook',
    'CheckpointError',
    'EMAHook',
    'EMAOptimizerConstructor',
    'NonFiniteError',
    'OptionError',
    'Schedule',
    'WeightAverager',
    '__version__',
    'build_schedule',
]
_OF_A_FRAMEWORK = ('BiasWarmupHook', 'EMAHook', 'EMAOptimizerConstructor')


def __getattr__(name: str) -> Any:
    """Import what is asked for, or say what is missing to have it."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if name not in _OF_A_FRAMEWORK:
        return getattr(importlib.import_module('mmdet_ema.averaging'), name)
    hook = load_hook()
    if hook is None:
        raise ImportError(
            f'{name} needs mmengine or mmcv 1.7; install one of them (pip '
            f'install mmengine) or use mmdet_ema.WeightAverager in a plain '
            f'PyTorch loop.'
        )
    generation = hook.__module__.rpartition('.')[0]
    return getattr(importlib.import_module(f'{generation}.registration'), name)


def __dir__() -> List[str]:
    """List what is imported when it is asked for as well."""
    return sorted({*globals(), *__all__})


# custom_imports relies on this; a command that needs the hooks loads them
if not is_own_command():
    load_hook()
