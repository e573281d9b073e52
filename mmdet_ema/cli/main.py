"""Entry of the command line: parse, run, turn errors into one line.

Nothing here imports torch or a framework: ``--help`` is not to wait for them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, List, Optional, Tuple, Type

from mmdet_ema.cli import average, plot, toolbox, tune
from mmdet_ema.cli.shared import STYLE, add_command, complain
from mmdet_ema.errors import CheckpointError, OptionError
from mmdet_ema.frameworks import load_hook
from mmdet_ema.version import __version__

# they exit with 1 for what is refused
_OF_FILES = ('average', 'convert', 'diff', 'extract', 'inspect', 'tune')
_DESCRIPTION = """\
Train and test OpenMMLab detectors with an exponential moving average (EMA) of
their weights, through the framework's own tools.

exit status: 0 done; 2 wrong usage or input; otherwise that of the tool.
Commands for files: 0 done; 1 refused, or the files differ; 2 wrong usage"""

_TRAIN = """\
Every other option goes to the framework's tools/train.py as it is: --work-dir,
--resume, --amp, --cfg-options, --launcher, ... CONFIG comes first. Where the
config has an EMA hook, the options here replace its own.

examples:
  mmdet-ema train configs/rtmdet/rtmdet_tiny_8xb32-300e_coco.py
  mmdet-ema train CONFIG --decay 0.999 --tau 500 --work-dir work_dirs/a
  mmdet-ema train CONFIG --evaluate both
  mmdet-ema train CONFIG --work-dir work_dirs/a --resume
  torchrun --nproc_per_node 8 -m mmdet_ema train CONFIG --launcher pytorch"""

_TEST = """\
Every other option goes to the framework's tools/test.py as it is: --work-dir,
--out, --tta, --cfg-options, ... (mmdet 2: --eval bbox). CONFIG and CHECKPOINT
come first. Under mmdet 2, the tool runs once for each set of weights.

examples:
  mmdet-ema test CONFIG work_dirs/a/epoch_12.pth
  mmdet-ema test CONFIG work_dirs/a/epoch_12.pth --weights raw
  mmdet-ema test CONFIG work_dirs/a/epoch_12.pth --weights both
  mmdet-ema test CONFIG work_dirs/a/epoch_12.pth --weights ema,fast"""


def main(argv: Optional[List[str]] = None) -> None:
    """Run the command line; it exits with 2 for wrong usage or input."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    runs_tool = options.command in ('train', 'test')
    if rest and not runs_tool:
        parser.error(f'unrecognized arguments: {" ".join(rest)}')
    if runs_tool:
        options.rest = rest
    if options.command == 'train':
        own = ('command', 'config', 'rest', 'run')
        options.hook = {k: x for k, x in vars(options).items() if k not in own}
        others = [f'--{name}' for name in options.hook if name != 'enabled']
        if 'enabled' in options.hook and others:
            parser.error(
                f'--no-ema contradicts {", ".join(others)}; leave one out'
            )
    expected: Tuple[Type[Exception], ...] = (OptionError, CheckpointError)
    if not runs_tool:
        expected += (OSError,)
    try:
        status = options.run(options)
    except expected as error:
        complain(error)
        refused = options.command in _OF_FILES
        refused = refused and not isinstance(error, OptionError)
        status = 1 if refused else 2
    if status is not None:
        sys.exit(status)


def _run_tool(options: argparse.Namespace) -> None:
    from mmdet_ema.cli import commands

    load_hook()
    getattr(commands, options.command)(options)


def _plot(options: argparse.Namespace) -> None:
    print(plot.draw(options.work_dir, options.out, options.metric))


def _demo(options: argparse.Namespace) -> None:
    from mmdet_ema.cli import demo

    demo.run(options.out)


def _env(options: argparse.Namespace) -> None:
    from mmdet_ema.cli.environment import print_environment

    print_environment()


def _names(text: str) -> Any:
    """Return a name, or a list of names; whoever knows them checks them."""
    names = text.split(',')
    return names if len(names) > 1 else text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='mmdet-ema', description=_DESCRIPTION, **STYLE
    )
    version = f'mmdet-ema {__version__}'
    parser.add_argument('--version', action='version', version=version)
    commands = parser.add_subparsers(
        title='commands', metavar='COMMAND', dest='command', required=True
    )

    does = 'train with EMA, without touching the config'
    train = add_command(
        *(commands, 'train', _run_tool, does, _TRAIN),
        # what is not given is not there: the config says it
        argument_default=argparse.SUPPRESS,
    )
    train.add_argument('config', metavar='CONFIG', help='a config file')
    train.add_argument(
        '--decay', type=float, help='weight of the old average, in [0, 1)'
    )
    train.add_argument(
        '--tau', type=float, help='constant of the ramp in steps'
    )
    train.add_argument('--schedule', help='name of a schedule')
    train.add_argument(
        '--evaluate',
        type=_names,
        help='weights to validate: names (ema,raw), both or all',
    )
    train.add_argument('--device', help='cpu: averages in host memory')
    train.add_argument(
        '--overlap',
        action='store_true',
        help='update in parallel with the next pass (GPU)',
    )
    train.add_argument(
        '--no-ema',
        action='store_false',
        dest='enabled',
        help='average nothing; a resume puts the raw weights back',
    )

    does = 'test a checkpoint with its EMA weights, its raw ones or both'
    test = add_command(commands, 'test', _run_tool, does, _TEST)
    test.add_argument('config', metavar='CONFIG', help='a config file')
    test.add_argument('checkpoint', metavar='CHECKPOINT', help='a .pth file')
    test.add_argument(
        '--weights',
        metavar='NAME[,NAME]',
        type=_names,
        help='ema, raw, an average of the config, both or all; by default '
        'what the config says, or ema',
    )
    does = 'draw the metrics by weights, decay and distance of a run'
    draw = add_command(commands, 'plot', _plot, does)
    draw.add_argument(
        'work_dir', metavar='WORK_DIR', type=Path, help="the run's folder"
    )
    draw.add_argument(
        '--out',
        metavar='FILE',
        type=plot.picture,
        help='picture to write; by default ema.png in WORK_DIR',
    )
    draw.add_argument(
        '--metric', metavar='NAME', help='which metric; by default an mAP'
    )
    does = 'train a small network on digits with EMA, in plain PyTorch'
    demo = add_command(commands, 'demo', _demo, does)
    demo.add_argument(
        '--out',
        metavar='FILE',
        type=plot.picture,
        default='mmdet_ema_demo.png',
        help='picture to write; by default %(default)s',
    )
    toolbox.add_commands(commands)
    average.add_parser(commands)
    tune.add_parser(commands)
    does = 'print versions, hooks and GPUs, as a bug report needs them'
    add_command(commands, 'env', _env, does)
    return parser
