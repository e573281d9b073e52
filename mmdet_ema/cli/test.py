"""``mmdet-ema test``: the framework's ``tools/test.py`` with EMA weights."""

from __future__ import annotations

import argparse
from typing import Any, List

from mmdet_ema.cli.edited_config import choose_weights
from mmdet_ema.cli.generations import installed
from mmdet_ema.cli.tool import run_tool
from mmdet_ema.training.options import EVALUATE

_EPILOG = """\
Every other option goes to the framework's tools/test.py as it is: --work-dir,
--out, --tta, --cfg-options, ... (mmdet 2: --eval bbox). CONFIG and CHECKPOINT
come first. Under mmdet 2, 'both' runs the tool twice.

examples:
  mmdet-ema test CONFIG work_dirs/a/epoch_12.pth
  mmdet-ema test CONFIG work_dirs/a/epoch_12.pth --weights raw
  mmdet-ema test CONFIG work_dirs/a/epoch_12.pth --weights both"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser.

    Args:
        commands: What ``add_subparsers`` returned.
    """
    parser = commands.add_parser(
        'test',
        help='test EMA weights, raw weights or both',
        description='Test a checkpoint with its EMA weights, or its raw ones.',
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('config', metavar='CONFIG', help='a config file')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='a .pth file')
    parser.add_argument(
        '--weights',
        choices=EVALUATE,
        help='which weights; by default what the config says, or ema',
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, rest: List[str]) -> None:
    generation = installed()
    if '://' not in options.checkpoint:
        generation.check(options.checkpoint)
    if generation.reading_raw is None:
        _run_tool(options, rest)
        return
    # the tool of mmdet 2 builds no hook and tests one set of weights
    if options.weights in ('raw', 'both'):
        print('mmdet-ema: testing the raw weights', flush=True)
        with generation.reading_raw():
            _run_tool(options, rest)
    if options.weights != 'raw':
        print('mmdet-ema: testing the EMA weights', flush=True)
        _run_tool(options, rest)


def _run_tool(options: argparse.Namespace, rest: List[str]) -> None:
    run_tool(
        'test',
        options.config,
        [options.checkpoint, *rest],
        lambda cfg: choose_weights(cfg, options.weights),
    )
