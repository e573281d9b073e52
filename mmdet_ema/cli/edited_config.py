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
    """Add the hook to a config that has none; in place.

    Args:
        cfg: A loaded config.
        options: Options of the hook from the command line.

    Raises:
        OptionError: If the config has a hook and options are given.
    """
    import_package(cfg)
    present = ema_hooks(cfg)
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
    """Make a config test these weights; in place.

    Args:
        cfg: A loaded config.
        weights: 'ema', 'raw' or 'both'; None for what the config says.

    Raises:
        OptionError: If the config's hook is mmengine's, which has no choice.
    """
    add_ema(cfg, {})
    if weights is None:
        return
    for hook in ema_hooks(cfg):
        if _kind(hook) != FOREIGN:
            hook['evaluate'] = weights
        elif weights != 'ema':
            raise OptionError(
                f'--weights {weights}: {FOREIGN} tests the averages alone; '
                f"say type='EMAHook' in the config."
            )


def ema_hooks(cfg: Any) -> List[Any]:
    """Return the EMA hooks in a config, as dicts."""
    default = (cfg.get('default_hooks') or {}).values()
    hooks = [*default, *(cfg.get('custom_hooks') or [])]
    return [hook for hook in hooks if _kind(hook) in (*EMA_HOOKS, FOREIGN)]


def import_package(cfg: Any) -> None:
    """Add the package to a config's ``custom_imports``; in place."""
    imports = dict(cfg.get('custom_imports') or {})
    names = imports.get('imports') or []
    names = [names] if isinstance(names, str) else list(names)
    if PACKAGE not in names:
        imports['imports'] = [*names, PACKAGE]
        imports.setdefault('allow_failed_imports', False)
        cfg.custom_imports = imports


def _kind(hook: Any) -> str:
    kind = hook.get('type') if isinstance(hook, dict) else type(hook)
    name = getattr(kind, '__name__', kind)
    return str(name).rpartition('.')[2]
