"""A file that anybody can read: plain values, and a config without us.

A framework puts NumPy scalars, arrays and objects of its own into its files.
:func:`to_plain` turns them into tensors and Python values under a tag, which
``torch.load(weights_only=True)`` reads anywhere, and :func:`from_plain` turns
these back into what they were.

OpenMMLab's tools build a model from the config in ``meta``, on machines where
this package is not: ``DetInferencer(weights=...)``, converters. The averages
are in ``state_dict`` already, so nothing there needs the import or the hook.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, Callable, Dict, List, NamedTuple, Type

import torch

TAG = '__mmdet_ema_type__'

_CONTAINERS = (dict, OrderedDict, list, tuple, set, torch.Size)
_LEAVES = (
    *(bool, int, float, complex, str, bytes, type(None)),
    *(torch.Tensor, torch.nn.Parameter, torch.device, torch.dtype),
)
TRAINING_CONFIG = 'training_cfg'
"""Where ``meta`` keeps the text of the config that the run was given."""
_PACKAGE = 'mmdet_ema'
# the names under which hooks of this package are built
_HOOKS = (
    'BiasWarmupHook',
    'EMAHook',
    'ExpMomentumEMAHook',
    'LinearMomentumEMAHook',
    'MEGVIIEMAHook',
)
_ORIGINS = ('', _PACKAGE, 'mmengine', 'mmpretrain')
_CONSTRUCTOR = 'EMAOptimizerConstructor'


class Codec(NamedTuple):
    """How a type is stored, without its subclasses: as a dict of values."""

    type: Type[Any]
    encode: Callable[[Any], Dict[str, Any]]
    decode: Callable[[Dict[str, Any]], Any]


def to_plain(value: Any, codecs: List[Codec]) -> Any:
    """Return a value with everything in it made plain.

    Dicts, lists and tuples are rebuilt (dicts keep their order and their
    ``_metadata``), types with a codec are tagged, NumPy scalars become Python
    numbers. What is left stays as it is.
    """
    for codec in codecs:
        if type(value) is codec.type:
            inner = to_plain(codec.encode(value), codecs)
            return {TAG: _name(codec.type), **inner}
    # whoever imports this need not have NumPy
    if 'numpy.generic' in map(_name, type(value).__mro__):
        number = value.item()
        # Python has no long double
        return float(number) if type(number) is type(value) else number
    return _rebuild(value, to_plain, codecs)


def from_plain(value: Any, codecs: List[Codec]) -> Any:
    """Return what :func:`to_plain` with the same codecs made plain."""
    if isinstance(value, dict) and TAG in value:
        for codec in codecs:
            if value[TAG] == _name(codec.type):
                inner = {k: v for k, v in value.items() if k != TAG}
                return codec.decode(from_plain(inner, codecs))
    return _rebuild(value, from_plain, codecs)


def foreign(value: Any) -> List[str]:
    """Return the types in a value that are not plain, each once, in order."""
    kind = type(value)
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = [*value]
    else:
        return [] if kind in _LEAVES else [_name(kind)]
    own = [] if kind in _CONTAINERS else [_name(kind)]
    return list(dict.fromkeys(own + [n for x in parts for n in foreign(x)]))


def _rebuild(value: Any, convert: Any, codecs: List[Codec]) -> Any:
    if isinstance(value, dict):
        pairs = value.items()
        items = [(convert(k, codecs), convert(v, codecs)) for k, v in pairs]
        if not isinstance(value, OrderedDict):
            return dict(items)
        ordered = OrderedDict(items)
        ordered.__dict__.update(value.__dict__)
        return ordered
    if type(value) in (list, tuple, set):
        return type(value)(convert(item, codecs) for item in value)
    return value


def without_package(cfg: Any) -> Any:
    """Return a copy of a config that needs nothing of this package.

    Args:
        cfg: A config of either framework, or a dict.
    """
    cfg = copy.deepcopy(cfg)
    imports = cfg.get('custom_imports')
    if imports:
        names = imports['imports']
        names = [names] if isinstance(names, str) else list(names)
        kept = [name for name in names if not _is_of_package(name)]
        if kept:
            imports['imports'] = kept
        else:
            cfg.pop('custom_imports')
    hooks = cfg.get('custom_hooks')
    if hooks:
        cfg['custom_hooks'] = [hook for hook in hooks if not _is_ours(hook)]
    hooks = cfg.get('default_hooks') or {}
    for name in [name for name, hook in hooks.items() if _is_ours(hook)]:
        hooks.pop(name)
    for name in ('optim_wrapper', 'optimizer'):
        optimizer = cfg.get(name)
        if isinstance(optimizer, dict):
            kind = _name(optimizer.get('constructor'))
            if kind.rpartition('.')[2] == _CONSTRUCTOR:
                optimizer.pop('constructor')
    return cfg


def _is_ours(hook: Any) -> bool:
    kind = hook.get('type') if isinstance(hook, dict) else type(hook)
    path, _, name = _name(kind).rpartition('.')
    return path.partition('.')[0] in _ORIGINS and (
        _is_of_package(path) or name in _HOOKS
    )


def _is_of_package(name: str) -> bool:
    return name.partition('.')[0] == _PACKAGE


def _name(kind: Any) -> str:
    """Return the full name of a class, or what a config says instead."""
    if isinstance(kind, type):
        return f'{kind.__module__}.{kind.__qualname__}'
    return str(kind)
