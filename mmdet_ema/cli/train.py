"""``mmdet-ema train``: the framework's ``tools/train.py`` with EMA."""

from __future__ import annotations

import argparse
from typing import Any, List

from mmdet_ema.cli.edited_config import add_ema
from mmdet_ema.cli.tool import run_tool

_EPILOG = """\
Every other option goes to the framework's tools/train.py as it is: --work-dir,
--resume, --amp, --cfg-options, --launcher, ... CONFIG comes first.

examples:
  mmdet-ema train configs/rtmdet/rtmdet_tiny_8xb32-300e_coco.py
  mmdet-ema train CONFIG --decay 0.999 --tau 500 --work-dir work_dirs/a
  mmdet-ema train CONFIG --work-dir work_dirs/a --resume
  torchrun --nproc_per_node 8 -m mmdet_ema train CONFIG --launcher pytorch"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser.

    Args:
        commands: What ``add_subparsers`` returned.
    """
    parser = commands.add_parser(
        'train',
        help='train with EMA',
        description='Train with EMA, without touching the config.',
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('config', metavar='CONFIG', help='a config file')
    parser.add_argument(
        '--decay', type=float, help='weight of the old average, in [0, 1)'
    )
    parser.add_argument(
        '--tau', type=float, help='constant of the ramp in steps'
    )
    parser.add_argument('--schedule', help='name of a schedule')
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, rest: List[str]) -> None:
    words = ('decay', 'tau', 'schedule')
    given = {k: getattr(options, k) for k in words}
    given = {k: v for k, v in given.items() if v is not None}
    run_tool('train', options.config, rest, lambda cfg: add_ema(cfg, given))
