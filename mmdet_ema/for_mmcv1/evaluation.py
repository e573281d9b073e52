"""Evaluations of mmcv: which weights they see, under which names.

``evaluate='both'`` evaluates twice, first the raw weights: mmcv's hooks read
the data and call the model themselves, and cannot share a pass.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict

import torch.distributed as dist
from mmcv.runner import DistEvalHook

from mmdet_ema.errors import OptionError, show
from mmdet_ema.for_mmcv1.runner import broadcast_statistics
from mmdet_ema.training.no_trace import same_randomness

PREFIX = 'raw/'
Evaluate = Callable[..., Any]


def check_best(hook: Any, both: bool) -> None:
    """Check the metric that an evaluation hook chooses the best file by.

    A metric of the raw weights needs them evaluated; the ``/`` in its name is
    taken out of the name of the file.
    """
    if not _wants_raw(hook):
        return
    if not both:
        raise OptionError(
            f'save_best={show(hook.save_best)} needs the metrics of the raw '
            f"weights; give the EMA hook evaluate='both', or use "
            f'save_best={show(hook.save_best[len(PREFIX) :])}.'
        )
    hook.key_indicator = hook.save_best.replace('/', '_')


def evaluate_with(
    ema: Any, hook: Any, evaluate: Evaluate, runner: Any, *args: Any, **kw: Any
) -> Any:
    """Run the ``_do_evaluate`` of an evaluation hook on the averages."""
    if isinstance(hook, DistEvalHook):
        ema.make_equal(runner, hook.by_epoch)
    again = functools.partial(evaluate, runner, *args, **kw)
    if getattr(hook, 'broadcast_bn_buffer', False):
        with ema.raw(runner):
            broadcast_statistics(runner)
    if ema.evaluates_both:
        with ema.raw(runner):
            ema.raw_metrics = _raw_metrics(hook, again, runner)
    try:
        with ema.evaluating(runner):
            result = again()
        runner.log_buffer.output.update(ema.raw_metrics)
    finally:
        ema.raw_metrics = {}
    return result


def evaluate_by_raw(
    ema: Any, hook: Any, evaluate: Evaluate, *args: Any, **kwargs: Any
) -> Any:
    """Run the ``evaluate`` of an evaluation hook; a raw metric may choose.

    Returns:
        The metric of the raw weights where ``save_best`` names one; None
        where they were not evaluated, so that there is no best file.
    """
    if not _wants_raw(hook):
        return evaluate(*args, **kwargs)
    best, hook.save_best = hook.save_best, None
    try:
        evaluate(*args, **kwargs)
    finally:
        hook.save_best = best
    raw = ema.raw_metrics
    if raw and best not in raw:
        raise OptionError(
            f'save_best={show(best)} is not among the metrics of the raw '
            f'weights: {", ".join(raw)}.'
        )
    return raw.get(best)


def _raw_metrics(hook: Any, evaluate: Evaluate, runner: Any) -> Dict[str, Any]:
    """Evaluate what the model holds; nothing is logged or saved."""
    buffer, best = runner.log_buffer, hook.save_best
    before, ready = dict(buffer.output), buffer.ready
    buffer.output.clear()
    hook.save_best = None
    try:
        with same_randomness():
            evaluate()
        found = dict(buffer.output)
    finally:
        hook.save_best, buffer.ready = best, ready
        buffer.output.clear()
        buffer.output.update(before)
    if runner.world_size > 1:
        dist.barrier()  # the second pass writes into the same folder
    found.pop('eval_iter_num', None)
    return {f'{PREFIX}{name}': value for name, value in found.items()}


def _wants_raw(hook: Any) -> bool:
    best = getattr(hook, 'save_best', None)
    return isinstance(best, str) and best.startswith(PREFIX)
