"""``mmdet-ema env``: what a bug report needs.

Works where torch or a framework is missing or does not import: that may be
the bug. Hence nothing here imports one of them at the top.
"""

from __future__ import annotations

import contextlib
import importlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Iterator, List, Tuple

from mmdet_ema.frameworks import (
    has_mmcv1,
    has_mmengine,
    has_package,
    load_hook,
)
from mmdet_ema.version import __version__

_DISTRIBUTIONS = {
    'numpy': ('numpy',),
    'mmengine': ('mmengine', 'mmengine-lite', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'mmcv-full', 'mmcv-lite', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmdet3d': ('mmdet3d', 'onedl-mmdetection3d'),
}
"""Packages by import name, and what they are installed as."""


def print_environment() -> None:
    """Print versions, the hooks and the GPUs, a line each.

    Nothing else comes on stdout: what frameworks print when they are imported
    goes to stderr.
    """
    with contextlib.redirect_stdout(sys.stderr):
        rows = list(_rows())
    for name, value in rows:
        print(f'{name + ":":<10} {value}')


def _rows() -> Iterator[Tuple[str, str]]:
    yield 'mmdet_ema', __version__
    yield 'Python', platform.python_version()
    yield 'OS', platform.platform()
    gpus: List[str] = []
    try:
        import torch

        cuda = torch.version.cuda or torch.version.hip
        yield 'torch', f'{torch.__version__} (CUDA {cuda or "not built in"})'
        gpus = [
            torch.cuda.get_device_name(i)
            for i in range(torch.cuda.device_count())
        ]
    except Exception as error:
        yield 'torch', _why(error)
    for package in _DISTRIBUTIONS:
        yield package, _version(package)
    yield from _hooks()
    yield 'GPUs', ', '.join(gpus) or 'none'


def _version(package: str) -> str:
    for name in _DISTRIBUTIONS[package]:
        with contextlib.suppress(PackageNotFoundError):
            return version(name) + f' ({name})' * (name != package)
    # a clone on PYTHONPATH has no metadata
    return 'not installed' if not has_package(package) else 'version unknown'


def _hooks() -> Iterator[Tuple[str, str]]:
    """Yield what ``dict(type='EMAHook')`` builds, by generation."""
    registries = [
        *(['mmcv.runner'] if has_mmcv1() else []),
        *(['mmengine.registry'] if has_mmengine() else []),
    ]
    if not registries:
        yield 'EMAHook', 'none: neither mmengine nor mmcv 1.7 is installed'
    for name in registries:
        try:
            load_hook()
            hook: Any = importlib.import_module(name).HOOKS.get('EMAHook')
            yield 'EMAHook', f'{hook.__module__}.{hook.__name__} ({name})'
        except Exception as error:
            yield 'EMAHook', f'{_why(error)} ({name})'


def _why(error: Exception) -> str:
    text = ' '.join(str(error).split())
    return f'does not import: {type(error).__name__}: {text}'
