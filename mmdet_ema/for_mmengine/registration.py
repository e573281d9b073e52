"""Make ``dict(type='EMAHook')`` build our hook, from any scope."""

from __future__ import annotations

import functools
import os
from typing import Any, Callable

from mmengine.hooks.ema_hook import EMAHook as MMEngineEMAHook
from mmengine.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS

from mmdet_ema.errors import OptionError, show
from mmdet_ema.for_mmengine.bias_warmup_hook import BiasWarmupHook
from mmdet_ema.for_mmengine.checkpoints import allow_framework_types
from mmdet_ema.for_mmengine.ema_hook import EMAHook
from mmdet_ema.for_mmengine.optimizer_constructor import (
    EMAOptimizerConstructor,
)
from mmdet_ema.frameworks import own_logger
from mmdet_ema.training.compatible import instead_of
from mmdet_ema.version import __version__

_NAMES = ('mmengine.hooks.EMAHook', 'mmengine.hooks.ema_hook.EMAHook')


def register() -> None:
    """Register the hook in mmengine's root registry; say so in one line.

    The registries of mmdet, mmdet3d and mmseg fall back to the root's. The
    framework's own hook stays there as ``MMEngineEMAHook``.
    """
    for name, kind in (
        ('EMAHook', EMAHook),
        ('MMEngineEMAHook', MMEngineEMAHook),
        ('BiasWarmupHook', BiasWarmupHook),
    ):
        HOOKS.register_module(name=name, module=kind, force=True)
    HOOKS.build_func = functools.partial(_build, HOOKS.build_func)
    OPTIM_WRAPPER_CONSTRUCTORS.register_module(
        module=EMAOptimizerConstructor, force=True
    )
    allow_framework_types()
    if os.environ.get('RANK', '0') == '0':
        own_logger().info(
            f"mmdet_ema {__version__}: dict(type='EMAHook') builds its own "
            f"hook; mmengine's is 'MMEngineEMAHook' now."
        )


def _build(
    build: Callable[..., Any], cfg: Any, *args: Any, **kwargs: Any
) -> Any:
    """Build a hook; new-style configs name the class, not the registry."""
    kind = cfg.get('type') if isinstance(cfg, dict) else None
    if kind is MMEngineEMAHook or (isinstance(kind, str) and kind in _NAMES):
        cfg = {**cfg, 'type': EMAHook}
    try:
        return build(cfg, *args, **kwargs)
    except KeyError as error:
        advice = instead_of(kind) if isinstance(kind, str) else ''
        if not advice or 'is not in the' not in str(error):
            raise
        raise OptionError(
            f'type={show(kind)} is not a hook of this generation.{advice}'
        ) from None
