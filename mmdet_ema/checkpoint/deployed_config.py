"""The config that travels in a file: of the model that is deployed.

OpenMMLab's tools build a model from the config in ``meta``, on machines where
this package is not: ``DetInferencer(weights=...)``, converters. The averages
are in ``state_dict`` already, so nothing there needs the import or the hook.
"""

from __future__ import annotations

import copy
from typing import Any

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
            kind = _full_name(optimizer.get('constructor'))
            if kind.rpartition('.')[2] == _CONSTRUCTOR:
                optimizer.pop('constructor')
    return cfg


def _is_ours(hook: Any) -> bool:
    kind = hook.get('type') if isinstance(hook, dict) else type(hook)
    path, _, name = _full_name(kind).rpartition('.')
    return path.partition('.')[0] in _ORIGINS and (
        _is_of_package(path) or name in _HOOKS
    )


def _is_of_package(name: str) -> bool:
    return name.partition('.')[0] == _PACKAGE


def _full_name(kind: Any) -> str:
    if isinstance(kind, type):
        return f'{kind.__module__}.{kind.__qualname__}'
    return str(kind)
