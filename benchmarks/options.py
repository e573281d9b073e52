"""The command line of the benchmark."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Callable, Sequence

import torch

from benchmarks.machine import cores
from benchmarks.plan import MODELS, PARTS, Wishes

ABOUT = 'Measure the average beside its peers, in one run.'
DEVICES = ('cpu', 'cuda')


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: Words; None for those of the process.

    Returns:
        With ``wishes`` and ``out``; words that are wrong end the process
        with status 2 and one line.
    """
    parser = _Parser(prog='python -m benchmarks', description=ABOUT)
    _add_what(parser)
    _add_how(parser)
    options = parser.parse_args(arguments)
    if options.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no GPU here')
    options.wishes = _wishes(options)
    return options


def _add_what(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--only',
        type=_choices('part', tuple(PARTS)),
        default=tuple(PARTS),
        metavar='PART,...',
        help=f'what to measure: {", ".join(PARTS)} (default: all)',
    )
    parser.add_argument(
        '--models',
        type=_choices('model', MODELS),
        default=MODELS,
        metavar='MODEL,...',
        help=f'whose tensors: {", ".join(MODELS)} (default: all)',
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--device',
        choices=DEVICES,
        help='default: cpu, and cuda too where torch has one',
    )
    parser.add_argument(
        '--threads',
        type=_numbers,
        default=tuple(n for n in (1, 2) if n <= cores()),
        metavar='N,...',
        help='threads of torch on the CPU (default: 1,2)',
    )
    parser.add_argument(
        '--quick',
        action='store_true',
        help='a few rounds only, to try the benchmark out',
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/bench'),
        metavar='FOLDER',
        help='where to write (default: work_dirs/bench)',
    )


def _wishes(options: argparse.Namespace) -> Wishes:
    found = DEVICES if torch.cuda.is_available() else DEVICES[:1]
    return Wishes(
        parts=options.only,
        models=options.models,
        devices=(options.device,) if options.device else found,
        threads=options.threads,
        quick=options.quick,
    )


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f'{self.prog}: {message} (--help lists all options)\n')


def _choices(
    kind: str, known: tuple[str, ...]
) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        words = text.split(',')
        for word in words:
            if word not in known:
                raise argparse.ArgumentTypeError(
                    f'no {kind} {word!r}; there are {", ".join(known)}'
                )
        return tuple(name for name in known if name in words)

    return read


def _numbers(text: str) -> tuple[int, ...]:
    words = text.split(',')
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no list of numbers from 1 on, such as 1,2'
        )
    return tuple(sorted({int(word) for word in words}))
