"""What a hook costs an iteration besides the update: Python, hooks, logs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Callable, Dict

import torch
from torch import nn

from benchmarks import peers
from benchmarks.clocks import Call, clock_of
from benchmarks.competitors import in_order, make_all
from benchmarks.figures import Case, Figure
from benchmarks.loading import load
from benchmarks.rounds import Limits, Sample, run_rounds

ITERATIONS = 10
"""Iterations a sample: one of them is logged, by mmengine's default."""


def measure(case: Case, limits: Limits) -> Dict[str, Figure]:
    """Measure a case: seconds an iteration, one in ten of them logged.

    'update' is a bare update of the same model, without a runner.
    """
    with tempfile.TemporaryDirectory() as folder:
        calls, failed = make_all(
            case.competitors, lambda n: _make(n, case.device, Path(folder))
        )
        samplers = {name: _ten(call, case) for name, call in calls.items()}
        figures = run_rounds(samplers, limits)
    return in_order(case, figures, failed)


def _make(name: str, device: str, folder: Path) -> Call:
    model = _model()
    if name == 'update':
        return peers.make('ours', model.to(device)).update
    runners = load('benchmarks.runners')
    batch = dict(inputs=torch.ones(2, 4, device=device))
    step: Call = runners.stepper(
        runners.begin(name, model, batch, folder / name), batch
    )
    return step


def _ten(call: Call, case: Case) -> Sample:
    clock = clock_of(case.device)

    def ten() -> None:
        for _ in range(ITERATIONS):
            call()

    def sample() -> Dict[str, float]:
        seconds = clock.measure(ten)
        return {m: value / ITERATIONS for m, value in seconds.items()}

    return sample


def _model() -> Any:
    base: Callable[..., nn.Module] = load('mmengine.model').BaseModel

    class Linear(base):  # type: ignore[misc, valid-type]
        """One linear layer."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, inputs: Any, mode: str = 'tensor') -> Any:
            return dict(loss=self.layer(inputs).square().mean())

    return Linear()
