"""Draw what a demo run measured."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Results


def draw(results: Results, path: Path) -> None:
    """Draw both curves and the decay ramp into a PNG file.

    Args:
        results: What was measured.
        path: Where to.
    """
    figure = Figure(figsize=(9, 3.4), layout='tight')
    left, right = figure.subplots(1, 2)
    _curves(left, results)
    _ramp(right, results)
    temporary = path.with_name(f'{path.stem}.tmp{path.suffix}')
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)


def _curves(axes: Axes, results: Results) -> None:
    epochs = [point.epoch for point in results.validations]
    ema = [point.ema for point in results.validations]
    raw = [point.raw for point in results.validations]
    axes.plot(epochs, ema, 'o-', label='EMA weights')
    axes.plot(epochs, raw, 's--', label='raw weights')
    axes.set(xlabel='epoch', ylabel='bbox mAP', ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()


def _ramp(axes: Axes, results: Results) -> None:
    steps = [step for step, _ in results.decay]
    axes.plot(steps, [decay for _, decay in results.decay], color='tab:green')
    axes.set(xlabel='optimizer step', ylabel='decay d(n)', ylim=(0, 1.02))
    axes.grid(alpha=0.3)
