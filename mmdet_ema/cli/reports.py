"""What the toolbox prints: tables by ``rich``, or plain lines without it."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

from mmdet_ema.cli import plot as plots
from mmdet_ema.cli.shared import printable, say
from mmdet_ema.errors import OptionError

_FEW = 8
_LINES = 40


def aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> List[str]:
    """Return lines of cells, by column to the right or to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        [
            x.rjust(n) if r else x.ljust(n)
            for x, n, r in zip(row, widths, right)
        ]
        for row in rows
    ]
    return ['  '.join(line).rstrip() for line in lines]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns that hold numbers are aligned to the right."""
    numbers = [
        all(row[i][:1].isdigit() or not row[i] for row in rows)
        for i in range(len(head))
    ]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for line in aligned([head, *rows], numbers):
            say(line)
        return
    made = Table()
    for name, right in zip(head, numbers):
        made.add_column(name, justify='right' if right else 'left')
    for row in rows:
        made.add_row(*(printable(x).replace('[', r'\[') for x in row))
    # a terminal's width; whoever reads a pipe wants whole cells
    width = None if sys.stdout.isatty() else 10_000
    Console(width=width, highlight=False, soft_wrap=False).print(made)


def show_one(report: Dict[str, Any]) -> None:
    """Print the report on one file."""
    say(
        f'{report["path"]}: {report["format"]}, written by '
        f'{report["writer"]}, {_size(report["bytes"])}'
    )
    sets = report['sets']
    table(_HEAD[1:], [_row(report, name)[1:] for name in sets])
    said = {x['evidence'] for x in sets.values()}
    for name, x in sets.items():
        if x['role'] == 'unknown':
            say(
                f'{name}: cannot be known whether raw or averages '
                f'({x["evidence"]})'
            )
        elif len(said) > 1:
            say(f'{name}: {x["role"]}, because {x["evidence"]}')
    if len(said) == 1 and 'unknown' not in {x['role'] for x in sets.values()}:
        say(f'roles: {said.pop()}')
    if report['writer'] != 'unknown':
        say(f"the framework's own tools load: {report['deployed']}")
    for name, x in sets.items():
        if x['schedule']:
            say(f'{name}: schedule {x["schedule"]}')
        if x['interval'] != 1 or x['skipped']:
            say(
                f'{name}: {x["steps"]} steps, interval {x["interval"]}, '
                f'{x["skipped"]} skipped as not finite'
            )
    for name, x in sets.items():
        if 'distance' in x:
            modules = x['distance']['modules'].items()
            far = ', '.join(f'{k} {_number(v)}' for k, v in modules)
            say(f'{name}: distance from raw by module: {far}')
        if x.get('nonfinite'):
            say(f'{name}: NaN or infinite: {_few(x["nonfinite"])}')
    ties = {' = '.join(t) for x in sets.values() for t in x['tied']}
    if ties:
        say(f'tied: {_few(sorted(ties), "; ")}')
    if report['collisions']:
        groups = [' and '.join(x) for x in report['collisions']]
        say(f"one name to mmcv's EMA hook: {_few(groups, '; ')}")
    if report['rest']:
        say(f'also in it: {", ".join(report["rest"])}')
    if 'recipe' in report:
        made = report['recipe']
        inputs = ', '.join(str(x['path']) for x in made.get('inputs', ()))
        say(f'made by: mmdet-ema {made.get("command")} from {inputs}')
    for note in report['notes']:
        say(f'note: {note}')


def show_several(reports: List[Dict[str, Any]]) -> None:
    """Print a table with a row for each set of weights of each file."""
    rows = [_row(x, name) for x in reports for name in x['sets']]
    table(_HEAD, rows)
    for report in reports:
        for note in report['notes']:
            say(f'{report["path"]}: {note}')


def plot(reports: List[Dict[str, Any]], path: Path) -> None:
    """Draw the distance of averages from raw weights, by module."""
    series = {
        f'{x["path"]}: {name}': s['distance']['modules']
        for x in reports
        for name, s in x['sets'].items()
        if 'distance' in s
    }
    if not series:
        raise OptionError(
            '--plot draws distances of averages from raw weights: no file '
            'has both; leave it out, and --quick too.'
        )
    modules = list(dict.fromkeys(k for x in series.values() for k in x))
    figure = plots.new_figure(8, 1 + 0.3 * len(modules) * len(series))
    axes = figure.subplots()
    high = 0.8 / len(series)
    for i, (label, found) in enumerate(series.items()):
        places = [k + i * high for k in range(len(modules))]
        lengths = [found.get(k, 0.0) for k in modules]
        axes.barh(places, lengths, height=high, label=label)
    axes.set_yticks([k + 0.4 - high / 2 for k in range(len(modules))])
    axes.set_yticklabels(modules)
    axes.invert_yaxis()
    axes.set_xlabel('||average - raw|| / ||raw||')
    axes.legend(fontsize='small')
    plots.write(figure, path)


def show_difference(found: Any) -> None:
    """Print what differs between two files."""
    pairs = ', '.join(
        a if a == b else f'{a} of A with {b} of B' for a, b in found.pairs
    )
    rows = [
        [
            *(x.weights, x.name, x.kind, x.detail),
            *(
                '' if n is None else _number(n)
                for n in (x.largest, x.relative)
            ),
        ]
        for x in found.differences
    ]
    if rows:
        head = ('weights', 'tensor', 'differs in', 'A | B', 'max', 'relative')
        table(head, rows[:_LINES])
        if len(rows) > _LINES:
            say(f'... and {len(rows) - _LINES} more (--json has all)')
    say(
        f'{len(rows)} differences in {found.compared} tensors; compared: '
        f'{pairs}'
    )
    for words in found.unpaired:
        say(f'not compared: {words}')


_HEAD = (
    *('file', 'weights', 'role', 'n', 'decay', 'window', 'tensors'),
    *('parameters', 'dtypes', 'size', 'distance', 'not finite'),
)


def _row(report: Dict[str, Any], name: str) -> List[str]:
    x = report['sets'][name]
    decay, window = x['decay'], x['window']
    distance = x.get('distance', {}).get('total')
    bad = x.get('nonfinite')
    return [
        str(report['path']),
        name,
        x['role'],
        '' if x['updates'] is None else str(x['updates']),
        '' if decay is None else f'{decay:.6g}',
        '' if window is None else f'{window:.0f}',
        str(x['tensors']),
        f'{x["parameters"]:,}',
        ', '.join(f'{n} {k}' for k, n in x['dtypes'].items()),
        _size(x['bytes']),
        '' if distance is None else _number(distance),
        '' if bad is None else str(sum(bad.values())),
    ]


def _few(names: Any, between: str = ', ') -> str:
    names = list(names)
    more = f' and {len(names) - _FEW} more' if len(names) > _FEW else ''
    return between.join(names[:_FEW]) + more


def _number(value: float) -> str:
    return f'{value:.3g}' if math.isfinite(value) else 'not finite'


def _size(count: int) -> str:
    for unit in ('B', 'KB', 'MB'):
        if count < 1000:
            return f'{count:.3g} {unit}'
        count /= 1000  # type: ignore[assignment]
    return f'{count:.3g} GB'
