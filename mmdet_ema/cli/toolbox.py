"""The toolbox for files: parsers of its commands, and thin calls.

Nothing is imported here that makes ``--help`` wait.

exit status: 0 done; 1 refused, or the files differ; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, Callable, Dict

from mmdet_ema.errors import CheckpointError, OptionError

COMMANDS: Dict[str, Callable[[argparse.Namespace], int]] = {}
"""By name: runs the command, and returns the exit status."""

STYLE: Dict[str, Any] = dict(
    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)


def add_commands(commands: Any) -> None:
    """Add the parsers of the toolbox to the subparsers of ``mmdet-ema``."""


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that writes a file."""
    parser.add_argument(
        '-o',
        '--out',
        metavar='OUT',
        required=True,
        help="file to write; '-' for the standard output",
    )
    parser.add_argument(
        '--force', action='store_true', help='replace a file of that name'
    )
    parser.add_argument(
        '--recipe',
        metavar='FILE',
        help='repeat what made this file, or what a .yaml or .json says',
    )


def add_unsafe(parser: argparse.ArgumentParser) -> None:
    """Add the option that lets a file run code."""
    parser.add_argument(
        '--unsafe',
        action='store_true',
        help='run the code that a file asks for, for files that you trust: '
        'whoever wrote it can then do on this machine what you can',
    )


def run(options: argparse.Namespace) -> int:
    """Run a command of the toolbox; return the exit status."""
    try:
        return COMMANDS[options.command](options)
    except CheckpointError as error:
        print(f'mmdet-ema: error: {error}', file=sys.stderr)
    except OptionError as error:
        print(f'mmdet-ema: error: {error}', file=sys.stderr)
        return 2
    except BrokenPipeError:
        # whoever read the output has seen enough
        sys.stderr.close()
    except OSError as error:
        print(f'mmdet-ema: error: {error}', file=sys.stderr)
    return 1
