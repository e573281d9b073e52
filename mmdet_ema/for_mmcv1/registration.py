"""Make ``dict(type='EMAHook')`` build our hook, whatever came first."""

from __future__ import annotations

from typing import Any, Callable, Dict, Type

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
from mmdet_ema.training.patches import wrap_once

_OURS: Dict[str, Type[EMAHook]] = {
    ours.__name__: ours
    for ours in (
        EMAHook,
        ExpMomentumEMAHook,
        LinearMomentumEMAHook,
        MEGVIIEMAHook,
    )
}


def register() -> None:
    """Register the hooks in mmcv's registry.

    mmcv's own hook, mmdet 2's and BEVDet's stay there under names of their
    own; mmdet's and BEVDet's get theirs also where they are imported after
    us.
    """
    for name, ours in _OURS.items():
        theirs = HOOKS.get(name)
        if theirs not in (None, ours):
            HOOKS.register_module(name=ours.theirs, module=theirs, force=True)
        HOOKS.register_module(name=name, module=ours, force=True)
    wrap_once(HOOKS, '_register_module', _register)
    HOOKS.register_module(module=BiasWarmupHook, force=True)
    OPTIMIZER_BUILDERS.register_module(
        module=EMAOptimizerConstructor, force=True
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
        module_name, force = _OURS[name].theirs, True
    return register(module=module, module_name=module_name, force=force)
