"""train and test: a framework's own tools, run with an edited config."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

from mmdet_ema.checkpoint.files import read_structure
from mmdet_ema.checkpoint.format import put_set, unpack
from mmdet_ema.cli.shared import is_first
from mmdet_ema.errors import CheckpointError, OptionError, did_you_mean, show
from mmdet_ema.frameworks import (
    has_mmcv1,
    has_mmengine,
    has_package,
    load_hook,
)
from mmdet_ema.schedules import Schedule

SCOPES = ('mmdet', 'mmdet3d')
"""The frameworks whose tools can be run."""
# hooks of mmcv 1.x whose name chooses a ramp; EMAHook has all of their options
_NAMED_RAMPS = ('ExpMomentumEMAHook', 'LinearMomentumEMAHook')
# the frameworks' own hooks, which know none of our options
_FOREIGN = (
    'BEVDetMEGVIIEMAHook',
    'MMCVEMAHook',
    'MMDetExpMomentumEMAHook',
    'MMDetLinearMomentumEMAHook',
    'MMEngineEMAHook',
)
_EMA_HOOKS = ('EMAHook', 'MEGVIIEMAHook', *_NAMED_RAMPS, *_FOREIGN)
_COMPATIBLE = (
    *('ema_type', 'gamma', 'momentum', 'skip_buffers', 'total_iter'),
    'warm_up',
)
_RAMP = ('ema_type', 'gamma', 'schedule', 'tau', 'total_iter', 'warm_up')
_ON = ('evaluate_on_ema', 'evaluate_on_origin')
_REPLACES = {
    'decay': ('decay', 'momentum'),
    'evaluate': ('evaluate', *_ON),
    'schedule': _RAMP,
    'tau': _RAMP,
}


def train(options: argparse.Namespace) -> None:
    """Run ``tools/train.py`` with EMA; ``rest`` goes to it as it is."""
    _run_tool(
        *('train', options.config, options.rest),
        lambda cfg: add_ema(cfg, options.hook),
    )


def test(options: argparse.Namespace) -> None:
    """Run ``tools/test.py`` with one or several sets of weights."""
    path, weights = options.checkpoint, options.weights
    if '://' not in path:
        if not os.path.exists(path):
            raise CheckpointError(f'there is no checkpoint {path!r}.')
        read_structure(path)

    def run() -> None:
        _run_tool(
            'test',
            options.config,
            [path, *options.rest],
            lambda cfg: choose_weights(cfg, weights),
        )

    if not has_mmcv1():
        run()
        return
    # the tool of mmdet 2 builds no hook and tests one set of weights
    if weights == 'all':
        raise OptionError(
            "--weights 'all' needs the hook's list of averages, which mmdet "
            '2 does not build in a test; name them, as in --weights raw,ema.'
        )
    sets = ['raw', 'ema'] if weights == 'both' else weights or ['ema']
    for name in [sets] if isinstance(sets, str) else sets:
        full = 'EMA' if name == 'ema' else name
        print(f'mmdet-ema: testing the {full} weights', flush=True)
        # without the option, a file of any writer is tested as it is
        with _loading(path, name if weights else None):
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
    package = Path(places[0])
    folders = [package / '.mim' / 'tools']
    # a clone has them beside the package; in site-packages such a folder
    # would be somebody else's
    if not package.parent.name.endswith('-packages'):
        folders.append(package.parent / 'tools')
    for folder in folders:
        if (folder / f'{name}.py').is_file():
            return folder / f'{name}.py'
    raise OptionError(
        f'{scope} is installed without its tools (no {name}.py in '
        f'{" or ".join(map(str, folders))}); install the released package, '
        f'or run tools/{name}.py of your clone.'
    )


def _run_tool(
    name: str, path: str, arguments: List[str], edit: Callable[[Any], str]
) -> None:
    """Run ``tools/<name>.py`` of the framework that a config belongs to.

    The tool runs in this process and reads the config as it always does; what
    it gets is edited before it goes on. ``edit`` returns what to tell.
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
    cfg = Config.fromfile(path)
    tool = find_tool(scope_of(cfg, path), name)
    told = edit(cfg)  # what is wrong is refused before the tool starts
    if told and is_first():
        print(f'mmdet-ema: {told}', flush=True)
    read, argv = Config.fromfile, sys.argv

    def read_and_edit(filename: Any, *args: Any, **kwargs: Any) -> Any:
        cfg = read(filename, *args, **kwargs)
        if str(filename) == path:
            edit(cfg)
        return cfg

    Config.fromfile = staticmethod(read_and_edit)
    sys.argv = [str(tool), path, *arguments]
    try:
        runpy.run_path(str(tool), run_name='__main__')
    finally:
        Config.fromfile, sys.argv = staticmethod(read), argv


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


