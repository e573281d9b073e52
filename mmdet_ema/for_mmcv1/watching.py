"""Everything that is changed in a run that has our hook: on its objects alone.

mmcv 1.x has no moment at which something is loaded, saved, evaluated or
logged, so the methods that do are wrapped on the runner and on its hooks.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any, Callable, ContextManager

from mmcv.runner import (
    CheckpointHook,
    EvalHook,
    LoggerHook,
    OptimizerHook,
)

from mmdet_ema.for_mmcv1.evaluation import (
    check_best,
    evaluate_by_raw,
    evaluate_with,
)
from mmdet_ema.for_mmcv1.loading import watch_loading
from mmdet_ema.for_mmcv1.runner import note_loader, wrap_once

_TRAINS = ('before_train_epoch', 'before_train_iter')
_EPOCH_IS_OVER = ('after_train_epoch', 'after_epoch', 'after_run')
# the other moments are of _EPOCH_IS_OVER, or in runner.val()
_EVALUATES = (*_TRAINS, 'after_train_iter')
# they make ranks agree on the weights that training goes on from
_SYNCHRONIZES = {
    'CheckpointHook': 'after_train_epoch',
    'SyncBuffersHook': 'after_epoch',
    'SyncNormHook': 'after_train_epoch',
}
Method = Callable[..., Any]


def watch(runner: Any, ema: Any) -> None:
    """Tell our hook of all that a runner does."""
    watch_loading(runner, ema)
    if not ema.enabled:
        return
    ema.view = _view_of(runner, ema)

    def run(method: Method, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(method).bind(*args, **kwargs).arguments
        loaders, flows = given.get('data_loaders'), given.get('workflow')
        if loaders is not None and flows is not None:
            note_loader(runner, loaders, flows)
        outer, ema.runs = ema.runs, True
        try:
            return method(*args, **kwargs)
        finally:
            ema.runs = outer
            if not outer:
                ema.show_raw()

    def call_hook(method: Method, moment: str) -> Any:
        """Show the averages to all hooks between two epochs, in any order."""
        if moment in _TRAINS:
            ema.show_raw()
        if moment not in _EPOCH_IS_OVER:
            return method(moment)
        if moment == 'after_train_epoch':
            ema.make_equal(runner, by_epoch=True)
        with ema.evaluating(runner, holds=ema.runs):
            return method(moment)

    def register_hook(method: Method, *args: Any, **kwargs: Any) -> None:
        """Watch hooks that are registered in mid-run, too."""
        method(*args, **kwargs)
        if ema.runs:
            watch_hooks(runner, ema)

    wrap_once(runner, 'run', run)
    wrap_once(runner, 'call_hook', call_hook)
    wrap_once(runner, 'register_hook', register_hook)
    wrap_once(runner, 'val', _inside(lambda: ema.evaluating(runner)))
    wrap_once(runner, 'save_checkpoint', _inside(lambda: ema.saving(runner)))


def watch_hooks(runner: Any, ema: Any) -> None:
    """Tell our hook of whatever other hooks evaluate, save or log."""
    for hook in runner.hooks:
        _watch_hook(runner, ema, hook)


def _watch_hook(runner: Any, ema: Any, hook: Any) -> None:
    def step(method: Method, runner: Any) -> None:
        method(runner)
        ema.after_optimizer(runner)

    def save(method: Method, runner: Any) -> None:
        """Make buffers equal first: all ranks come here, one writes."""
        ema.make_equal(runner, hook.by_epoch)
        method(runner)

    def after_iter(method: Method, runner: Any) -> None:
        """Catch up first, on every rank: some loggers log on one of them."""
        ema.catch_up()
        method(runner)

    def log(method: Method, runner: Any) -> Any:
        if runner.mode == 'train' and hook.get_mode(runner) == 'train':
            ema.add_scalars(runner)
        return method(runner)

    def evaluate_lazily(method: Method, runner: Any) -> Any:
        with ema.evaluating_lazily():
            return method(ema.view)

    if isinstance(hook, EvalHook):
        check_best(hook, ema.evaluates_both)
        evaluate = functools.partial(evaluate_with, ema, hook)
        wrap_once(hook, '_do_evaluate', evaluate)
        by_raw = functools.partial(evaluate_by_raw, ema, hook)
        wrap_once(hook, 'evaluate', by_raw)
    elif isinstance(hook, OptimizerHook):
        wrap_once(hook, 'after_train_iter', step)
    elif isinstance(hook, CheckpointHook):
        wrap_once(hook, '_save_checkpoint', save)
    elif isinstance(hook, LoggerHook):
        wrap_once(hook, 'after_train_iter', after_iter)
        wrap_once(hook, 'log', log)
    kinds = [kind.__name__ for kind in type(hook).__mro__]
    # some evaluation hooks are derived from mmcv's plain Hook
    if any('Eval' in kind for kind in kinds):
        for moment in _EVALUATES:
            wrap_once(hook, moment, evaluate_lazily)
    synchronizing = next((x for x in kinds if x in _SYNCHRONIZES), None)
    if synchronizing and getattr(hook, 'sync_buffer', True):
        name = _SYNCHRONIZES[synchronizing]
        wrap_once(hook, name, _inside(lambda: ema.raw(runner)))


def _inside(context: Callable[[], ContextManager[None]]) -> Method:
    def around(method: Method, *args: Any, **kwargs: Any) -> Any:
        with context():
            return method(*args, **kwargs)

    return around


def _view_of(runner: Any, ema: Any) -> Any:
    """Return a runner as an evaluation hook sees it.

    It is the runner in all respects, but that the averages are put into the
    model when the hook takes it, at a moment that only the hook knows.
    """
    kind = type(runner)

    def get(view: Any) -> Any:
        ema.on_model_taken(runner)
        return runner.model

    def put(view: Any, model: Any) -> None:
        runner.model = model

    parts = dict(model=property(get, put), __module__=kind.__module__)
    view: Any = object.__new__(
        types.new_class(kind.__name__, (kind,), {}, lambda x: x.update(parts))
    )
    view.__dict__ = runner.__dict__
    return view
