"""Make ``dict(type='EMAHook')`` build our hook, from any scope."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Callable, Iterator

from mmengine.hooks.ema_hook import EMAHook as MMEngineEMAHook
from mmengine.registry import (
    HOOKS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    STRATEGIES,
    Registry,
)

from mmdet_ema.errors import OptionError, show
from mmdet_ema.for_mmengine.bias_warmup_hook import BiasWarmupHook
from mmdet_ema.for_mmengine.checkpoints import allow_framework_types
from mmdet_ema.for_mmengine.ema_hook import EMAHook
from mmdet_ema.for_mmengine.fsdp2_strategy import FSDP2Strategy
from mmdet_ema.for_mmengine.optimizer_constructor import (
    EMAOptimizerConstructor,
)
from mmdet_ema.training.compatible import instead_of
from mmdet_ema.training.report import announce


def register() -> None:
    """Register the hook in mmengine's root registry.

    The registries of mmdet, mmdet3d and mmseg fall back to the root's, and a
    child with an ``EMAHook`` of its own (mmpretrain's) builds ours as well.
    The framework's own hook stays as ``MMEngineEMAHook``.
    """
    for name, kind in (
        ('EMAHook', EMAHook),
        ('MMEngineEMAHook', MMEngineEMAHook),
        ('BiasWarmupHook', BiasWarmupHook),
    ):
        HOOKS.register_module(name=name, module=kind, force=True)
    # a child takes over the root's function when it is made
    plain = HOOKS.build_func
    for registry in _with_children(HOOKS):
        if registry.build_func is plain:
            registry.build_func = functools.partial(_build, plain)
    OPTIM_WRAPPER_CONSTRUCTORS.register_module(
        module=EMAOptimizerConstructor, force=True
    )
    STRATEGIES.register_module(module=FSDP2Strategy, force=True)
    allow_framework_types()


def _with_children(registry: Registry) -> Iterator[Registry]:
    yield registry
    for child in registry.children.values():
        yield from _with_children(child)


def _build(
    build: Callable[..., Any],
    cfg: Any,
    registry: Registry,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Build a hook; ours, where it is an ``EMAHook`` of any framework."""
    given = cfg.get('type') if isinstance(cfg, dict) else None
    name, kind = given if isinstance(given, str) else '', given
    if name.rpartition('.')[2] == 'EMAHook':
        # frameworks register theirs when their scope is first used
        scope = cfg.get('_scope_')
        with registry.switch_scope_and_registry(scope) as found:
            kind = found.get(name)
    theirs = (
        inspect.isclass(kind)
        and issubclass(kind, MMEngineEMAHook)
        and kind.__name__ == 'EMAHook'
    )
    if theirs:
        cfg = {**cfg, 'type': EMAHook}
    try:
        hook = build(cfg, registry, *args, **kwargs)
    except KeyError as error:
        advice = instead_of(name)
        if not advice or 'is not in the' not in str(error):
            raise
        raise OptionError(
            f'type={show(name)} is not a hook of this generation.{advice}'
        ) from None
    if theirs or (name and kind is EMAHook):
        announce('EMAHook', 'MMEngineEMAHook')
    return hook
