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
from numbers import Real
from typing import Any, Callable, ContextManager, Dict, Iterator, Sequence

from mmengine.runner import BaseLoop

from mmdet_ema.for_mmengine.runner import model_of, schedulers_of
from mmdet_ema.training import metrics as names_of_metrics
from mmdet_ema.training.metrics import add_metrics, named
from mmdet_ema.training.no_trace import leaving_no_trace
from mmdet_ema.training.options import Options
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


def watch_loops(
    runner: Any, passes: Sequence[str], evaluating: Evaluating
) -> None:
    """Let each evaluation loop, there or to come, run once a set of weights.

    ``evaluating`` is a context for a pass on the set of that name: it takes
    the set out again, which a loop that fails would not. The last one of
    ``passes`` has the plain names.
    """

    def watch(loop: Any) -> Any:
        run = loop.run

        @functools.wraps(run)
        def run_passes(*args: Any, **kwargs: Any) -> Any:
            once = functools.partial(run, *args, **kwargs)
            with _metrics_of(loop) as metrics:
                return _run_passes(runner, metrics, passes, evaluating, once)

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

    What waits for one by its name of version 0.1 gets that of today.
    """
    owners = [*runner.hooks, *schedulers_of(runner)]
    for owner, word in itertools.product(owners, ('save_best', 'monitor')):
        given: Any = getattr(owner, word, None)
        where = type(owner).__name__
        new = {
            name: names_of_metrics.monitored(options, where, word, name)
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
        today = new.values()
        log.info(names_of_metrics.renamed(where, word, given, today))


def rename_history(checkpoint: Any) -> None:
    """Give metrics in the history of a checkpoint their names of today.

    Else a run that resumes forgets its best file, and logs the last value
    under the old name for ever.
    """
    today, hub = names_of_metrics.of_version_0_1, checkpoint.get('message_hub')
    for part in hub.values() if isinstance(hub, dict) else ():
        if isinstance(part, dict):
            items = [(today(name), value) for name, value in part.items()]
            part.clear()
            part.update(items)


def _run_passes(
    runner: Any,
    metrics: Sequence[Any],
    passes: Sequence[str],
    evaluating: Evaluating,
    run: Callable[[], Any],
) -> Any:
    """Run a loop once a set; every pass but the last leaves no trace."""
    if len(passes) == 1:
        with evaluating(passes[0]):
            return run()
    # a loop over two data sets reports twice in a pass: one dict each
    kept: Dict[int, Dict[str, Any]] = defaultdict(dict)
    for name in passes[:-1]:
        leaving = leaving_no_trace(model_of(runner))
        files = _own_files(metrics, name)
        with leaving, files, _telling(runner, kept, name), evaluating(name):
            run()
    with _telling(runner, kept), evaluating(passes[-1]):
        return run()


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
def _telling(
    runner: Any, kept: Dict[int, Dict[str, Any]], name: str = ''
) -> Iterator[None]:
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
    runner: Any, evaluating: Evaluating, weights: str, name: str
) -> Dict[str, Any]:
    """Return the numbers of a pass of its own, which hooks do not report.

    Files of metrics have ``name`` in theirs.
    """
    loop: Any = runner.val_loop
    found: Dict[str, Any] = {}
    leaving = leaving_no_trace(model_of(runner))
    files = functools.partial(_own_files, name=name)
    telling = _telling(runner, defaultdict(dict), name)
    with _metrics_of(loop) as metrics, leaving, files(metrics), telling:
        call_hook = runner.call_hook

        def call(stage: str, **kwargs: Any) -> None:
            if stage == 'after_val_epoch':
                found.update(kwargs.get('metrics') or {})
            call_hook(stage, **kwargs)

        with evaluating(weights), replacing(runner, 'call_hook', call):
            # once, not once a set
            getattr(loop.run, '__wrapped__', loop.run)()
    return {k: x for k, x in found.items() if isinstance(x, Real)}
