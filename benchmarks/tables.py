"""Figures as Markdown tables that can be read in a terminal too."""

from __future__ import annotations

from typing import Dict, List, Mapping, Sequence

from benchmarks.rounds import Figure, Spread, ratios, spread

Results = Mapping[str, Mapping[str, Figure]]
"""Figures by model and competitor; the others are compared with the first."""


def step_table(results: Results) -> str:
    """Return the table of a training step of one model.

    Args:
        results: Seconds a step, and of these in the average; the first are of
            a step without an average.
    """
    ((model, figures),) = results.items()
    bare = next(iter(figures.values()))
    rows = []
    for name, figure in figures.items():
        if figure.failed:
            rows.append([name, figure.failed, '', '', ''])
            continue
        step, inside = figure.column(0), figure.column(1)
        cells = [_spread(spread(step), 1000), '', '', '']
        if figure is not bare:
            cells[2] = _spread(spread(inside), 1000)
            cells[3] = _spread(ratios(inside, step), 100, ' %')
            if not bare.failed:
                longer = ratios(step, bare.column(0))
                cells[1] = _spread(longer, unit='x')
        rows.append([name, *cells])
    head = ['ms a step', 'to one without', 'ms in the average', 'share']
    return table([model, *head], rows)


def models_table(results: Results) -> str:
    """Return the table of a call, a column for each model."""
    rows: Dict[str, List[str]] = {}
    for figures in results.values():
        floor = next(iter(figures.values()))
        for name, figure in figures.items():
            cell = figure.failed
            if not cell:
                cell = _number(1000 * spread(figure.column()).median)
                if figure is not floor and not floor.failed:
                    times = ratios(figure.column(), floor.column())
                    cell += ', ' + _spread(times, unit='x')
            rows.setdefault(name, [name]).append(cell)
    return table(['ms', *results], list(rows.values()))


def several_table(results: Results) -> str:
    """Return the table of an update of several averages.

    Args:
        results: By model, for each number of averages the floor of that work
            and the update, the first of one average.
    """
    rows = []
    for model, figures in results.items():
        pairs = list(figures.items())
        _, one = pairs[1]
        for (_, floor), (name, update) in zip(pairs[::2], pairs[1::2]):
            times = int(name.rpartition(' ')[2])
            failed = one.failed or floor.failed or update.failed
            if failed:
                rows.append([f'{model}, {times}', failed, '', '', ''])
                continue
            several = [times * seconds for seconds in one.column()]
            rows.append(
                [
                    f'{model}, {times}',
                    _number(1000 * spread(floor.column()).median),
                    _number(1000 * spread(update.column()).median),
                    _spread(ratios(update.column(), floor.column()), unit='x'),
                    _spread(ratios(update.column(), several), unit='x'),
                ]
            )
    head = ['floor, ms', 'update, ms', 'to the floor', 'to as many times one']
    return table(['averages', *head], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first to the right."""
    texts = [[cell.replace('|', '/') for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *texts)]
    rules = ['-' * widths[0], *('-' * (n - 1) + ':' for n in widths[1:])]
    lines = []
    for first, *others in [list(head), rules, *texts]:
        cells = [cell.rjust(n) for cell, n in zip(others, widths[1:])]
        lines.append(' | '.join([f'| {first.ljust(widths[0])}', *cells]))
    return ' |\n'.join(lines) + ' |'


def _spread(found: Spread, scale: float = 1, unit: str = '') -> str:
    median, lower, upper = (
        _number(scale * value)
        for value in (found.median, found.lower, found.upper)
    )
    return f'{median}{unit} ({lower} to {upper})'


def _number(value: float) -> str:
    """Return three significant digits, without an exponent."""
    text = f'{value:.3g}'
    return f'{value:.0f}' if 'e+' in text else f'{float(text):g}'
