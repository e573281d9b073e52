"""``mmdet-ema env``: what a bug report needs.

Works where torch or a framework is missing or does not import: that may be
the bug. Hence nothing here imports one of them at the top.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Callable, Iterator, Tuple

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
    'mmdet3d': ('mmdet3d',),
    'mmpose': ('mmpose',),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
    'mmrotate': ('mmrotate', 'onedl-mmrotate'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
}
"""Packages by import name, and what they can be installed as."""


def print_environment() -> None:
    """Print versions, the hooks that are built and the GPUs, a line each.

    Nothing else comes on stdout: what frameworks print when they are imported
    goes to stderr.
    """
    with contextlib.redirect_stdout(sys.stderr):
        rows = list(_rows())
    for name, value in rows:
        print(f'{name + ":":<14} {value}')


def _rows() -> Iterator[Tuple[str, str]]:
    yield 'mmdet_ema', __version__
    yield 'Python', platform.python_version()
    yield 'OS', platform.platform()
    yield 'torch', _answer(_torch)
    found = {package: _version(package) for package in _DISTRIBUTIONS}
    yield from ((name, text) for name, text in found.items() if text)
    missing = [name for name, text in found.items() if not text]
    if missing:
        yield 'not installed', ', '.join(missing)
    registries = [
        *(['mmcv.runner'] if has_mmcv1() else []),
        *(['mmengine.registry'] if has_mmengine() else []),
    ]
    for name in registries:
        hook = _answer(functools.partial(_hook, name))
        yield 'EMAHook', f'{hook} ({name})'
    if not registries:
        yield 'EMAHook', 'needs mmengine or mmcv 1.7'
    yield 'GPUs', _answer(_gpus)


def _answer(ask: Callable[[], str]) -> str:
    """Return what is answered, or the error on one line."""
    try:
        return ask()
    except Exception as error:
        return f'{type(error).__name__}: {" ".join(str(error).split())}'


def _torch() -> str:
    import torch

    cuda = torch.version.cuda or torch.version.hip
    return f'{torch.__version__} (CUDA {cuda or "not built in"})'


def _gpus() -> str:
    import torch

    numbers = range(torch.cuda.device_count())
    return ', '.join(map(torch.cuda.get_device_name, numbers)) or 'none'


def _version(package: str) -> str:
    for name in _DISTRIBUTIONS[package]:
        with contextlib.suppress(PackageNotFoundError):
            return version(name) + f' ({name})' * (name != package)
    # a clone on PYTHONPATH has no metadata
    return 'version unknown' if has_package(package) else ''


def _hook(registry: str) -> str:
    """Return the class that ``dict(type='EMAHook')`` builds."""
    load_hook()
    hook = importlib.import_module(registry).HOOKS.get('EMAHook')
    return f'{hook.__module__}.{hook.__name__}'
