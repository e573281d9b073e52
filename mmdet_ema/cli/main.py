"""Entry of the command line: parse, run, turn errors into one line."""

from __future__ import annotations

import argparse
import sys
from typing import List, Optional

from mmdet_ema.cli import test, train
from mmdet_ema.errors import CheckpointError, OptionError
from mmdet_ema.version import __version__

_DESCRIPTION = """\
Train and test OpenMMLab detectors with an exponential moving average (EMA) of
their weights, through the framework's own tools.

exit status: 0 done; 2 wrong usage or input; otherwise that of the tool"""


def main(argv: Optional[List[str]] = None) -> None:
    """Run the command line.

    Args:
        argv: The arguments; those of the process by default.

    Raises:
        SystemExit: With status 2 for wrong usage or input, else with that of
            the tool.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    try:
        options.run(options, rest)
    except (OptionError, CheckpointError) as error:
        print(f'mmdet-ema: error: {error}', file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='mmdet-ema',
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        '--version', action='version', version=f'mmdet-ema {__version__}'
    )
    commands = parser.add_subparsers(
        title='commands', metavar='COMMAND', required=True
    )
    train.add_parser(commands)
    test.add_parser(commands)
    return parser
