"""Edit a loaded config: an EMA hook for one that has none."""

from __future__ import annotations

from typing import Any, List, Mapping, Optional

from mmdet_ema.errors import OptionError, show

PACKAGE = 'mmdet_ema'
EMA_HOOKS = (
    'EMAHook',
    'ExpMomentumEMAHook',
    'LinearMomentumEMAHook',
    'MEGVIIEMAHook',
)
FOREIGN = 'MMEngineEMAHook'
"""mmengine's own hook beside ours: it knows none of our options."""


def add_ema(cfg: Any, options: Mapping[str, Any]) -> None:
    """Add the package and a hook to a config that has none; in place.

    A config with a hook of its own takes no options of the command line.
    """
    imports = dict(cfg.get('custom_imports') or {})
    names = imports.get('imports') or []
    names = [names] if isinstance(names, str) else list(names)
    if PACKAGE not in names:
        imports['imports'] = [*names, PACKAGE]
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
        if _kind(hook) != FOREIGN:
            hook['evaluate'] = weights
        elif weights != 'ema':
            raise OptionError(
                f'--weights {weights}: {FOREIGN} tests the averages alone; '
                f"say type='EMAHook' in the config."
            )


def _ema_hooks(cfg: Any) -> List[Any]:
    default = (cfg.get('default_hooks') or {}).values()
    hooks = [*default, *(cfg.get('custom_hooks') or [])]
    return [hook for hook in hooks if _kind(hook) in (*EMA_HOOKS, FOREIGN)]


def _kind(hook: Any) -> str:
    kind = hook.get('type') if isinstance(hook, dict) else type(hook)
    name = getattr(kind, '__name__', kind)
    return str(name).rpartition('.')[2]
