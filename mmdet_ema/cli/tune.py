"""``mmdet-ema tune``: parser, table, picture and file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

from mmdet_ema.cli import plot
from mmdet_ema.cli.reports import aligned
from mmdet_ema.cli.shared import (
    add_command,
    add_metric,
    add_output,
    check_mmengine,
    is_first,
)
from mmdet_ema.errors import CheckpointError, OptionError
from mmdet_ema.frameworks import has_package

_HELP = """\
Windows are made of the
files of one run (its averages, raw and starting weights), and each is tested
by the validation of CONFIG, in one process. EMAHook(posthoc=True) and a few
files are what it takes. Raw weights and the averages of the last file stand
beside, and the best of all can be written as a file that deploys.

examples:
  mmdet-ema tune CONFIG work_dirs/a -o best.pth
  mmdet-ema tune CONFIG work_dirs/a --windows 500,1000,2000,4000
  mmdet-ema tune CONFIG work_dirs/a --metric coco/bbox_mAP_50
  mmdet-ema tune CONFIG work_dirs/a -o best.pth --recalibrate 50
  torchrun --nproc_per_node 2 -m mmdet_ema tune CONFIG work_dirs/a \\
      --launcher pytorch"""


def add_parser(commands: Any) -> None:
    """Add the parser of the command."""
    does = 'choose the window of the average after the training'
    parser = add_command(commands, 'tune', run, does, _HELP)
    parser.add_argument('config', metavar='CONFIG', help='that of the run')
    parser.add_argument('work_dir', metavar='WORK_DIR', help='that of the run')
    add_output(parser, help='file to write the best weights to')
    parser.add_argument(
        '--windows',
        metavar='N',
        default='12',
        help='how many, between 0.1 %% of the run and half of it; or a list '
        'of lengths in steps; by default %(default)s',
    )
    add_metric(parser)
    parser.add_argument(
        '--recalibrate',
        metavar='N',
        type=int,
        default=0,
        help='test each again with BatchNorm statistics of so many batches '
        'of training data',
    )
    parser.add_argument(
        '--plot',
        metavar='FILE',
        type=plot.picture,
        help='picture to write; by default tune.png in WORK_DIR',
    )
    parser.add_argument(
        '--cfg-options',
        metavar='KEY=VALUE',
        nargs='+',
        help='changes to the config',
    )
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='as of tools/test.py',
    )


def run(options: argparse.Namespace) -> int:
    """Test windows, print a table, draw it, write the best weights."""
    check_mmengine('tune')
    if options.recalibrate < 0:
        raise OptionError(
            f'--recalibrate {options.recalibrate} is out of range; use a '
            f'number of batches.'
        )
    from mmdet_ema.checkpoint import saving
    from mmdet_ema.checkpoint.combination import read_files
    from mmdet_ema.checkpoint.runs import Run, steps_of, with_averages
    from mmdet_ema.checkpoint.windows import (
        check_length,
        files_of,
        since_restart,
        spread,
    )
    from mmdet_ema.for_mmengine import tune as evaluation

    picture = options.plot or Path(options.work_dir, 'tune.png')
    can_draw = has_package('matplotlib')
    # what nobody should wait for is refused before
    if options.plot:
        plot.new_figure(1, 1)
    if options.out == saving.STDOUT:
        raise OptionError('the standard output has the table; name a file.')
    if options.out:
        saving.check_free(options.out, options.force)
    lengths = _windows(options.windows)
    paths = files_of(options.work_dir)
    problem = plot.why_not(picture) if can_draw else ''
    if problem:
        raise OptionError(f'{problem}; use --plot.')
    notes: List[str] = []
    tracked = with_averages(read_files(paths), notes)
    if not any(map(steps_of, tracked)):
        raise CheckpointError(
            f'no file in {options.work_dir!r} has averages that tell their '
            f'steps: windows are made of those of EMAHook(posthoc=True). The '
            f'mean of the last files is mmdet-ema average --profile lawa:K.'
        )
    tracked = since_restart(tracked, notes)
    files = Run(tracked)
    if isinstance(lengths, int):
        lengths = spread(lengths, files.steps)
    for length in lengths:
        check_length(length, files.steps)

    def tell(line: str) -> None:
        if is_first():
            print(f'mmdet-ema: {line}', file=sys.stderr, flush=True)

    tell(f'{len(files.files)} files, the last one after {files.steps} steps')
    files.look()  # which notes what is not used
    for note in [*notes, *files.notes]:
        tell(note)
    changes = _changes(options.cfg_options)
    with evaluation.runner_of(
        options.config, options.launcher, changes
    ) as runner:
        found = evaluation.tune(
            runner,
            files,
            lengths,
            metric=options.metric,
            recalibrate=options.recalibrate,
            tell=tell,
        )
    if not is_first():
        return 0
    print(table(found))
    if options.out:
        print(f'weights: {_write(found, options)}')
    if can_draw:
        _draw(found, picture)
        print(f'picture: {picture}')
    return 0


def _windows(given: str) -> Union[int, Sequence[float]]:
    """Read how many windows, or a list of their lengths."""
    try:
        numbers = [float(x) for x in given.split(',')]
    except ValueError:
        numbers = []
    if len(numbers) == 1 and numbers[0] in range(1, 101):
        return int(numbers[0])
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
    """Return the table of what was evaluated, and what could not be."""
    both = any(row.recalibrated for row in found.rows)
    head = ['weights', 'window', 'error', 'sum of |c|', found.metric]
    head += ['recalibrated'] if both else []
    lines = [head]
    for row in found.rows:
        line = [row.name, '-', '-', '-', f'{row.value(found.metric):.4f}']
        if row.length is not None:
            line[1] = f'{row.length:.4g}'
        if row.schedule is not None:
            fit = row.combination.fit
            line[2:4] = [f'{fit.error:.1%}', f'{fit.absolute_sum:.2f}']
        elif row.name == found.run.files[-1].deployed:
            line[0] = f'{row.name} (deployed)'
        if both:
            line.append(f'{row.value(found.metric, True):.4f}')
        line[0] = f'* {line[0]}' if row is found.best else f'  {line[0]}'
        lines.append(line)
    text = aligned(lines, [False, *[True] * len(head)])
    again = ', recalibrated' if found.is_recalibrated else ''
    text.append(f'* the best one{again}; chosen on this data, so flattered')
    text += [
        f'refused: window {x.steps:g}: {x.problem}' for x in found.refused
    ]
    text += [f'next time: {x}' for x in found.next_time]
    return '\n'.join(text)


def _draw(found: Any, path: Path) -> None:
    """Draw the metric against the window, raw and averages beside."""
    figure = plot.new_figure(7, 3.6)
    axes = figure.subplots()
    windows = [row for row in found.rows if row.schedule is not None]
    lengths = [row.length for row in windows]
    for again in {False, bool(found.rows[0].recalibrated)}:
        axes.plot(
            lengths,
            [row.value(found.metric, again) for row in windows],
            's-' if again else 'o-',
            label='windows, recalibrated' if again else 'windows',
            color='tab:cyan' if again else 'tab:blue',
            markersize=4,
        )
    colors = iter(('orange', 'green', 'red', 'purple', 'brown', 'gray'))
    for row in found.rows:
        if row.schedule is None:
            color = f'tab:{next(colors, "gray")}'
            value = row.value(found.metric)
            axes.axhline(value, ls='--', color=color, label=row.name)
            if row.length is not None:
                axes.plot([row.length], [value], 's', color=color)
    if found.best.length is not None:
        value = found.best.value(found.metric, found.is_recalibrated)
        axes.plot([found.best.length], [value], 'k*', ms=12, label='best')
    axes.set_xscale('log')
    axes.set(xlabel='window in steps', ylabel=found.metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    plot.write(figure, path)


def _write(found: Any, options: argparse.Namespace) -> str:
    """Write the best weights as a file that deploys.

    Its recipe is one of ``mmdet-ema average``, which can repeat it.
    """
    best, again = found.best, found.is_recalibrated
    value = best.value(found.metric, again)
    said = {
        'profile': str(best.schedule or best.name),
        'coefficients': None,
        'recalibrate': options.config if again else None,
        'batches': options.recalibrate if again else None,
        # as text: torch 1.13 reads no float by weights_only=True
        'chosen_by': f'{found.metric} {value!r}',
        'cfg_options': options.cfg_options or [],
    }
    made = best.combination.recipe(said)
    if best.name == 'raw':
        made['holds'] = {'role': 'raw', 'name': 'raw'}
    out, force = options.out, options.force
    return str(best.combination.save(found.weights, made, out, force))
