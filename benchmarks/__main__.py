"""Measure the average beside its peers; print tables.

Usage: python -m benchmarks [--only step,update,several,swap] [--write FILE]

The exit status is 1 if a figure could not be measured, 2 if a word is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Sequence

import torch
from torch import nn

from benchmarks import models, peers, step
from benchmarks.rounds import (
    NOT_INSTALLED,
    Call,
    Figure,
    Sample,
    cold_timer,
    compare,
)
from benchmarks.tables import (
    Results,
    models_table,
    several_table,
    step_table,
)

PARTS = {
    'step': 'The share of a training step',
    'update': 'One update',
    'several': 'One update of several averages',
    'swap': 'Averages into the model and out again',
}
TABLES = {'step': step_table, 'several': several_table}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the benchmark; return the exit status."""
    options = _parse(argv)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    blocks = [
        '# Tables of a run of the benchmarks',
        'What is measured, and how, is in [Benchmarks](benchmarks.md).',
        _describe(options.rounds),
    ]
    print('\n\n'.join(blocks))
    failures = []
    for part in options.only:
        # threads of the CPU make no odds to a GPU
        for threads in options.threads[: 1 if device == 'cuda' else None]:
            torch.set_num_threads(threads)
            results = _measure(part, device, options)
            threaded = f'CPU, {threads} thread{"s" * (threads > 1)}'
            title = f'{PARTS[part]}, {threaded if device == "cpu" else "GPU"}'
            text = TABLES.get(part, models_table)(results)
            blocks += [f'## {title}', text]
            print(f'\n## {title}\n\n{text}', flush=True)
            failures += [
                f'{title}: {model}: {name}: {figure.failed}'
                for model, figures in results.items()
                for name, figure in figures.items()
                if figure.failed and NOT_INSTALLED not in figure.failed
            ]
    if options.write:
        options.write.write_text('\n\n'.join(blocks) + '\n')
    for line in failures:
        print(f'benchmark: not measured: {line}', file=sys.stderr)
    return 1 if failures else 0


def _measure(part: str, device: str, options: argparse.Namespace) -> Results:
    if part != 'step':
        timer = cold_timer(device)
        return {
            name: _calls(part, models.build(name, device), timer, options)
            for name in options.models
            # seven averages of Swin-L and their floors are too large
            if part != 'several' or name != 'swin-l'
        }
    if device == 'cuda':
        figures = compare(step.LOOPS, step.in_plain_loop, options.rounds)
        return {'RetinaNet-R50 in a plain loop': figures}
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(
            step.HOOKS,
            lambda name: step.through_runner(name, Path(folder)),
            options.rounds,
        )
    return {"RTMDet-tiny in mmengine's Runner": figures}


def _calls(
    part: str,
    model: nn.Module,
    timer: Callable[[Call], Sample],
    options: argparse.Namespace,
) -> Dict[str, Figure]:
    """Compare updates or swaps of a model."""
    what = 'swap' if part == 'swap' else 'update'
    return compare(
        peers.COMPARED[part],
        lambda name: timer(getattr(peers.make(name, model), what)),
        options.rounds,
    )


def _describe(rounds: int) -> str:
    """Return what is measured on, and when, in one line."""
    processor = platform.processor() or platform.machine()
    table = Path('/proc/cpuinfo')
    if table.is_file():
        line = table.read_text().partition('model name')[2].partition('\n')[0]
        processor = line.strip('\t :') or processor
    gpu = torch.cuda.is_available() and torch.cuda.get_device_name()
    facts: Dict[str, object] = {
        'date': datetime.date.today(),
        'rounds': rounds,
        'processor': processor,
        'cores': os.cpu_count(),
        'gpu': gpu or 'none',
        'python': platform.python_version(),
    }
    for package in ('torch', 'mmengine', 'mmdet', 'ema-pytorch', 'timm'):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = NOT_INSTALLED
    return '; '.join(f'{key}: {value}' for key, value in facts.items()) + '.'


def _parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks',
        description='Measure the average beside its peers, on the GPU if '
        'torch sees one, else on the CPU.',
    )
    parser.add_argument(
        '--only',
        type=_some_of(PARTS),
        default=list(PARTS),
        metavar='PART,...',
        help=f'what to measure: {", ".join(PARTS)} (default: all)',
    )
    parser.add_argument(
        '--models',
        type=_some_of(models.SHAPES),
        default=list(models.SHAPES),
        metavar='MODEL,...',
        help=f'whose tensors: {", ".join(models.SHAPES)} (default: all)',
    )
    parser.add_argument(
        '--threads',
        type=_counts,
        default='1,2',
        metavar='N,...',
        help='threads of torch on the CPU (default: 1,2)',
    )
    parser.add_argument(
        '--rounds',
        type=int,
        default=40,
        help='how often each is measured, at least 2 (default: 40)',
    )
    parser.add_argument(
        '--write', type=Path, help='a file to write the tables to as well'
    )
    options = parser.parse_args(argv)
    if options.rounds < 2:
        parser.error(f'--rounds {options.rounds}: there are no quartiles')
    return options


def _some_of(known: Iterable[str]) -> Callable[[str], List[str]]:
    def read(text: str) -> List[str]:
        words = text.split(',')
        if unknown := set(words).difference(known):
            raise argparse.ArgumentTypeError(
                f'no {", ".join(unknown)}; there are {", ".join(known)}'
            )
        return [word for word in known if word in words]

    return read


def _counts(text: str) -> List[int]:
    counts = [int(word) for word in text.split(',')]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f'{text} is not 1 or more')
    return counts


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit('benchmark: stopped')
