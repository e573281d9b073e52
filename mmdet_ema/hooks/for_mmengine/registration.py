"""Make ``dict(type='EMAHook')`` build our hook, from any scope."""

from __future__ import annotations

from mmengine.logging import print_log
from mmengine.registry import HOOKS

from mmdet_ema.hooks.for_mmengine.ema_hook import EMAHook
from mmdet_ema.hooks.for_mmengine.safe_globals import allow_framework_types
from mmdet_ema.version import __version__


def register() -> None:
    """Register the hook in mmengine's root registry; say so in one line.

    The registries of mmdet, mmdet3d and mmseg fall back to the root's.
    """
    HOOKS.register_module(name='EMAHook', module=EMAHook, force=True)
    allow_framework_types()
    print_log(
        f"mmdet_ema {__version__}: dict(type='EMAHook') builds "
        f'{EMAHook.__module__}.EMAHook in place of mmengine.hooks.EMAHook.',
        logger='current',
    )
