"""Find the framework that is installed."""

from __future__ import annotations

import importlib.util
from typing import Any, Optional


def load_hook() -> Optional[Any]:
    """Register and return the hook of the installed framework.

    Returns:
        The class; None if no framework is installed. A framework that is
        there but does not import raises its own error.
    """
    if not _is_installed('mmengine'):
        return None
    from mmdet_ema.hooks.for_mmengine.ema_hook import EMAHook
    from mmdet_ema.hooks.for_mmengine.registration import register

    register()
    return EMAHook


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
