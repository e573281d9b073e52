"""The plot of a run: bars over the floor, and two curves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, List

from benchmarks.figures import Result, ratios, summary
from benchmarks.peers import LABELS


def draw(results: List[Result], path: Path) -> None:
    """Draw what was measured of updates into a PNG file.

    Args:
        results: The results; the first device and number of threads count.
        path: Where to.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 4.6), layout='tight')
    widths = {'width_ratios': (2, 1, 1)}
    left, middle, right = figure.subplots(1, 3, gridspec_kw=widths)
    _bars(left, _first(results, 'update'))
    _curves(middle, _first(results, 'tensors'), 'tensors, 16 MiB in all')
    _curves(right, _first(results, 'bytes'), 'bytes, 300 tensors')
    temporary = path.with_name(f'{path.stem}.tmp{path.suffix}')
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)


def _first(results: List[Result], part: str) -> List[Result]:
    """Return the results of a part on its first device and threads."""
    chosen = [r for r in results if r.case.part == part]
    if not chosen:
        return []
    first = chosen[0].case
    key = (first.device, first.threads, first.setting)
    return [
        r
        for r in chosen
        if (r.case.device, r.case.threads, r.case.setting) == key
    ]


def _bars(axes: Any, results: List[Result]) -> None:
    """Bars by model: times the floor."""
    names = [n for n in results[0].figures if n != 'floor'] if results else []
    width = 0.8 / max(1, len(names))
    for k, name in enumerate(names):
        heights = [_over_floor(result, name) for result in results]
        places = [i + k * width for i in range(len(results))]
        label, color = LABELS[name].replace('`', ''), f'C{k % 10}'
        hatch = '//' if k >= 10 else None
        axes.bar(places, heights, width, label=label, color=color, hatch=hatch)
    axes.axhline(1, color='black', linewidth=0.8)
    ticks = [i + 0.4 for i in range(len(results))]
    axes.set_xticks(ticks, [r.case.model for r in results], rotation=15)
    axes.set(ylabel='update, times the floor', yscale='log')
    if names:
        axes.set_title(_where(results))
        # room for the legend above the bars
        low, high = axes.get_ylim()
        axes.set_ylim(low, high**1.5)
        axes.legend(fontsize=6, ncols=2, loc='upper left')


def _over_floor(result: Result, name: str) -> float:
    figure, floor = result.figures[name], result.figures['floor']
    if figure.failed is not None or floor.failed is not None:
        return float('nan')
    return summary(ratios(figure, floor, 'wall')).median


def _curves(axes: Any, results: List[Result], label: str) -> None:
    """Milliseconds by competitor against the size in the model's name."""
    number = 0 if label.startswith('tensors') else 1
    for name in results[0].figures if results else []:
        points = [
            (int(r.case.model.split('x')[number]), r.figures[name].samples)
            for r in results
            if r.figures[name].failed is None
        ]
        xs = [x for x, _ in points]
        ys = [summary(samples['wall']).median * 1000 for _, samples in points]
        axes.plot(xs, ys, 'o-', label=LABELS[name].replace('`', ''))
    axes.set(xlabel=label, ylabel='update, ms', xscale='log', yscale='log')
    axes.grid(alpha=0.3)
    if results:
        axes.set_title(_where(results))
        axes.legend(fontsize=7)


def _where(results: List[Result]) -> str:
    case = results[0].case
    return f'{case.device}, threads: {case.threads}, {case.setting}'
