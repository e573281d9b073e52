"""Make ``dict(type='EMAHook')`` build our hook, whatever came first."""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, Tuple, Type

from mmcv.runner import HOOKS
from mmcv.runner.optimizer import OPTIMIZER_BUILDERS

from mmdet_ema.for_mmcv1.bevdet_hook import MEGVIIEMAHook
from mmdet_ema.for_mmcv1.bias_warmup_hook import BiasWarmupHook
from mmdet_ema.for_mmcv1.ema_hook import (
    EMAHook,
    ExpMomentumEMAHook,
    LinearMomentumEMAHook,
)
from mmdet_ema.for_mmcv1.optimizer_constructor import EMAOptimizerConstructor
from mmdet_ema.for_mmcv1.runner import wrap_once
from mmdet_ema.frameworks import own_logger
from mmdet_ema.version import __version__

_OURS: Dict[str, Tuple[Type[EMAHook], str]] = {
    'EMAHook': (EMAHook, 'MMCVEMAHook'),
    'ExpMomentumEMAHook': (ExpMomentumEMAHook, 'MMDetExpMomentumEMAHook'),
    'LinearMomentumEMAHook': (
        LinearMomentumEMAHook,
        'MMDetLinearMomentumEMAHook',
    ),
    'MEGVIIEMAHook': (MEGVIIEMAHook, 'BEVDetMEGVIIEMAHook'),
}


def register() -> None:
    """Register the hooks in mmcv's registry; say so in one line.

    mmcv's own hook, mmdet 2's and BEVDet's stay there under names of their
    own; mmdet's and BEVDet's get theirs also where they are imported after
    us.
    """
    for name, (ours, spare) in _OURS.items():
        theirs = HOOKS.get(name)
        if theirs not in (None, ours):
            HOOKS.register_module(name=spare, module=theirs, force=True)
        HOOKS.register_module(name=name, module=ours, force=True)
    wrap_once(HOOKS, '_register_module', _register)
    HOOKS.register_module(module=BiasWarmupHook, force=True)
    OPTIMIZER_BUILDERS.register_module(
        module=EMAOptimizerConstructor, force=True
    )
    if os.environ.get('RANK', '0') == '0':
        own_logger().info(
            f"mmdet_ema {__version__}: dict(type='EMAHook'), "
            f"'ExpMomentumEMAHook', 'LinearMomentumEMAHook' and "
            f"'MEGVIIEMAHook' build its own hooks; mmcv's is 'MMCVEMAHook' "
            f"now, mmdet's are 'MMDetExpMomentumEMAHook' and "
            f"'MMDetLinearMomentumEMAHook', BEVDet's is "
            f"'BEVDetMEGVIIEMAHook'."
        )


def _register(
    register: Callable[..., Any],
    module: Any,
    module_name: Any = None,
    force: bool = False,
) -> Any:
    """Register a class; mmdet's and BEVDet's EMA hooks do not meet ours.

    BEVDet's is in the packages of many projects, in a copy each.
    """
    name = module.__name__
    mmdets = module.__module__.startswith('mmdet.') and name in _OURS
    bevdets = name == 'MEGVIIEMAHook' and module is not MEGVIIEMAHook
    if (mmdets or bevdets) and module_name in (None, name):
        module_name, force = _OURS[name][1], True
    return register(module=module, module_name=module_name, force=force)
