"""Evaluations of mmcv: which weights they see, under which names.

``evaluate='both'`` evaluates twice, first the raw weights: mmcv's hooks read
the data and call the model themselves, and cannot share a pass.
"""

from __future__ import annotations

import contextlib
import random
from typing import Any, Callable, Dict, Iterator

import numpy as np
import torch
import torch.distributed as dist
from mmcv.runner import DistEvalHook

from mmdet_ema.core.errors import OptionError
from mmdet_ema.hooks.for_mmcv1.runner_facts import broadcast_statistics

PREFIX = 'raw/'
Evaluate = Callable[[Any], Any]


def check_best(hook: Any, both: bool) -> None:
    """Check the metric that an evaluation hook chooses the best file by.

    Args:
        hook: mmcv's evaluation hook; the word ``raw/`` is taken out of the
            name of its file.
        both: Whether raw weights and averages are evaluated.

    Raises:
        OptionError: If it is one of the raw weights, which are not evaluated.
    """
    if not _wants_raw(hook):
        return
    if not both:
        raise OptionError(
            f'save_best={hook.save_best!r} needs the metrics of the raw '
            f"weights; give the EMA hook evaluate='both', or use "
            f'save_best={hook.save_best[len(PREFIX) :]!r}.'
        )
    hook.key_indicator = hook.save_best.replace('/', '_')


def evaluate_with(ema: Any, hook: Any, evaluate: Evaluate, runner: Any) -> Any:
    """Run an evaluation hook's ``_do_evaluate`` on the averages.

    Args:
        ema: Our hook.
        hook: The evaluation hook.
        evaluate: Its own ``_do_evaluate``.
        runner: The runner.
    """
    if not hook._should_evaluate(runner):
        return evaluate(runner)
    if isinstance(hook, DistEvalHook):
        ema.make_equal(runner, hook.by_epoch)
    if getattr(hook, 'broadcast_bn_buffer', False):
        broadcast_statistics(runner)
    raw: Dict[str, Any] = {}
    if ema.evaluates_both:
        ema.show_raw()
        raw = _raw_metrics(hook, evaluate, runner)
    with ema.evaluating(runner), _best_by(hook, raw):
        result = evaluate(runner)
    runner.log_buffer.output.update(raw)
    return result


def _raw_metrics(hook: Any, evaluate: Evaluate, runner: Any) -> Dict[str, Any]:
    """Evaluate what the model holds; nothing is logged or saved."""
    buffer, best = runner.log_buffer, hook.save_best
    before, ready = dict(buffer.output), buffer.ready
    buffer.output.clear()
    hook.save_best = None
    try:
        with _same_randomness():
            evaluate(runner)
        found = dict(buffer.output)
    finally:
        hook.save_best, buffer.ready = best, ready
        buffer.output.clear()
        buffer.output.update(before)
    if runner.world_size > 1:
        dist.barrier()  # the second pass writes into the same folder
    found.pop('eval_iter_num', None)
    return {f'{PREFIX}{name}': value for name, value in found.items()}


@contextlib.contextmanager
def _best_by(hook: Any, raw: Dict[str, Any]) -> Iterator[None]:
    """Let a metric of the raw weights choose the best file."""
    if not _wants_raw(hook):
        yield
        return
    evaluate, best = hook.evaluate, hook.save_best

    def evaluate_by_raw(runner: Any, results: Any) -> Any:
        hook.save_best = None
        try:
            evaluate(runner, results)
        finally:
            hook.save_best = best
        return _score(raw, best) if raw else None

    hook.evaluate = evaluate_by_raw
    try:
        yield
    finally:
        hook.evaluate = evaluate


def _score(raw: Dict[str, Any], name: str) -> Any:
    if name not in raw:
        raise OptionError(
            f'save_best={name!r} is not among the metrics of the raw '
            f'weights: {", ".join(raw)}.'
        )
    return raw[name]


@contextlib.contextmanager
def _same_randomness() -> Iterator[None]:
    """Leave the random number generators as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _wants_raw(hook: Any) -> bool:
    best = getattr(hook, 'save_best', None)
    return isinstance(best, str) and best.startswith(PREFIX)
