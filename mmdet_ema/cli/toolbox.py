"""``mmdet-ema inspect``, ``extract``, ``convert`` and ``diff``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from mmdet_ema.cli import plot, reports
from mmdet_ema.cli.shared import (
    add_command,
    add_made_file,
    add_unsafe,
    complain,
    recipe_of,
    say,
)
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
d2go (detectron2), timm, torchvision, deit (convnext), rtdetr (d-fine, deim),
yolox, lightning, averaged-model (torch), ema-pytorch, plain. mmdet2 and mmcv1
keep the averages in the plain names, and the raw weights there in iter_*.pth.

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
    """Add the commands of the toolbox to those of ``mmdet-ema``."""
    does = 'say which weights are in checkpoint files, of any project'
    inspect = add_command(commands, 'inspect', _inspect, does, _INSPECT)
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
    extract = add_command(commands, 'extract', _extract, does, _EXTRACT)
    extract.add_argument('file', metavar='FILE', nargs='?')
    add_made_file(extract)
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
    convert = add_command(commands, 'convert', _convert, does, _CONVERT)
    convert.add_argument('file', metavar='FILE', nargs='?')
    add_made_file(convert)
    convert.add_argument('--to', metavar='FORMAT', help='which format')
    add_unsafe(convert)

    does = 'say what differs between two files, by tensor'
    diff = add_command(commands, 'diff', _diff, does, _DIFF)
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


def _inspect(options: argparse.Namespace) -> int:
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
            complain(error)
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


def _extract(options: argparse.Namespace) -> int:
    from mmdet_ema.checkpoint.extract import extract

    names = ('weights', 'dtype', 'safetensors')
    own = {name: getattr(options, name) for name in names}
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
        f'wrote {done.path}: {done.tensors} tensors of {done.name} ({role})',
        options.out,
    )
    _say_what_is_lost(done, options.out)
    return 0


def _convert(options: argparse.Namespace) -> int:
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
        f'wrote {" and ".join(done.paths)}: {done.source} -> {done.target}, '
        f'with {", ".join(done.kept)}',
        options.out,
    )
    _say_what_is_lost(done, options.out)
    return 0


def _say_what_is_lost(done: Any, out: str) -> None:
    for words in done.lost:
        say(f'lost: {words}', out)
    for words in done.notes:
        say(f'note: {words}', out)


def _diff(options: argparse.Namespace) -> int:
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
