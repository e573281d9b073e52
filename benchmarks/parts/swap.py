"""Averages into the model and out again, as around a validation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Dict

from torch import nn

from benchmarks import peers
from benchmarks.caches import prepare_for
from benchmarks.clocks import Call
from benchmarks.competitors import in_order, make_all, time_calls
from benchmarks.figures import Case, Figure
from benchmarks.loading import load
from benchmarks.modules import build_module, change
from benchmarks.rounds import Limits
from benchmarks.shapes import records_of


def measure(case: Case, limits: Limits) -> Dict[str, Figure]:
    """Measure a case: seconds for in and out together."""
    model = build_module(records_of(case.model), case.device)
    calls, failed = make_all(case.competitors, lambda n: make(n, model))
    change(model)
    prepare = prepare_for(case.setting, case.device)
    figures = time_calls(case, calls, prepare, limits.shorter(0.3, 5))
    return in_order(case, figures, failed)


def make(name: str, model: nn.Module) -> Call:
    """Return what swaps an average of a model in and out.

    Args:
        name: 'ours', 'mmengine', 'mmengine-buffers', or 'floor' for one copy
            of a flat tensor each way.
        model: The model.
    """
    if name == 'floor':
        return _copies(peers.make('floor', model).average)
    if name == 'ours':
        return swap_of(peers.make('ours', model).average)
    return swap_of_hook(
        framework_hook(model, update_buffers=name.endswith('buffers'))
    )


def swap_of_hook(hook: Any) -> Call:
    """Return what swaps the averages of mmengine's hook."""

    def both_ways() -> None:
        hook._swap_ema_parameters()
        hook._swap_ema_parameters()

    return both_ways


def swap_of(averager: Any) -> Call:
    """Return what swaps the averages of a ``WeightAverager``."""

    def both_ways() -> None:
        averager.apply()
        averager.restore()

    return both_ways


def framework_hook(model: nn.Module, **options: Any) -> Any:
    """Return mmengine's own hook, ready for a run of this model."""
    # its name in the registry is ours as soon as mmdet_ema is imported
    hook = load('mmengine.hooks.ema_hook').EMAHook(**options)
    hook.before_run(SimpleNamespace(model=model))
    for _ in range(3):
        hook.ema_model.update_parameters(model)
    return hook


def _copies(average: Any) -> Call:
    other = average.clone()

    def both_ways() -> None:
        other.copy_(average)
        average.copy_(other)

    return both_ways
