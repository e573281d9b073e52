"""A checkpoint with raw weights and averages, to memory or to a file."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict

import torch
from torch import nn

from benchmarks import peers
from benchmarks.clocks import Call, HostClock
from benchmarks.competitors import in_order, make_all
from benchmarks.figures import Case, Figure
from benchmarks.modules import build_module, change
from benchmarks.parts.swap import framework_hook
from benchmarks.rounds import Limits, run_rounds
from benchmarks.shapes import records_of

Place = Callable[[Any], object]


def measure(case: Case, limits: Limits) -> Dict[str, Figure]:
    """Measure a case; its setting is 'memory' or 'disk'.

    The time of a file is that until the system has taken it; the system
    writes it to the disk later.
    """
    model = build_module(records_of(case.model), case.device)
    with tempfile.TemporaryDirectory() as folder:
        to = to_memory if case.setting == 'memory' else _to_file_in(folder)
        calls, failed = make_all(
            case.competitors, lambda name: make(name, model, to)
        )
        change(model)
        samplers = {
            name: lambda call=call: HostClock().measure(call)
            for name, call in calls.items()
        }
        figures = run_rounds(samplers, limits.shorter(0.3, 3))
    return in_order(case, figures, failed)


def make(name: str, model: nn.Module, to: Place) -> Call:
    """Return what saves an average of a model with the raw weights.

    Args:
        name: 'ours', 'mmengine', 'mmengine-buffers', or 'floor' for two flat
            tensors.
        model: The model.
        to: Takes what is to be saved.
    """
    if name == 'floor':
        flat = peers.make('floor', model).average
        other = flat.clone()
        return lambda: to([flat, other])
    if name == 'ours':
        averager = peers.make('ours', model).average
        return save_of(averager, model, to)
    hook = framework_hook(model, update_buffers=name.endswith('buffers'))
    return save_of_hook(hook, model, to)


def save_of_hook(hook: Any, model: nn.Module, to: Place) -> Call:
    """Return what saves the averages of mmengine's hook with the model."""

    def save() -> None:
        checkpoint = dict(state_dict=model.state_dict())
        hook.before_save_checkpoint(SimpleNamespace(model=model), checkpoint)
        to(checkpoint)

    return save


def save_of(averager: Any, model: nn.Module, to: Place) -> Call:
    """Return what saves a ``WeightAverager`` with the raw weights."""
    return lambda: to(
        dict(model=model.state_dict(), ema=averager.state_dict())
    )


def to_memory(checkpoint: Any) -> None:
    """Save into memory."""
    torch.save(checkpoint, io.BytesIO())


def _to_file_in(folder: str) -> Place:
    path = Path(folder) / 'checkpoint.pth'
    return lambda checkpoint: torch.save(checkpoint, path)
