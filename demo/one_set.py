"""Write a checkpoint of mmdet 2 again, with its raw weights to be tested.

``tools/test.py`` of mmdet 2 runs no hook: it tests what is in ``state_dict``,
and that is the average.

Usage: python demo/one_set.py CHECKPOINT OUT
"""

from __future__ import annotations

import argparse

import torch

from mmdet_ema.checkpoint import put_raw, unpack
from mmdet_ema.checkpoint.mmcv1 import take_message


def write_raw(checkpoint: str, out: str) -> None:
    """Write the raw weights of a checkpoint, and all but its EMA part.

    Args:
        checkpoint: A file that a training with ``EMAHook`` wrote.
        out: Where to; a file that is there is replaced.

    Raises:
        ValueError: If the checkpoint has no EMA part.
    """
    content = torch.load(checkpoint, map_location='cpu')
    take_message(content)
    part = unpack(content)
    if part is None:
        raise ValueError(f'{checkpoint!r} has no EMA part: it has one set')
    put_raw(content, part)
    weights = {key: content[key] for key in ('meta', 'state_dict')}
    torch.save(weights, out)


def main() -> None:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description='Write the raw weights.')
    parser.add_argument('checkpoint', help='file with averages and raw ones')
    parser.add_argument('out', help='file to write')
    args = parser.parse_args()
    try:
        write_raw(args.checkpoint, args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
