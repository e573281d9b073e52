"""Write a checkpoint of mmdet 2 again, with one set of weights to be tested.

``tools/test.py`` of mmdet 2 runs no hook: it tests what is in ``state_dict``,
and that is the main average.

Usage: python demo/one_set.py CHECKPOINT SET OUT
"""

from __future__ import annotations

import argparse

import torch

from mmdet_ema.checkpoint import put_raw, unpack
from mmdet_ema.checkpoint.mmcv1 import take_message


def write_set(checkpoint: str, name: str, out: str) -> None:
    """Write one set of weights of a checkpoint, and no EMA part.

    Args:
        checkpoint: A file that a training with ``EMAHook`` wrote.
        name: 'raw', or the name of an average.
        out: Where to; a file that is there is replaced.

    Raises:
        ValueError: If the checkpoint has no such set.
    """
    content = torch.load(checkpoint, map_location='cpu')
    take_message(content)
    part = unpack(content)
    if part is None:
        raise ValueError(f'{checkpoint!r} has no EMA part: it has one set')
    if name == 'raw':
        put_raw(content, part)
    elif name in part.more:
        # tensors that are not averaged are in ``state_dict`` alone
        content['state_dict'].update(part.more[name]['state_dict'])
    elif name != part.deployed:
        sets = ', '.join(['raw', part.deployed, *part.more])
        raise ValueError(f'{checkpoint!r} has no set {name!r}; it has {sets}')
    weights = {key: content[key] for key in ('meta', 'state_dict')}
    torch.save(weights, out)


def main() -> None:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description='Write one set of weights.')
    parser.add_argument('checkpoint', help='file of a training with EMAHook')
    parser.add_argument('set', help="'raw', or the name of an average")
    parser.add_argument('out', help='file to write')
    args = parser.parse_args()
    try:
        write_set(args.checkpoint, args.set, args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
