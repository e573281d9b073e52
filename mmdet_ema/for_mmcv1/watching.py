"""Everything that is changed in a run that has our hook: on its objects alone.

mmcv 1.x has no moment at which something is loaded, saved, evaluated or
logged, so the methods that do are wrapped on the runner and on its hooks.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any, Callable

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
from mmdet_ema.for_mmcv1.runner_facts import note_loader
from mmdet_ema.for_mmcv1.wrapping import wrap_once

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


def watch(runner: Any, ema: Any) -> None:
    """Tell our hook of all that a runner does.

    Args:
        runner: The runner.
        ema: Our hook.
    """
    watch_loading(runner, ema)
    if not ema.enabled:
        return
    ema.view = view_of(runner, ema)
    for name, around in (
        ('run', _run),
        ('call_hook', _call_hook),
        ('val', _val),
        ('save_checkpoint', _save),
        ('register_hook', _register_hook),
    ):
        wrap_once(runner, name, functools.partial(around, ema, runner))


def watch_hooks(runner: Any, ema: Any) -> None:
    """Tell our hook of whatever other hooks evaluate, save or log.

    Args:
        runner: The runner; every hook of it is wrapped once.
        ema: Our hook.

    Raises:
        OptionError: If a best file is wanted by metrics that nobody computes.
    """
    for hook in runner.hooks:
        if isinstance(hook, EvalHook):
            check_best(hook, ema.evaluates_both)
            evaluate = functools.partial(evaluate_with, ema, hook)
            wrap_once(hook, '_do_evaluate', evaluate)
            by_raw = functools.partial(evaluate_by_raw, ema, hook)
            wrap_once(hook, 'evaluate', by_raw)
        elif isinstance(hook, OptimizerHook):
            stepping = functools.partial(_step, ema)
            wrap_once(hook, 'after_train_iter', stepping)
        elif isinstance(hook, CheckpointHook):
            checkpoint = functools.partial(_save_on_one_rank, ema, hook)
            wrap_once(hook, '_save_checkpoint', checkpoint)
        elif isinstance(hook, LoggerHook):
            after_iter = functools.partial(_after_iter, ema)
            wrap_once(hook, 'after_train_iter', after_iter)
            wrap_once(hook, 'log', functools.partial(_log, ema, hook))
        # some evaluation hooks are derived from mmcv's plain Hook
        if any('Eval' in kind.__name__ for kind in type(hook).__mro__):
            for moment in _EVALUATES:
                wrap_once(hook, moment, functools.partial(_lazily, ema))
        synchronizing = _synchronizing(hook)
        if synchronizing is not None:
            wrap_once(hook, synchronizing, functools.partial(_raw, ema))


def view_of(runner: Any, ema: Any) -> Any:
    """Return a runner as an evaluation hook sees it.

    It is the runner in all respects, but that the averages are put into the
    model when the hook takes it, at a moment that only the hook knows.

    Args:
        runner: The runner.
        ema: Our hook.
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


def _synchronizing(hook: Any) -> Any:
    if isinstance(hook, CheckpointHook) and not hook.sync_buffer:
        return None
    kinds = (_SYNCHRONIZES.get(kind.__name__) for kind in type(hook).__mro__)
    return next(filter(None, kinds), None)


def _run(
    ema: Any, runner: Any, run: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Put the raw weights back however the run ends."""
    given = inspect.signature(run).bind(*args, **kwargs).arguments
    loaders, flows = given.get('data_loaders'), given.get('workflow')
    if loaders is not None and flows is not None:
        note_loader(runner, loaders, flows)
    outer, ema.runs = ema.runs, True
    try:
        return run(*args, **kwargs)
    finally:
        ema.runs = outer
        if not outer:
            ema.show_raw()


def _call_hook(
    ema: Any, runner: Any, call_hook: Callable[[str], Any], moment: str
) -> Any:
    """Show the averages to all hooks between two epochs, in any order."""
    if moment in _TRAINS:
        ema.show_raw()
    if moment not in _EPOCH_IS_OVER:
        return call_hook(moment)
    if moment == 'after_train_epoch':
        ema.make_equal(runner, by_epoch=True)
    with ema.evaluating(runner, holds=ema.runs):
        return call_hook(moment)


def _val(
    ema: Any, runner: Any, val: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    with ema.evaluating(runner):
        return val(*args, **kwargs)


def _save(
    ema: Any, runner: Any, save: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    with ema.saving(runner):
        return save(*args, **kwargs)


def _register_hook(
    ema: Any, runner: Any, register: Callable[..., Any], *args: Any, **kw: Any
) -> None:
    """Watch hooks that are registered in mid-run, too."""
    register(*args, **kw)
    if ema.runs:
        watch_hooks(runner, ema)


def _lazily(ema: Any, moment: Callable[[Any], Any], runner: Any) -> Any:
    with ema.evaluating_lazily():
        return moment(ema.view)


def _raw(ema: Any, method: Callable[[Any], Any], runner: Any) -> Any:
    with ema.raw(runner):
        return method(runner)


def _step(ema: Any, step: Callable[[Any], Any], runner: Any) -> Any:
    step(runner)
    ema.after_optimizer(runner)


def _save_on_one_rank(
    ema: Any, hook: Any, save: Callable[[Any], None], runner: Any
) -> None:
    """Make buffers equal first: all ranks come here, one of them writes."""
    ema.make_equal(runner, hook.by_epoch)
    save(runner)


def _after_iter(ema: Any, after: Callable[[Any], None], runner: Any) -> None:
    """Catch up first, on every rank: some loggers log on one of them."""
    ema.catch_up()
    after(runner)


def _log(ema: Any, hook: Any, log: Callable[[Any], Any], runner: Any) -> Any:
    if runner.mode == 'train' and hook.get_mode(runner) == 'train':
        return ema.log_training(log, runner)
    return log(runner)
