"""Make the names known to mmengine's root registries."""

from __future__ import annotations

from mmengine.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS

from mmdet_ema.for_mmengine.bias_warmup_hook import BiasWarmupHook
from mmdet_ema.for_mmengine.optimizer_constructor import (
    EMAOptimizerConstructor,
)


def register() -> None:
    """Register ``EMAOptimizerConstructor`` and ``BiasWarmupHook``."""
    OPTIM_WRAPPER_CONSTRUCTORS.register_module(
        module=EMAOptimizerConstructor, force=True
    )
    HOOKS.register_module(module=BiasWarmupHook, force=True)
