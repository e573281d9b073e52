"""What the parsers of several commands share."""

from __future__ import annotations

import argparse
from typing import Any, Dict

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
