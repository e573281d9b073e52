"""The commands: run a framework's own tool, with an edited config."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, List, Mapping, Optional
from unittest import mock

from mmdet_ema.checkpoint.files import read_structure
from mmdet_ema.checkpoint.format import put_raw, unpack
from mmdet_ema.errors import CheckpointError, OptionError, did_you_mean, show
from mmdet_ema.frameworks import has_mmcv1, has_mmengine, has_package

SCOPES = ('mmdet', 'mmdet3d')
"""The frameworks whose tools can be run."""
# mmengine's own hook beside ours: it knows none of our options
_FOREIGN = 'MMEngineEMAHook'
_EMA_HOOKS = (
    'EMAHook',
    'ExpMomentumEMAHook',
    'LinearMomentumEMAHook',
    'MEGVIIEMAHook',
    _FOREIGN,
)


def train(options: argparse.Namespace, rest: List[str]) -> None:
    """Run ``tools/train.py`` with EMA; ``rest`` goes to it as it is."""
    given = {k: getattr(options, k) for k in ('decay', 'tau', 'schedule')}
    given = {k: v for k, v in given.items() if v is not None}
    _run_tool('train', options.config, rest, lambda cfg: add_ema(cfg, given))


def test(options: argparse.Namespace, rest: List[str]) -> None:
    """Run ``tools/test.py`` with EMA weights, raw weights or both."""
    path = options.checkpoint
    if '://' not in path:
        if not os.path.isfile(path):
            raise CheckpointError(f'there is no checkpoint {path!r}.')
        read_structure(path)

    def run() -> None:
        _run_tool(
            'test',
            options.config,
            [path, *rest],
            lambda cfg: choose_weights(cfg, options.weights),
        )

    if not has_mmcv1():
        run()
        return
    # the tool of mmdet 2 builds no hook and tests one set of weights
    if options.weights in ('raw', 'both'):
        print('mmdet-ema: testing the raw weights', flush=True)
        with _reading_raw():
            run()
    if options.weights != 'raw':
        print('mmdet-ema: testing the EMA weights', flush=True)
        run()


def find_tool(scope: str, name: str) -> Path:
    """Return the path of a tool inside an installed framework."""
    spec = importlib.util.find_spec(scope)
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise OptionError(
            f'the config belongs to {scope}, which is not installed; install '
            f'it (pip install {scope}).'
        )
    tool = Path(places[0]) / '.mim' / 'tools' / f'{name}.py'
    if not tool.is_file():
        raise OptionError(
            f'{scope} is installed without its tools (no {tool}); install the '
            f'released package, or run tools/{name}.py of your clone.'
        )
    return tool


def _run_tool(
    name: str, path: str, arguments: List[str], edit: Callable[[Any], None]
) -> None:
    """Run ``tools/<name>.py`` of the framework that a config belongs to.

    The tool runs in this process and reads the config as it always does; what
    it gets is edited before it goes on.
    """
    if has_mmcv1():  # it goes first, also beside mmengine
        from mmcv import Config
    elif has_mmengine():
        from mmengine.config import Config
    else:
        raise OptionError(
            'neither mmengine nor mmcv 1.7 is installed; install mmdet with '
            'what it needs (pip install mmdet mmengine).'
        )
    if not os.path.isfile(path):
        raise OptionError(f'there is no config file {path!r}.')
    tool = find_tool(scope_of(Config.fromfile(path), path), name)
    read = Config.fromfile

    def read_and_edit(filename: Any, *args: Any, **kwargs: Any) -> Any:
        cfg = read(filename, *args, **kwargs)
        if str(filename) == path:
            edit(cfg)
        return cfg

    argv = [str(tool), path, *arguments]
    edited = mock.patch.object(Config, 'fromfile', read_and_edit)
    with edited, mock.patch.object(sys, 'argv', argv):
        runpy.run_path(str(tool), run_name='__main__')


def scope_of(cfg: Any, path: str) -> str:
    """Return the framework that a config belongs to."""
    scope = cfg.get('default_scope')
    if not scope and has_mmcv1():  # such a config does not say, its model does
        return _scope_by_model(cfg)
    if scope not in SCOPES:
        near = did_you_mean(str(scope), SCOPES)
        raise OptionError(
            f'{path!r} has default_scope={scope!r}; mmdet-ema runs the tools '
            f'of {" and ".join(SCOPES)}.{near} For another framework add '
            f'custom_imports and EMAHook to the config, and run its tool.'
        )
    return str(scope)


def _scope_by_model(cfg: Any) -> str:
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


def add_ema(cfg: Any, options: Mapping[str, Any]) -> None:
    """Add the package and a hook to a config that has none; in place.

    A config with a hook of its own takes no options of the command line.
    """
    imports = dict(cfg.get('custom_imports') or {})
    names = imports.get('imports') or []
    names = [names] if isinstance(names, str) else list(names)
    if 'mmdet_ema' not in names:
        imports['imports'] = [*names, 'mmdet_ema']
        imports.setdefault('allow_failed_imports', False)
        cfg.custom_imports = imports
    present = _ema_hooks(cfg)
    if present and options:
        words = ', '.join(f'--{name} {v}' for name, v in options.items())
        raise OptionError(
            f'{words}: the config has an EMA hook of its own '
            f'({show(dict(present[0]))}); change it there, or by '
            f'--cfg-options.'
        )
    if not present:
        hooks = list(cfg.get('custom_hooks') or [])
        cfg.custom_hooks = [*hooks, dict(type='EMAHook', **options)]


def choose_weights(cfg: Any, weights: Optional[str]) -> None:
    """Make a config test these weights; None for those that it says."""
    add_ema(cfg, {})
    if weights is None:
        return
    for hook in _ema_hooks(cfg):
        if _kind(hook) != _FOREIGN:
            hook['evaluate'] = weights
        elif weights != 'ema':
            raise OptionError(
                f'--weights {weights}: {_FOREIGN} tests the averages alone; '
                f"say type='EMAHook' in the config."
            )


def _ema_hooks(cfg: Any) -> List[Any]:
    default = (cfg.get('default_hooks') or {}).values()
    hooks = [*default, *(cfg.get('custom_hooks') or [])]
    return [hook for hook in hooks if _kind(hook) in _EMA_HOOKS]


def _kind(hook: Any) -> str:
    kind = hook.get('type') if isinstance(hook, dict) else type(hook)
    name = getattr(kind, '__name__', kind)
    return str(name).rpartition('.')[2]


@contextlib.contextmanager
def _reading_raw() -> Iterator[None]:
    """Let the tools of mmcv 1.x read the raw weights of a checkpoint."""
    from mmdet_ema.checkpoint.mmcv1 import convert_buffers, take_message
    from mmdet_ema.for_mmcv1.checkpoints import reading_through

    def take_raw(checkpoint: Any) -> None:
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

    with reading_through(take_raw):
        yield
