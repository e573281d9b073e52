"""Evaluate several sets of weights, each in a pass of its own.

The run's own loop runs once a set, with the run's own evaluator, and calls
the run's hooks, so that what remembers the last batch, or fuses layers before
an evaluation, is right for each set. Metrics are reported once, after the
last pass.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections import defaultdict
from contextlib import nullcontext
from numbers import Real
from typing import Any, Callable, ContextManager, Dict, Iterator, Sequence

from mmengine.runner import BaseLoop

from mmdet_ema.for_mmengine.runner import model_of, schedulers_of
from mmdet_ema.training import passes
from mmdet_ema.training.options import Options
from mmdet_ema.training.passes import add_metrics, leaving_no_trace, named
from mmdet_ema.training.patches import replacing

_ENDS = {
    'after_val_epoch': 'before_val_epoch',
    'after_test_epoch': 'before_test_epoch',
}
# options of metrics that name a file or a folder
_OUTPUTS = """
    csv_savepath jsonfile_prefix out_file_path outfile_path outfile_prefix
    output_dir pklfile_prefix pred_dir proposals_file result_prefix seg_out_dir
    submission_prefix
"""
_MARK = '_mmdet_ema_guard'
Evaluating = Callable[[str], ContextManager[None]]
Kept = Dict[int, Dict[str, Any]]


def watch_loops(
    runner: Any, sets: Sequence[str], evaluating: Evaluating
) -> None:
    """Let each evaluation loop, there or to come, run once a set of weights.

    ``evaluating`` is a context for a pass on the set of that name: it takes
    the set out again, which a loop that fails would not. The last one of
    ``sets`` has the plain names.
    """
    *others, main = sets

    def watch(loop: Any) -> Any:
        run = loop.run

        @functools.wraps(run)
        def run_passes(*args: Any, **kwargs: Any) -> Any:
            once = functools.partial(run, *args, **kwargs)
            # a loop over two data sets reports twice in a pass: one dict each
            kept: Kept = defaultdict(dict)
            with _metrics_of(loop) as metrics:
                for name in others:
                    context = evaluating(name)
                    _run_apart(runner, metrics, context, once, name, kept)
                told = _telling(runner, kept) if others else nullcontext()
                with told, evaluating(main):
                    return once()

        if not getattr(run, _MARK, False):
            setattr(run_passes, _MARK, True)
            loop.run = run_passes
        return loop

    def watched(build: Callable[[Any], Any], loop: Any) -> Any:
        return watch(build(loop))

    for loop in (runner._val_loop, runner._test_loop):
        if isinstance(loop, BaseLoop):
            watch(loop)
    for name in ('build_val_loop', 'build_test_loop'):
        if name not in vars(runner):
            build = getattr(runner, name)
            setattr(runner, name, functools.partial(watched, build))


def check_monitored(runner: Any, options: Options, log: Any) -> None:
    """Check that nothing waits for metrics of weights not evaluated.

    What waits for one by a name of older configs gets that of today.
    """
    owners = [*runner.hooks, *schedulers_of(runner)]
    for owner, word in itertools.product(owners, ('save_best', 'monitor')):
        given: Any = getattr(owner, word, None)
        where = type(owner).__name__
        new = {
            name: passes.monitored(options, where, word, name)[0]
            for name in (given if isinstance(given, list) else [given])
            if isinstance(name, str)
        }
        if [*new] == [*new.values()]:
            continue
        for attribute in (word, 'key_indicators'):
            names: Any = getattr(owner, attribute, None)
            if isinstance(names, list):
                setattr(owner, attribute, [new[name] for name in names])
            elif isinstance(names, str):
                setattr(owner, attribute, new[names])
        # of CheckpointHook: the rule was found by the name, and stays
        better: Any = getattr(owner, 'is_better_than', None)
        if isinstance(better, dict):
            owner.is_better_than = {new[k]: x for k, x in better.items()}
        log.info(passes.renamed(where, word, given, new.values()))


def _run_apart(
    runner: Any,
    metrics: Sequence[Any],
    evaluating: ContextManager[None],
    run: Callable[[], Any],
    name: str,
    kept: Kept,
) -> None:
    """Run a loop without a trace; its metrics are kept under a name."""
    leaving = leaving_no_trace(model_of(runner))
    files = _own_files(metrics, name)
    with leaving, files, _telling(runner, kept, name), evaluating:
        run()


@contextlib.contextmanager
def _metrics_of(loop: Any) -> Iterator[Sequence[Any]]:
    """Use the metrics of a loop; what breaks off leaves nothing in them."""
    metrics = getattr(getattr(loop, 'evaluator', None), 'metrics', ())
    try:
        yield metrics
    except BaseException:
        for metric in metrics:
            results: Any = getattr(metric, 'results', None)
            if hasattr(results, 'clear'):
                results.clear()
        raise


@contextlib.contextmanager
def _telling(runner: Any, kept: Kept, name: str = '') -> Iterator[None]:
    """Let hooks hear of the metrics of all passes in the last one, once.

    Before it, in a pass with a name, they are kept: a hook that logs, or
    chooses the best file, is not called. One that was told that the pass
    begins is told that it ends.
    """
    call_hook, numbers = runner.call_hook, itertools.count()

    def call(stage: str, **kwargs: Any) -> None:
        metrics, begins = kwargs.get('metrics'), _ENDS.get(stage)
        if begins and name:
            kwargs['metrics'] = found = named(metrics or {}, name)
            add_metrics(kept[next(numbers)], found)
            hooks = [
                hook
                for hook in runner._hooks
                if begins in hook.get_triggered_stages()
            ]
            with replacing(runner, '_hooks', hooks):
                call_hook(stage, **kwargs)
            return
        if begins and isinstance(metrics, dict):
            add_metrics(metrics, kept[next(numbers)])
        call_hook(stage, **kwargs)

    with replacing(runner, 'call_hook', call):
        yield


@contextlib.contextmanager
def _own_files(metrics: Sequence[Any], name: str) -> Iterator[None]:
    """Let metrics write files with the set's name in theirs."""
    before = [
        (metric, option, vars(metric)[option])
        for metric in metrics
        for option in _OUTPUTS.split()
        if isinstance(vars(metric).get(option), str)
    ]
    for metric, option, path in before:
        stem, suffix = os.path.splitext(path)
        if os.path.isdir(path):
            os.makedirs(f'{stem}_{name}{suffix}', exist_ok=True)
        setattr(metric, option, f'{stem}_{name}{suffix}')
    try:
        yield
    finally:
        for metric, option, path in before:
            setattr(metric, option, path)


def evaluate_apart(
    runner: Any, evaluating: ContextManager[None], name: str
) -> Dict[str, Any]:
    """Return the numbers of a pass of its own, which hooks do not report.

    Files of metrics have ``name`` in theirs.
    """
    loop: Any = runner.val_loop
    # once, not once a set
    run = getattr(loop.run, '__wrapped__', loop.run)
    kept: Kept = defaultdict(dict)
    with _metrics_of(loop) as metrics:
        _run_apart(runner, metrics, evaluating, run, name, kept)
    end = len(passes.metric_of(name, ''))
    return {
        metric[:-end]: x
        for found in kept.values()
        for metric, x in found.items()
        if isinstance(x, Real)
    }
