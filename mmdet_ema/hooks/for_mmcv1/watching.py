"""Moments that mmcv's hooks do not have: saving, evaluating, logging.

The methods that save, evaluate and log are wrapped on the objects of one run.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

from mmcv.runner import (
    CheckpointHook,
    EvalHook,
    LoggerHook,
    OptimizerHook,
)

from mmdet_ema.hooks.for_mmcv1.evaluation import check_best, evaluate_with
from mmdet_ema.hooks.for_mmcv1.wrapping import wrap_once


def watch(runner: Any, ema: Any) -> None:
    """Tell our hook of whatever is evaluated, saved or logged.

    Args:
        runner: The runner; it and its hooks are wrapped once.
        ema: Our hook.

    Raises:
        OptionError: If a best file is wanted by metrics that nobody computes.
    """
    wrap_once(runner, 'val', functools.partial(_val, ema, runner))
    save = functools.partial(_save, ema, runner)
    wrap_once(runner, 'save_checkpoint', save)
    for hook in runner.hooks:
        if isinstance(hook, EvalHook):
            check_best(hook, ema.evaluates_both)
            evaluate = functools.partial(evaluate_with, ema, hook)
            wrap_once(hook, '_do_evaluate', evaluate)
            _watch_overrides(hook, ema)
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


def _watch_overrides(hook: Any, ema: Any) -> None:
    """Watch an evaluation hook that evaluates in a way of its own."""
    name = 'after_train_epoch' if hook.by_epoch else 'after_train_iter'
    if getattr(type(hook), name) is not getattr(EvalHook, name):
        wrap_once(hook, name, functools.partial(_evaluate, ema, hook))


def _evaluate(
    ema: Any, hook: Any, evaluate: Callable[[Any], Any], runner: Any
) -> Any:
    if not hook._should_evaluate(runner):
        return evaluate(runner)
    with ema.evaluating(runner):
        return evaluate(runner)


def _step(ema: Any, step: Callable[[Any], Any], runner: Any) -> Any:
    step(runner)
    ema.after_optimizer(runner)


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
