"""Make the names known to mmcv's registries."""

from __future__ import annotations

from mmcv.runner import HOOKS
from mmcv.runner.optimizer import OPTIMIZER_BUILDERS

from mmdet_ema.for_mmcv1.bias_warmup_hook import BiasWarmupHook
from mmdet_ema.for_mmcv1.optimizer_constructor import EMAOptimizerConstructor


def register() -> None:
    """Register ``EMAOptimizerConstructor`` and ``BiasWarmupHook``."""
    OPTIMIZER_BUILDERS.register_module(
        module=EMAOptimizerConstructor, force=True
    )
    HOOKS.register_module(module=BiasWarmupHook, force=True)
