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
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
)

from mmengine.runner import BaseLoop

from mmdet_ema.errors import OptionError, show
from mmdet_ema.for_mmengine.runner import model_of
from mmdet_ema.training.no_trace import leaving_no_trace

_ENDS = {
    'after_val_epoch': 'before_val_epoch',
    'after_test_epoch': 'before_test_epoch',
}
_OUTPUTS = (
    'csv_savepath',
    'jsonfile_prefix',
    'out_file_path',
    'outfile_path',
    'outfile_prefix',
    'output_dir',
    'pklfile_prefix',
    'pred_dir',
    'proposals_file',
    'result_prefix',
    'seg_out_dir',
    'submission_prefix',
)
_MARK = '_mmdet_ema_guard'
Call = Callable[..., Any]


def watch_loops(
    runner: Any,
    passes: Sequence[str],
    evaluating: Callable[[str], ContextManager[None]],
) -> None:
    """Let each evaluation loop, there or to come, run once a set of weights.

    Args:
        runner: The runner; each of its loops is wrapped once.
        passes: Names of the sets; the last one has the plain names.
        evaluating: A context for a pass on the set of that name: it takes
            the set out again, which a loop that fails would not.
    """

    def watch(loop: Any) -> Any:
        run = loop.run
        if getattr(run, _MARK, False):
            return loop

        @functools.wraps(run)
        def run_passes(*args: Any, **kwargs: Any) -> Any:
            once = functools.partial(run, *args, **kwargs)
            evaluator = getattr(loop, 'evaluator', None)
            try:
                return _run_passes(runner, evaluator, passes, evaluating, once)
            except BaseException:
                # what a pass that broke off has left in the metrics
                for metric in getattr(evaluator, 'metrics', ()):
                    results: Any = getattr(metric, 'results', None)
                    if hasattr(results, 'clear'):
                        results.clear()
                raise

        setattr(run_passes, _MARK, True)
        loop.run = run_passes
        return loop

    for loop in (runner._val_loop, runner._test_loop):
        if isinstance(loop, BaseLoop):
            watch(loop)
    for name in ('build_val_loop', 'build_test_loop'):
        if name not in vars(runner):
            build = functools.partial(_build, watch, getattr(runner, name))
            setattr(runner, name, build)


def _build(watch: Call, build: Call, cfg: Any) -> Any:
    return watch(build(cfg))


def _run_passes(
    runner: Any,
    evaluator: Any,
    passes: Sequence[str],
    evaluating: Callable[[str], ContextManager[None]],
    run: Callable[[], Any],
) -> Any:
    """Run a loop once a set; the last pass adds the metrics of the others.

    Every pass but the last leaves nothing else. Metrics are ``<set>/<name>``
    there before any hook sees them.
    """
    found: List[Dict[str, Any]] = []
    for name in passes[:-1]:
        calling = _calling_hooks(runner, _keep_metrics(runner, name, found))
        leaving = leaving_no_trace(model_of(runner))
        with leaving, _own_files(evaluator, name), calling, evaluating(name):
            run()
    adding: ContextManager[None] = contextlib.nullcontext()
    if found:
        adding = _calling_hooks(runner, _add_metrics(runner, found))
    with adding, evaluating(passes[-1]):
        return run()


def check_monitored(runner: Any, passes: Sequence[str]) -> None:
    """Check that nothing waits for metrics of weights not evaluated."""
    if 'raw' in passes[:-1]:
        return
    owners = list(runner.hooks)
    schedulers = getattr(runner, 'param_schedulers', None)
    many = (
        schedulers.values() if isinstance(schedulers, dict) else [schedulers]
    )
    owners += [s for group in many if isinstance(group, list) for s in group]
    for owner, word in itertools.product(owners, ('save_best', 'monitor')):
        given = getattr(owner, word, None)
        for name in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(name, str) and name.startswith('raw/'):
                raise OptionError(
                    f'{type(owner).__name__}({word}={show(name)}) needs the '
                    f'metrics of the raw weights beside those of the '
                    f"averages; give EMAHook evaluate='both', or use "
                    f'{word}={show(name[len("raw/") :])}.'
                )


def _keep_metrics(runner: Any, name: str, found: List[Dict[str, Any]]) -> Call:
    """Return a ``call_hook`` for a pass whose metrics wait for the last one.

    A hook that logs, or chooses the best file, hears of them there, once. One
    that was told that the pass begins is told that it ends.
    """
    call_hook, reports = runner.call_hook, itertools.count()

    def call(stage: str, **kwargs: Any) -> None:
        if stage not in _ENDS:
            call_hook(stage, **kwargs)
            return
        metrics = kwargs.pop('metrics', None) or {}
        metrics = {f'{name}/{key}': value for key, value in metrics.items()}
        number = next(reports)
        found.extend({} for _ in range(number + 1 - len(found)))
        found[number].update(metrics)
        hooks, begins = runner._hooks, _ENDS[stage]
        runner._hooks = [
            h for h in hooks if begins in h.get_triggered_stages()
        ]
        try:
            call_hook(stage, metrics=metrics, **kwargs)
        finally:
            runner._hooks = hooks

    return call


def _add_metrics(runner: Any, found: List[Dict[str, Any]]) -> Call:
    """Return a ``call_hook`` that adds the metrics of the passes before.

    A loop may report several times in a pass, as one over several data sets
    does; each report gets its own.
    """
    call_hook, reports = runner.call_hook, iter(found)

    def call(stage: str, **kwargs: Any) -> None:
        if stage in _ENDS and isinstance(kwargs.get('metrics'), dict):
            kwargs['metrics'].update(next(reports, {}))
        call_hook(stage, **kwargs)

    return call


@contextlib.contextmanager
def _calling_hooks(runner: Any, call: Call) -> Iterator[None]:
    own: Optional[Call] = vars(runner).get('call_hook')
    runner.call_hook = call
    try:
        yield
    finally:
        del runner.call_hook
        if own is not None:
            runner.call_hook = own


@contextlib.contextmanager
def _own_files(evaluator: Any, name: str) -> Iterator[None]:
    """Let metrics write files with the set's name in theirs."""
    before = [
        (metric, option, vars(metric)[option])
        for metric in getattr(evaluator, 'metrics', ())
        for option in _OUTPUTS
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
