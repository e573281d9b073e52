"""The toolbox for files: parsers of its commands, and thin calls.

Nothing is imported here that makes ``--help`` wait.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any, Callable, Dict, List, Optional, Tuple

from mmdet_ema.cli import average, plot, reports, tune
from mmdet_ema.cli.parsers import add_command, add_output, add_unsafe
from mmdet_ema.errors import CheckpointError, OptionError

_INSPECT = """\
examples:
  mmdet-ema inspect work_dirs/a/epoch_12.pth
  mmdet-ema inspect work_dirs/a/*.pth --quick
  mmdet-ema inspect epoch_12.pth --json
  mmdet-ema inspect epoch_12.pth --plot distances.png
  mmdet-ema inspect published.pth --recipe > r.yaml"""

_EXTRACT = """\
The file has state_dict and meta: class names and colours, and the config of
the model. init_detector, tools/test.py and load_from take it.

examples:
  mmdet-ema extract epoch_12.pth -o ema.pth
  mmdet-ema extract epoch_12.pth -o raw.pth --weights raw
  mmdet-ema extract epoch_12.pth -o rtmdet.pth --hash --dtype float16
  mmdet-ema extract epoch_12.pth -o ema.safetensors
  mmdet-ema extract epoch_12.pth -o - | ssh host 'cat > ema.pth'
  mmdet-ema extract --recipe ema.pth -o again.pth"""

_CONVERT = """\
Names of tensors stay as they are. What the format cannot hold is said.

formats: mmdet_ema, mmengine (mmpretrain), mmdet2, mmcv1, bevdet (two files),
d2go (detectron2), timm, torchvision (deit), rtdetr (d-fine, deim), yolox,
lightning, averaged-model (torch), ema-pytorch, plain. mmdet2 and mmcv1 keep
the averages in the plain names, and the raw weights there in iter_*.pth.

examples:
  mmdet-ema convert d2go.pth -o mmengine.pth --to mmengine
  mmdet-ema convert epoch_12.pth -o timm.pth --to timm
  mmdet-ema convert work_dirs/a/epoch_12.pth -o epoch_12.pth --to bevdet"""

_DIFF = """\
exit status: 0 if nothing differs, 1 if something does.

examples:
  mmdet-ema diff epoch_11.pth epoch_12.pth
  mmdet-ema diff epoch_12.pth ema.pth --weights ema
  mmdet-ema diff epoch_12.pth epoch_12.pth --weights ema --against raw
  mmdet-ema diff a.pth b.safetensors --atol 1e-6"""


def add_commands(commands: Any) -> None:
    """Add the parsers of the toolbox to the subparsers of ``mmdet-ema``."""
    does = 'say which weights are in checkpoint files, of any project'
    inspect = add_command(commands, 'inspect', does, _INSPECT)
    inspect.add_argument('files', metavar='FILE', nargs='+')
    inspect.add_argument(
        '--quick',
        action='store_true',
        help='names, shapes and counters alone: no checksums, no distances',
    )
    output = inspect.add_mutually_exclusive_group()
    output.add_argument('--json', action='store_true', help='print JSON')
    output.add_argument(
        '--recipe', action='store_true', help='print how the file was made'
    )
    output.add_argument(
        '--plot',
        metavar='FILE',
        type=plot.picture,
        help='draw the distances by module',
    )
    add_unsafe(inspect)

    does = 'write one set of weights: to deploy, to fine-tune'
    extract = add_command(commands, 'extract', does, _EXTRACT)
    extract.add_argument('file', metavar='FILE', nargs='?')
    _add_made_file(extract)
    extract.add_argument(
        '--weights',
        metavar='NAME',
        help='ema, raw or the name of an average; by default the averages',
    )
    extract.add_argument(
        '--dtype', help='float16, bfloat16, float32 or float64'
    )
    extract.add_argument(
        '--hash',
        action='store_true',
        help='name it OUT-<8 digits of its SHA-256>.pth',
    )
    extract.add_argument(
        '--safetensors', action='store_true', help='write safetensors'
    )
    add_unsafe(extract)

    does = 'write a checkpoint in the format of another project'
    convert = add_command(commands, 'convert', does, _CONVERT)
    convert.add_argument('file', metavar='FILE', nargs='?')
    _add_made_file(convert)
    convert.add_argument('--to', metavar='FORMAT', help='which format')
    add_unsafe(convert)

    does = 'say what differs between two files, by tensor'
    diff = add_command(commands, 'diff', does, _DIFF)
    diff.add_argument('first', metavar='A')
    diff.add_argument('second', metavar='B')
    diff.add_argument(
        '--weights', metavar='NAME', help='ema, raw, ...: which of A'
    )
    diff.add_argument(
        '--against', metavar='NAME', help='which of B; by default the same'
    )
    diff.add_argument(
        '--atol',
        type=float,
        default=0.0,
        help='largest difference that is none; by default 0',
    )
    diff.add_argument('--json', action='store_true', help='print JSON')
    add_unsafe(diff)

    _add_made_file(average.add_parser(commands))
    tune.add_parser(commands)


def _add_made_file(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that makes a file of another one."""
    said = "file to write; '-' for the standard output"
    add_output(parser, required=True, help=said)
    parser.add_argument(
        '--recipe',
        metavar='FILE',
        help='repeat what made this file, or what a .yaml or .json says',
    )


def run(options: argparse.Namespace) -> int:
    """Run a command of the toolbox; return the exit status."""
    try:
        return COMMANDS[options.command](options)
    except OptionError as error:
        _complain(error)
        return 2
    except (CheckpointError, OSError) as error:
        _complain(error)
        return 1


def _complain(error: Exception) -> None:
    print(
        f'mmdet-ema: error: {reports.printable(str(error))}', file=sys.stderr
    )


def say(options: argparse.Namespace, text: str) -> None:
    """Print what was done: not into a file on the standard output."""
    to_stdout = getattr(options, 'out', None) == '-'
    print(
        reports.printable(text), file=sys.stderr if to_stdout else sys.stdout
    )


def recipe_of(
    options: argparse.Namespace, own: Dict[str, Any]
) -> Tuple[List[str], Dict[str, Any], Optional[Dict[str, Any]]]:
    """Return input files, options, and the recipe to repeat, if one is given.

    Args:
        options: The command line.
        own: What a recipe says of it; what is not given is None or False.

    Raises:
        OptionError: If neither a file nor a recipe is given, or options
            contradict a recipe.
    """
    files = options.files if 'files' in options else [options.file]
    files = [x for x in files if x is not None]
    if options.recipe is None:
        if not files:
            raise OptionError('give a FILE, or --recipe.')
        return files, own, None
    from mmdet_ema.checkpoint import recipe as recipes
    from mmdet_ema.version import __version__

    recipe = recipes.read(options.recipe)
    if recipe['command'] != options.command:
        raise OptionError(
            f'{options.recipe!r} was made by {recipe["command"]!r:.40}; use '
            f'mmdet-ema {recipe["command"]!s:.40} --recipe.'
        )
    given = [name for name, value in own.items() if value]
    if given:
        raise OptionError(
            f'--recipe says all options; leave out --{", --".join(given)}.'
        )
    if recipe['version'] != __version__:
        say(
            options,
            f'mmdet-ema: the recipe is of version {recipe["version"]!s:.20}, '
            f'this is {__version__}: the bytes may differ',
        )
    return recipes.check_inputs(recipe, files), recipe['options'], recipe


def _run_inspect(options: argparse.Namespace) -> int:
    from mmdet_ema.checkpoint.inspect import inspect

    if options.recipe:
        from mmdet_ema.checkpoint import recipe as recipes

        for path in options.files:
            print(json.dumps(recipes.read(path), indent=2))
        return 0
    found, status = [], 0
    for path in options.files:
        try:
            report = inspect(path, quick=options.quick, unsafe=options.unsafe)
            found.append(report)
        except CheckpointError as error:
            _complain(error)
            status = 1
    if options.json:
        print(json.dumps(found, indent=2))
    elif len(options.files) == 1:
        for report in found:
            reports.show_one(report)
    elif found:
        reports.show_several(found)
    if options.plot is not None and found:
        reports.plot(found, options.plot)
        print(f'wrote {options.plot}')
    return status


def _run_extract(options: argparse.Namespace) -> int:
    from mmdet_ema.checkpoint.extract import extract

    own = {
        'weights': options.weights,
        'dtype': options.dtype,
        'safetensors': options.safetensors,
    }
    (path,), own, recipe = recipe_of(options, own)
    done = extract(
        *(path, options.out),
        weights=own.get('weights'),
        dtype=own.get('dtype'),
        safetensors=bool(own.get('safetensors')),
        add_hash=options.hash,
        force=options.force,
        unsafe=options.unsafe,
        recipe=recipe,
    )
    role = {'average': 'averages', 'raw': 'raw weights'}.get(
        done.role, 'not known whether raw or averages'
    )
    say(
        options,
        f'wrote {done.path}: {done.tensors} tensors of {done.name} ({role})',
    )
    _say_what_is_lost(options, done)
    return 0


def _run_convert(options: argparse.Namespace) -> int:
    from mmdet_ema.checkpoint.convert import convert

    (path,), own, recipe = recipe_of(options, {'to': options.to})
    if not own.get('to'):
        raise OptionError('give --to FORMAT; see mmdet-ema convert --help.')
    done = convert(
        *(path, options.out, own['to']),
        force=options.force,
        unsafe=options.unsafe,
        recipe=recipe,
    )
    say(
        options,
        f'wrote {" and ".join(done.paths)}: {done.source} -> {done.target}, '
        f'with {", ".join(done.kept)}',
    )
    _say_what_is_lost(options, done)
    return 0


def _say_what_is_lost(options: argparse.Namespace, done: Any) -> None:
    for words in done.lost:
        say(options, f'lost: {words}')
    for words in done.notes:
        say(options, f'note: {words}')


def _run_diff(options: argparse.Namespace) -> int:
    from mmdet_ema.checkpoint.diff import diff

    found = diff(
        *(options.first, options.second),
        weights=options.weights,
        against=options.against,
        atol=options.atol,
        unsafe=options.unsafe,
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        reports.show_difference(found)
    return 1 if found.differences else 0


COMMANDS: Dict[str, Callable[[argparse.Namespace], int]] = {
    'average': average.run,
    'convert': _run_convert,
    'diff': _run_diff,
    'extract': _run_extract,
    'inspect': _run_inspect,
    'tune': tune.run,
}
"""By name: runs the command, and returns the exit status."""
