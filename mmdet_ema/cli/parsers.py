"""What several commands share: options, and what they need."""

from __future__ import annotations

import argparse
from typing import Any, Dict

from mmdet_ema.errors import OptionError
from mmdet_ema.frameworks import has_mmcv1, has_mmengine

STYLE: Dict[str, Any] = dict(
    formatter_class=argparse.RawDescriptionHelpFormatter,
    # --resume-from of a tool is not an abbreviation of ours
    allow_abbrev=False,
)


def add_command(
    commands: Any, name: str, does: str, epilog: str = '', **more: Any
) -> argparse.ArgumentParser:
    """Return the new parser of a command that does what is said."""
    said = f'{does[0].upper()}{does[1:]}.'
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=does, description=said, epilog=epilog, **STYLE, **more
    )
    return parser


def add_output(parser: argparse.ArgumentParser, **more: Any) -> None:
    """Add the options of every command that writes a file of weights."""
    parser.add_argument('-o', '--out', metavar='OUT', **more)
    parser.add_argument(
        '--force', action='store_true', help='replace a file of that name'
    )


def add_unsafe(parser: argparse.ArgumentParser) -> None:
    """Add the option that lets a file run code."""
    parser.add_argument(
        '--unsafe',
        action='store_true',
        help='run the code that a file asks for, for files that you trust: '
        'whoever wrote it can then do on this machine what you can',
    )


def add_metric(parser: argparse.ArgumentParser) -> None:
    """Add the metric that chooses weights."""
    parser.add_argument(
        '--metric',
        metavar='NAME',
        help='which metric; by default that of save_best, or the first one',
    )


def check_mmengine(what: str) -> None:
    """Refuse what builds a config by mmengine where that is not used.

    Raises:
        OptionError: If it is not installed, or mmcv 1.x is.
    """
    if has_mmcv1() or not has_mmengine():
        raise OptionError(
            f'{what} builds the model and data of a config by mmengine, which '
            f'is not what is installed here; under mmcv 1.x make averages by '
            f'mmdet-ema average, test each by tools/test.py, and estimate '
            f'statistics by the option recalibrate=N of EMAHook.'
        )
