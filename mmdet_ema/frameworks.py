"""Find the frameworks that are installed, and register their hooks."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from types import FrameType
from typing import Any, List, Optional


def is_own_command() -> bool:
    """Return whether ``python -m mmdet_ema`` is importing the package.

    ``mmdet-ema`` runs the same, by runpy. Such an import is not to take the
    seconds of torch and the frameworks: the command may be ``--help``. An
    import from anywhere else is one that has to register the hooks.
    """
    # from whoever imports the package, past the machinery of imports
    frame: Optional[FrameType] = sys._getframe(2)
    while frame and _module_of(frame).partition('.')[0] == 'importlib':
        frame = frame.f_back
    return frame is not None and _module_of(frame) == 'runpy'


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get('__name__'))


@functools.lru_cache(maxsize=None)
def load_hook() -> Optional[Any]:
    """Register the hook of every framework that is installed, once.

    Returns:
        The class for mmcv 1.x where that is installed, else the one for
        mmengine; None if no framework is. A framework that is there but does
        not import raises its own error.
    """
    hooks: List[Any] = []
    if has_mmcv1():
        from mmdet_ema.for_mmcv1.ema_hook import EMAHook as Mmcv1Hook
        from mmdet_ema.for_mmcv1.registration import register as register_mmcv1

        register_mmcv1()
        hooks.append(Mmcv1Hook)
    if has_mmengine():
        from mmdet_ema.for_mmengine.ema_hook import EMAHook as MMEngineHook
        from mmdet_ema.for_mmengine.registration import register

        register()
        hooks.append(MMEngineHook)
    return hooks[0] if hooks else None


def has_mmcv1() -> bool:
    """Return whether mmcv 1.x is installed; mmcv 2 has no runners."""
    return has_package('mmcv', 'runner')


def has_mmengine() -> bool:
    """Return whether mmengine is installed."""
    return has_package('mmengine')


def has_package(package: str, part: str = '') -> bool:
    """Return whether a package with a part is installed; import nothing."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    folders = spec.submodule_search_locations or []
    return any(os.path.isdir(os.path.join(path, part)) for path in folders)
