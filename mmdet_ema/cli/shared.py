"""What several commands share: options, recipes, and what they print.

Nothing is imported here that makes ``--help`` wait.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, Callable, Dict, List, Optional, Tuple

from mmdet_ema.errors import OptionError
from mmdet_ema.frameworks import has_mmcv1, has_mmengine
from mmdet_ema.version import __version__

STYLE: Dict[str, Any] = dict(
    formatter_class=argparse.RawDescriptionHelpFormatter,
    # --resume-from of a tool is not an abbreviation of ours
    allow_abbrev=False,
)


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], Optional[int]],
    does: str,
    epilog: str = '',
    **more: Any,
) -> argparse.ArgumentParser:
    """Return the new parser of a command that does what is said.

    ``run`` is called with what was parsed, and returns the exit status.
    """
    said = f'{does[0].upper()}{does[1:]}.'
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=does, description=said, epilog=epilog, **STYLE, **more
    )
    parser.set_defaults(run=run)
    return parser


def add_output(parser: argparse.ArgumentParser, **more: Any) -> None:
    """Add the options of every command that writes a file of weights."""
    parser.add_argument('-o', '--out', metavar='OUT', **more)
    parser.add_argument(
        '--force', action='store_true', help='replace a file of that name'
    )


def add_made_file(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that makes a file of another one."""
    said = "file to write; '-' for the standard output"
    add_output(parser, required=True, help=said)
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


def add_metric(parser: argparse.ArgumentParser) -> None:
    """Add the metric that chooses weights."""
    parser.add_argument(
        '--metric',
        metavar='NAME',
        help='which metric; by default that of save_best, or the first one',
    )


def check_mmengine(what: str) -> None:
    """Refuse what builds a config by mmengine where that is not used."""
    if has_mmcv1() or not has_mmengine():
        raise OptionError(
            f'{what} builds the model and data of a config by mmengine, which '
            f'is not what is installed here; under mmcv 1.x make averages by '
            f'mmdet-ema average, test each by tools/test.py, and estimate '
            f'statistics by the option recalibrate=N of EMAHook.'
        )


def recipe_of(
    options: argparse.Namespace, own: Dict[str, Any]
) -> Tuple[List[str], Dict[str, Any], Optional[Dict[str, Any]]]:
    """Return input files, options, and the recipe to repeat, if one is given.

    ``own`` is what a recipe says of the command line; what is not given is
    None or False.
    """
    files = options.files if 'files' in options else [options.file]
    files = [x for x in files if x is not None]
    if options.recipe is None:
        if not files:
            raise OptionError('give a FILE, or --recipe.')
        return files, own, None
    from mmdet_ema.checkpoint import recipe as recipes

    recipe = recipes.read(options.recipe)
    if recipe['command'] != options.command:
        raise OptionError(
            f'{options.recipe!r} was made by {recipe["command"]!r:.40}; use '
            f'mmdet-ema {recipe["command"]!s:.40} --recipe.'
        )
    inputs = len(recipe['inputs'])
    if 'files' not in options and inputs != 1:
        raise OptionError(
            f'{options.recipe!r} is of {inputs} files, and '
            f'{options.command} reads one; give the recipe as it was made.'
        )
    given = [name for name, value in own.items() if value]
    if given:
        raise OptionError(
            f'--recipe says all options; leave out --{", --".join(given)}.'
        )
    if recipe['version'] != __version__:
        say(
            f'mmdet-ema: the recipe is of version {recipe["version"]!s:.20}, '
            f'this is {__version__}: the bytes may differ',
            options.out,
        )
    return recipes.check_inputs(recipe, files), recipe['options'], recipe


def printable(text: str) -> str:
    """Return a text that does nothing to a terminal but stand in it."""
    return ''.join(x if x.isprintable() else '?' for x in text)


def say(text: str, out: str = '') -> None:
    """Print a line: not into a file on the standard output.

    Names in it come from a file, which may say anything.
    """
    print(printable(text), file=sys.stderr if out == '-' else sys.stdout)


def complain(error: Exception) -> None:
    """Print an error on one line."""
    print(f'mmdet-ema: error: {printable(str(error))}', file=sys.stderr)


def is_first() -> bool:
    """Return whether this is the first rank, as torchrun, Slurm or MPI say."""
    ranks = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
    found = [os.environ[name] for name in ranks if name in os.environ]
    return (found or ['0'])[0] == '0'