def add_ema(cfg: Any, given: Mapping[str, Any]) -> str:
    """Add the package and a hook with these options to a config; in place.

    Where the config has an EMA hook, the options replace its own: it is
    returned what was replaced, in one sentence.
    """
    imports = dict(cfg.get('custom_imports') or {})
    names = imports.get('imports') or []
    names = [names] if isinstance(names, str) else list(names)
    if 'mmdet_ema' not in names:
        imports['imports'] = [*names, 'mmdet_ema']
        imports.setdefault('allow_failed_imports', False)
        cfg.custom_imports = imports
    present = _ema_hooks(cfg)
    if present:  # several are refused by the hook itself
        return '; '.join(_override(hook, given) for hook in present if given)
    hook = dict(type='EMAHook', **given)
    _options_of(hook)
    own = list(cfg.get('custom_hooks') or [])
    if own or has_mmcv1():
        cfg.custom_hooks = [*own, hook]
    else:
        hooks = cfg.get('default_hooks') or {}
        hooks['ema'] = hook
        cfg.default_hooks = hooks
    return ''


def _override(hook: Any, given: Mapping[str, Any]) -> str:
    """Give a hook of a config the options of the command line, in place."""
    flags = ' '.join(_flag(name, value) for name, value in given.items())
    if _kind(hook) in _FOREIGN:
        raise OptionError(
            f"{flags}: the config's hook is {_kind(hook)}, which knows none "
            f"of our options; say type='EMAHook' in the config."
        )
    before = copy.deepcopy(dict(hook.items()))
    chosen = {'decay', 'schedule', 'tau'} & given.keys()
    words = [word for word in _COMPATIBLE if hook.get(word) is not None]
    if chosen and (words or _kind(hook) in _NAMED_RAMPS):
        options = _options_of(hook)
        if options.choice.rule is not None:
            raise OptionError(
                f'{flags}: the config averages by a rule of its own, '
                f'ema_type={show(hook["ema_type"])}; leave one of both out.'
            )
        schedule = options.choice.make(1)
        for word in words:
            del hook[word]
        if _kind(hook) in _NAMED_RAMPS:
            hook['type'] = 'EMAHook'
        # what followed from those words
        hook['update_buffers'] = options.update_buffers
        if schedule.limit is not None:
            hook['decay'] = schedule.limit
        if chosen == {'decay'}:
            hook.update(_ramp_of(schedule))
    for flag in _ON if 'evaluate' in given else ():
        hook.pop(flag, None)
    spec = given.get('schedule', hook.get('schedule'))
    for name, value in given.items():
        if isinstance(spec, dict) and name in spec:
            before[name] = spec[name]
            spec[name] = value
        else:
            hook[name] = value
    _options_of(hook)
    old = {
        word: before[word]
        for name in given
        for word in _REPLACES.get(name, (name,))
        if before.get(word) not in (None, hook.get(word))
    }
    if not old:
        return f'{flags} for the EMA hook of the config'
    text = ', '.join(f'{word}={show(value)}' for word, value in old.items())
    return f'{flags} instead of {text} of the config'


