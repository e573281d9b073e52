"""The two generations of the framework, as far as the command line goes."""

from __future__ import annotations

import contextlib
import importlib
import os
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Optional, Tuple

from mmdet_ema.checkpoint.files import read_structure
from mmdet_ema.checkpoint.format import put_raw, unpack
from mmdet_ema.errors import CheckpointError, OptionError
from mmdet_ema.frameworks import has_mmcv1, has_mmengine, has_package

SCOPES = ('mmdet', 'mmdet3d')


@dataclass(frozen=True)
class Generation:
    """What the commands have to know of a generation.

    Attributes:
        config: Its class of configs.
        scopes: The frameworks whose tools can be run.
        scope_of: Finds the framework of a config that does not say.
        check: Looks at a checkpoint before anything is done.
        reading_raw: While it is entered, the tools read raw weights; None
            where the hook sees to that.
    """

    config: Any
    scopes: Tuple[str, ...]
    scope_of: Callable[[Any], Optional[str]]
    check: Callable[[str], Any]
    reading_raw: Optional[Callable[[], ContextManager[None]]]


def installed() -> Generation:
    """Return the generation that is installed; mmcv 1.x before mmengine.

    Raises:
        OptionError: If there is none.
    """
    if has_mmcv1():
        from mmcv import Config

        return Generation(Config, SCOPES, _by_model, _check, _reading_raw)
    if has_mmengine():
        from mmengine.config import Config

        return Generation(Config, SCOPES, _unknown, read_structure, None)
    raise OptionError(
        'neither mmengine nor mmcv 1.7 is installed; install mmdet with '
        'what it needs (pip install mmdet mmengine).'
    )


def _unknown(cfg: Any) -> None:
    return None


def _by_model(cfg: Any) -> str:
    """Return the framework that knows the model of a config of mmcv 1.x.

    Raises:
        OptionError: If none does.
    """
    kind = (cfg.get('model') or {}).get('type')
    installed = [name for name in SCOPES if has_package(name)]
    for scope in installed:
        if kind in importlib.import_module(f'{scope}.models').builder.MODELS:
            return scope
    if installed and isinstance(kind, str):
        raise OptionError(
            f'model type {kind!r} is not known to {" or ".join(installed)}; '
            f'install the framework of the config (pip install '
            f'mmdet3d==1.0.0rc6 for one of mmdet3d), or import the module of '
            f'the model by custom_imports.'
        )
    return 'mmdet'


def _check(path: str) -> None:
    if not os.path.isfile(path):
        raise CheckpointError(f'there is no checkpoint {path!r}.')
    read_structure(path)


@contextlib.contextmanager
def _reading_raw() -> Any:
    from mmdet_ema.for_mmcv1.loading import reading_through

    with reading_through(_take_raw):
        yield


def _take_raw(checkpoint: Any) -> None:
    from mmdet_ema.checkpoint.mmcv1 import convert_buffers, take_message

    take_message(checkpoint)
    found = convert_buffers(checkpoint)
    if found is not None:
        print('\n'.join([found.line, *found.warnings]), flush=True)
    part = unpack(checkpoint)
    if part is None:
        raise CheckpointError(
            'the checkpoint holds one set of weights and no EMA part, so '
            'there are no raw weights to test; leave out --weights.'
        )
    put_raw(checkpoint, part)
