"""What a run does that our hook has to know: on the run's objects alone.

mmcv 1.x has no moment at which something is loaded, saved, evaluated or
logged, so the methods that do are wrapped on the runner and on its hooks.
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any, Callable, ContextManager, Dict

import torch.distributed as dist
from mmcv.runner import (
    CheckpointHook,
    DistEvalHook,
    EvalHook,
    LoggerHook,
    OptimizerHook,
)
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet_ema.checkpoint.folder import remove_stopped
from mmdet_ema.errors import OptionError, show
from mmdet_ema.for_mmcv1.checkpoints import save_whole, watch_loading
from mmdet_ema.training import passes
from mmdet_ema.training.passes import same_randomness
from mmdet_ema.training.patches import replacing, wrap_once

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
    runs = skipped = False

    def run(method: Method, *args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        given = inspect.signature(method).bind(*args, **kwargs).arguments
        flow = zip(given.get('data_loaders', ()), given.get('workflow', ()))
        trains = (loader for loader, (mode, _) in flow if mode == 'train')
        ema.train_loader = next(trains, None)
        outer, runs = runs, True
        try:
            return method(*args, **kwargs)
        finally:
            runs = outer
            if not outer:
                ema.show_raw()

    def call_hook(method: Method, moment: str) -> Any:
        """Show the averages to all hooks between two epochs, in any order."""
        nonlocal skipped
        if moment in _TRAINS:
            ema.show_raw()
        if moment == 'before_train_iter' and ema.skips:
            return None
        if moment == 'after_train_iter':
            if not skipped:
                method(moment)
                ema.after_iteration(runner)
            skipped = False
            return None
        if moment not in _EPOCH_IS_OVER:
            return method(moment)
        if moment == 'after_train_epoch':
            ema.make_equal(runner, by_epoch=True)
            if ema.options.recalibrate:
                metrics = functools.partial(_metrics_of, runner)
                ema.recalibrate(runner, metrics)
        with ema.evaluating(runner, holds=runs):
            return method(moment)

    def run_iter(method: Method, *args: Any, **kwargs: Any) -> None:
        """Leave out what was trained before the resume."""
        nonlocal skipped
        if ema.skips and runner.mode == 'train':
            ema.skips -= 1
            skipped = True
            runner._iter -= 1  # the runner counts it
        else:
            method(*args, **kwargs)

    def register_hook(method: Method, *args: Any, **kwargs: Any) -> None:
        """Watch hooks that are registered in mid-run, too."""
        method(*args, **kwargs)
        if runs:
            watch_hooks(runner, ema)

    def save(method: Method, *args: Any, **kwargs: Any) -> None:
        if ema.options.safe_save:
            method = functools.partial(save_whole, runner, method)
        with ema.saving(runner):
            method(*args, **kwargs)

    wrap_once(runner, 'run', run)
    wrap_once(runner, 'call_hook', call_hook)
    if hasattr(runner, 'run_iter'):
        wrap_once(runner, 'run_iter', run_iter)
    wrap_once(runner, 'register_hook', register_hook)
    wrap_once(runner, 'val', _inside(lambda: ema.evaluating(runner)))
    wrap_once(runner, 'save_checkpoint', save)


def watch_hooks(runner: Any, ema: Any) -> None:
    """Tell our hook of whatever other hooks evaluate, save or log."""
    for hook in runner.hooks:
        _watch_hook(runner, ema, hook)


def _watch_hook(runner: Any, ema: Any, hook: Any) -> None:
    def step(method: Method, runner: Any) -> None:
        method(runner)
        ema.after_optimizer(runner)

    def catch_up(method: Method, runner: Any) -> Any:
        ema.catch_up()
        return method(runner)

    def log(method: Method, runner: Any) -> Any:
        trains = runner.mode == 'train' == hook.get_mode(runner)
        if trains and runner.rank == 0:
            ema.add_scalars(runner)
        return method(runner)

    if isinstance(hook, EvalHook):
        _watch_evaluation(ema, hook)
    elif isinstance(hook, OptimizerHook):
        wrap_once(hook, 'after_train_iter', step)
    elif isinstance(hook, CheckpointHook):

        def save(method: Method, *args: Any, **kwargs: Any) -> None:
            # all ranks come here, one writes
            ema.make_equal(runner, hook.by_epoch)
            method(*args, **kwargs)
            folder = hook.out_dir or ''
            if runner.rank == 0 and os.path.isdir(folder):
                remove_stopped(folder)

        wrap_once(hook, '_save_checkpoint', save)
    elif isinstance(hook, LoggerHook):
        # on every rank: some loggers log on one of them
        wrap_once(hook, 'after_train_iter', catch_up)
        wrap_once(hook, 'log', log)
    kinds = [kind.__name__ for kind in type(hook).__mro__]
    # some evaluation hooks are derived from mmcv's plain Hook
    if any('Eval' in kind for kind in kinds):
        view = _view_of(runner, ema)

        def evaluate(method: Method, runner: Any) -> Any:
            with ema.evaluating(runner, lazily=True):
                return method(view)

        for moment in _EVALUATES:
            wrap_once(hook, moment, evaluate)
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
    kind: Any = type(runner)

    def get(view: Any) -> Any:
        ema.on_model_taken(runner)
        return runner.model

    def put(view: Any, model: Any) -> None:
        runner.model = model

    parts = dict(model=property(get, put), __module__=kind.__module__)
    view: Any = object.__new__(type(kind)(kind.__name__, (kind,), parts))
    view.__dict__ = runner.__dict__
    return view


def _watch_evaluation(ema: Any, hook: Any) -> None:
    """Let an evaluation hook of mmcv evaluate what our hook is told to.

    Each set of weights gets a pass, the main one last: mmcv's hooks read the
    data and call the model themselves.
    """
    given: Any = getattr(hook, 'save_best', None)
    best, by_other = given, False
    if isinstance(given, str):
        where = type(hook).__name__
        best, by_other = passes.monitored(
            ema.options, where, 'save_best', given
        )
    if best != given:
        ema.log.info(passes.renamed(where, 'save_best', given, [best]))
        hook.save_best = best
    if by_other:  # a part of the name of a file
        hook.key_indicator = best.replace('/', '_')
    others: Dict[str, Any] = {}

    def do_evaluate(
        method: Method, runner: Any, *args: Any, **kwargs: Any
    ) -> Any:
        again = functools.partial(method, runner, *args, **kwargs)
        if isinstance(hook, DistEvalHook):
            ema.make_equal(runner, hook.by_epoch)
        if getattr(hook, 'broadcast_bn_buffer', False):
            # the hook does so as well, when the averages are in the model:
            # it would miss the raw statistics
            with ema.raw(runner):
                layer: Any
                for layer in runner.model.modules():
                    is_norm = isinstance(layer, _BatchNorm)
                    if is_norm and layer.track_running_stats:
                        dist.broadcast(layer.running_var, 0)
                        dist.broadcast(layer.running_mean, 0)
        for name in ema.passes[:-1]:
            ema.tell_evaluation(name)
            with ema.only(runner, name):
                found = _metrics_apart(hook, again, runner)
            passes.add_metrics(others, passes.named(found, name))
        ema.tell_evaluation()
        output = runner.log_buffer.output
        for name in others:  # of the last evaluation, if no logger is there
            output.pop(name, None)
        try:
            with ema.evaluating(runner):
                result = again()
            passes.add_metrics(output, others)
            ema.tell_metrics(output)
        finally:
            others.clear()
        return result

    def evaluate(method: Method, *args: Any, **kwargs: Any) -> Any:
        """Return the metric of another set where ``save_best`` says so.

        None where they were not evaluated: there is no best file then.
        """
        if not by_other or hook.save_best is None:
            return method(*args, **kwargs)
        with replacing(hook, 'save_best', None):
            method(*args, **kwargs)
        if others and best not in others:
            raise OptionError(
                f'save_best={show(best)} is not among the metrics of the '
                f'other sets of weights: {", ".join(others)}.'
            )
        return others.get(best)

    wrap_once(hook, '_do_evaluate', do_evaluate)
    wrap_once(hook, 'evaluate', evaluate)


def _metrics_of(runner: Any, hook: Any) -> Dict[str, Any]:
    # not by our own method, which evaluates all sets of weights
    evaluate = functools.partial(type(hook)._do_evaluate, hook, runner)
    return _metrics_apart(hook, evaluate, runner)


def _metrics_apart(
    hook: Any, evaluate: Callable[[], Any], runner: Any
) -> Dict[str, Any]:
    """Evaluate what the model holds; nothing is logged or saved."""
    buffer = runner.log_buffer
    before, ready = dict(buffer.output), buffer.ready
    buffer.output.clear()
    try:
        with same_randomness(), replacing(hook, 'save_best', None):
            evaluate()
        found = dict(buffer.output)
    finally:
        buffer.ready = ready
        buffer.output.clear()
        buffer.output.update(before)
    if runner.world_size > 1:
        dist.barrier()  # the second pass writes into the same folder
    found.pop('eval_iter_num', None)
    return found