def _ramp_of(schedule: Schedule) -> Dict[str, Any]:
    """Return the options for a schedule that compatible options chose."""
    options = schedule.options
    ramps: Dict[str, Dict[str, Any]] = {
        'ExpMomentumEMA': {'tau': options.get('gamma')},
        'ExponentialMovingAverage': {'schedule': 'constant'},
        'MomentumAnnealingEMA': {
            'schedule': dict(type='annealing', gamma=options.get('gamma'))
        },
        'StochasticWeightAverage': {'schedule': 'mean'},
        'exponential': {'tau': options.get('tau')},
        'warm_up': {'warm_up': options.get('warm_up')},
    }
    return ramps.get(schedule.name, {})


def _options_of(hook: Mapping[str, Any]) -> Any:
    """Check the options of a hook as the hook itself does; return them."""
    kind = load_hook()
    if has_mmcv1():
        from mmcv.runner import HOOKS

        kind = HOOKS.get(_kind(hook))
    assert kind is not None
    options = {k: x for k, x in hook.items() if k not in ('type', 'priority')}
    return kind(**options)._life.options


def _flag(name: str, value: Any) -> str:
    if name == 'enabled':
        return '--no-ema'
    return f'--{name}' if value is True else f'--{name} {value}'


def choose_weights(cfg: Any, weights: Any) -> str:
    """Make a config test these weights; None for those that it says."""
    add_ema(cfg, {})
    # a resumed run dumps it so, and weights alone are nothing to resume
    cfg.resume = False
    for hook in _ema_hooks(cfg) if weights else ():
        if _kind(hook) not in _FOREIGN:
            for flag in _ON:
                hook.pop(flag, None)
            hook['evaluate'] = weights
        elif weights != 'ema':
            raise OptionError(
                f'--weights {weights}: {_kind(hook)} tests the averages '
                f"alone; say type='EMAHook' in the config."
            )
    return ''


def _ema_hooks(cfg: Any) -> List[Any]:
    default = (cfg.get('default_hooks') or {}).values()
    hooks = [*default, *(cfg.get('custom_hooks') or [])]
    return [hook for hook in hooks if _kind(hook) in _EMA_HOOKS]


def _kind(hook: Any) -> str:
    kind = hook.get('type') if isinstance(hook, dict) else type(hook)
    name = getattr(kind, '__name__', kind)
    return str(name).rpartition('.')[2]


@contextlib.contextmanager
def _loading(path: str, name: Optional[str]) -> Iterator[None]:
    """Let the tool of mmdet 2 load one set of weights of a file.

    A file of another architecture is refused: mmcv would leave out what does
    not fit, and the tool would test random weights.
    """
    import mmcv.runner

    from mmdet_ema.checkpoint.mmcv1 import convert_buffers, take_message
    from mmdet_ema.for_mmcv1.checkpoints import reading_through
    from mmdet_ema.training.patches import replacing
    from mmdet_ema.training.resume import check_architecture

    load = mmcv.runner.load_checkpoint

    def take(checkpoint: Any, name: str) -> None:
        take_message(checkpoint)
        found = convert_buffers(checkpoint)
        if found is not None:
            print('\n'.join([found.line, *found.warnings]), flush=True)
        part = unpack(checkpoint)
        if part is not None:
            put_set(checkpoint, part, name)
        elif name != 'ema':
            raise CheckpointError(
                f'the checkpoint holds one set of weights and no EMA part, so '
                f'there are no {name} weights to test; leave out --weights.'
            )

    def load_and_check(model: Any, file: Any, *args: Any, **kw: Any) -> Any:
        def prepare(checkpoint: Any) -> None:
            if name is not None:
                take(checkpoint, name)
            lacking = check_architecture(checkpoint, model)
            if lacking:
                print(f'mmdet-ema: {lacking}', flush=True)

        if file != path:  # a backbone's own, say
            return load(model, file, *args, **kw)
        with reading_through(prepare):
            return load(model, file, *args, **kw)

    with replacing(mmcv.runner, 'load_checkpoint', load_and_check):
        yield
