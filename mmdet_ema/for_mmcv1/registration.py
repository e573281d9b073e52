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

# ours of that name, and what the other project's is called from then on
_OURS: Dict[str, Tuple[Type[EMAHook], str]] = {
    ours.__name__: (ours, project + ours.__name__)
    for ours, project in (
        (EMAHook, 'MMCV'),
        (ExpMomentumEMAHook, 'MMDet'),
        (LinearMomentumEMAHook, 'MMDet'),
        (MEGVIIEMAHook, 'BEVDet'),
    )
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
        names = ', '.join(
            f'{x!r} ({spare!r})' for x, (_, spare) in _OURS.items()
        )
        own_logger().info(
            f'mmdet_ema {__version__} builds its own hooks for these types, '
            f"the frameworks' are called as in brackets now: {names}."
        )


def _register(
    register: Callable[..., Any],
    module: Any,
    module_name: Any = None,
    force: bool = False,
) -> Any:
    """Register a class; mmdet's and BEVDet's EMA hooks do not meet ours."""
    name = module.__name__
    mmdets = module.__module__.startswith('mmdet.') and name in _OURS
    # in the packages of many projects, in a copy each
    bevdets = name == 'MEGVIIEMAHook' and module is not MEGVIIEMAHook
    if (mmdets or bevdets) and module_name in (None, name):
        module_name, force = _OURS[name][1], True
    return register(module=module, module_name=module_name, force=force)
