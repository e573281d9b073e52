"""The second file of BEVDet's ``MEGVIIEMAHook``: averages without raw weights.

Beside a raw ``epoch_N.pth`` that hook writes ``epoch_N_ema.pth`` (or
``iter_N_ema.pth``) with ``epoch`` or ``iter``, ``state_dict`` (the averages)
and ``updates`` (its count, which starts at ``init_updates``).
"""

from __future__ import annotations

from typing import Any, List, Mapping, MutableMapping

import torch

from mmdet_ema.checkpoint.format import WEIGHTS, pack, plain_name
from mmdet_ema.checkpoint.mapped import read_file
from mmdet_ema.errors import CheckpointError

UPDATES = 'updates'


def is_second_file(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether what was read from a file is such a file."""
    return UPDATES in checkpoint and WEIGHTS in checkpoint


def add_averages(
    checkpoint: MutableMapping[str, Any], path: str, init_updates: int
) -> List[str]:
    """Give a raw checkpoint, in place, the averages of a second file.

    The file's count starts at the hook's ``init_updates``. Returns sentences
    on what may be wrong.
    """
    second = read_file(path)
    updates, weights = second.get(UPDATES), second.get(WEIGHTS)
    if not isinstance(updates, int) or not isinstance(weights, Mapping):
        raise CheckpointError(
            f"resume={path!r} is no EMA file of BEVDet's MEGVIIEMAHook, with "
            f"'{UPDATES}' and '{WEIGHTS}' in it; give the epoch_N_ema.pth "
            f'or iter_N_ema.pth of that hook, or leave resume out.'
        )
    if updates < init_updates:
        raise CheckpointError(
            f'init_updates={init_updates} is more than the {updates} updates '
            f'that {path!r} has seen; use the init_updates of the run that '
            f'wrote it.'
        )
    raws = checkpoint[WEIGHTS]
    found = {plain_name(k, raws): v for k, v in weights.items()}
    unknown = [name for name in found if name not in raws]
    if unknown:
        raise CheckpointError(
            f'{path!r} has averages of {len(unknown)} tensors '
            f'({", ".join(unknown[:3])}) that the checkpoint does not have; '
            f'give the file beside it, of the same run.'
        )
    # that hook leaves integers as they were at the start
    averages = {
        name: value
        for name, value in found.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    pack(checkpoint, averages, {}, updates - init_updates, {})
    doubts = []
    missing = sorted(raws.keys() - found.keys())
    if missing:
        doubts.append(
            f'{len(missing)} tensors of the checkpoint are not in {path!r} '
            f'({", ".join(missing[:3])}); their average starts from the raw '
            f'weights.'
        )
    return doubts + other_moments(second, checkpoint.get('meta') or {}, path)


def other_moments(
    second: Mapping[str, Any], meta: Mapping[str, Any], path: str
) -> List[str]:
    """Return a sentence if a second file was not written with the first."""
    # a hook may note the number before or after the runner counts up, and
    # mmcv's own `iter` may be one less than the iterations done
    for unit, late in (('epoch', 0), ('iter', 1)):
        theirs, ours = second.get(unit), meta.get(unit)
        if not isinstance(theirs, int) or not isinstance(ours, int):
            continue
        if not -1 <= theirs - ours <= late:
            return [
                f'{path!r} was written at {unit} {theirs}, the checkpoint at '
                f'{unit} {ours}: averages and raw weights of different '
                f'moments. Give the file beside the checkpoint.'
            ]
    return []
