"""``mmdet-ema tune``: the best window of a run, by the config's evaluator."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from mmdet_ema.checkpoint import recipe, saving
from mmdet_ema.checkpoint.average import Run, read_files
from mmdet_ema.checkpoint.windows import files_of, spread
from mmdet_ema.cli import plot
from mmdet_ema.errors import OptionError
from mmdet_ema.frameworks import has_mmcv1


def tune(options: argparse.Namespace) -> int:
    """Evaluate windows, print a table, draw it, write the best weights."""
    if has_mmcv1():
        raise OptionError(
            'tune evaluates with mmengine (mmdet 3), and mmcv 1.x goes first '
            'here; make windows with mmdet-ema average, and test each by '
            "mmdet 2's tools/test.py."
        )
    from mmdet_ema.for_mmengine import tune as evaluation

    picture = options.plot or Path(options.work_dir, 'tune.png')
    if options.out:
        saving.check_free(options.out, options.force)
    run = Run(read_files(files_of(options.work_dir)))
    wanted = _windows(options.windows, run.steps)
    is_main = os.environ.get('RANK', '0') == '0'

    def tell(line: str) -> None:
        if is_main:
            print(f'mmdet-ema: {line}', file=sys.stderr, flush=True)

    tell(f'{len(run.files)} files, the last one after {run.steps} steps')
    for note in run.notes:
        tell(note)
    changes = _changes(options.cfg_options)
    with evaluation.runner_of(
        options.config, options.launcher, changes
    ) as runner:
        found = evaluation.tune(
            runner,
            run,
            wanted,
            metric=options.metric,
            recalibrate=options.recalibrate,
            tell=tell,
        )
    if not is_main:
        return 0
    print(table(found))
    _draw(found, picture)
    print(f'picture: {picture}')
    if options.out:
        print(f'weights: {_write(found, options)}')
    return 0


def _windows(given: str, steps: int) -> List[float]:
    """Read a number of windows (at most 100), or a list of lengths."""
    try:
        numbers = [float(x) for x in given.split(',')]
    except ValueError:
        numbers = []
    if len(numbers) == 1 and numbers[0] in range(1, 101):
        return [*map(float, spread(int(numbers[0]), steps))]
    if len(numbers) > 1:
        return sorted({*numbers})
    raise OptionError(
        f'--windows {given} is not allowed; use how many (1 to 100), or '
        f'several lengths in steps, as 100,200,500.'
    )


def _changes(words: Optional[Sequence[str]]) -> Dict[str, Any]:
    from mmengine.config import DictAction

    pairs = [word.partition('=') for word in words or ()]
    for word, (key, sign, _) in zip(words or (), pairs):
        if not key or not sign:
            raise OptionError(f'--cfg-options {word} is no KEY=VALUE.')
    return {key: DictAction._parse_iterable(text) for key, _, text in pairs}


def table(found: Any) -> str:
    """Return the table of what was evaluated, and what could not be.

    Args:
        found: What :func:`mmdet_ema.for_mmengine.tune.tune` returned.
    """
    both = any(row.recalibrated for row in found.rows)
    head = ['weights', 'window', 'error', 'sum of |c|', found.metric]
    head += ['recalibrated'] if both else []
    lines = [head]
    for row in found.rows:
        line = [row.name, '-', '-', '-', f'{row.metrics[found.metric]:.4f}']
        if row.window is not None:
            line[1] = f'{row.window:.4g}'
        if row.made is not None:
            fit = row.made.combination.fit
            line[2:4] = [f'{fit.error:.1%}', f'{fit.absolute_sum:.2f}']
        elif row.name == found.run.files[-1].deployed:
            line[0] = f'{row.name} (deployed)'
        if both:
            line.append(f'{row.recalibrated[found.metric]:.4f}')
        line[0] = f'* {line[0]}' if row is found.best else f'  {line[0]}'
        lines.append(line)
    sizes = [max(map(len, column)) for column in zip(*lines)]
    text = [
        '  '.join(
            [line[0].ljust(sizes[0])]
            + [cell.rjust(size) for cell, size in zip(line[1:], sizes[1:])]
        ).rstrip()
        for line in lines
    ]
    again = ', recalibrated' if found.is_recalibrated else ''
    text.append(f'* the best one{again}; chosen on this data, so flattered')
    text += [
        f'refused: window {x.steps:g}: {x.problem}' for x in found.refused
    ]
    text += [f'next time: {x}' for x in found.next_time]
    return '\n'.join(text)


def _draw(found: Any, path: Path) -> None:
    """Draw the metric against the window, raw and averages beside."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError(
            'a picture needs matplotlib, which is not installed: '
            'pip install matplotlib'
        ) from None
    figure = Figure(figsize=(7, 3.6), layout='constrained')
    axes = figure.subplots()
    windows = [row for row in found.rows if row.made is not None]
    sets = {'metrics': 'windows', 'recalibrated': 'recalibrated'}
    for part, label in sets.items():
        values = [getattr(row, part).get(found.metric) for row in windows]
        if windows and None not in values:
            lengths = [row.window for row in windows]
            axes.plot(lengths, values, 'o-', label=label, markersize=4)
    colors = iter(('orange', 'green', 'red', 'purple', 'brown', 'gray'))
    for row in found.rows:
        if row.made is None:
            color = f'tab:{next(colors, "gray")}'
            value = row.metrics[found.metric]
            axes.axhline(value, ls='--', color=color, label=row.name)
            if row.window is not None:
                axes.plot([row.window], [value], 's', color=color)
    best = found.best.recalibrated if found.is_recalibrated else None
    if found.best.window is not None:
        value = (best or found.best.metrics)[found.metric]
        axes.plot([found.best.window], [value], 'k*', ms=12, label='best')
    axes.set_xscale('log')
    axes.set(xlabel='window in steps', ylabel=found.metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    plot.write(figure, path)


def _write(found: Any, options: argparse.Namespace) -> str:
    """Write the best weights as a file that deploys."""
    last = found.run.files[-1]
    meta, _ = saving.plain(last.meta)
    content: Dict[str, Any] = {'meta': meta, 'state_dict': found.weights}
    best = found.best
    made: Dict[str, Any] = {'weights': best.name}
    inputs = [last.path]
    if best.made is not None:
        combination = best.made.combination
        made = {
            'profile': str(best.made.schedule),
            'error': combination.fit.error,
            'terms': [
                {
                    'path': term.contents.path,
                    'weights': term.name,
                    'coefficient': term.coefficient,
                    'statistics': term.statistics,
                }
                for term in combination.terms
            ],
        }
        inputs = [*dict.fromkeys(x['path'] for x in made['terms'])]
    if found.is_recalibrated:
        made['recalibrate'] = options.recalibrate
        made['config'] = options.config
    chosen = best.recalibrated if found.is_recalibrated else best.metrics
    made['metric'] = {found.metric: chosen[found.metric]}
    recipe.add(content, recipe.make('tune', inputs, made))
    return saving.save(content, options.out, force=options.force)
