"""The starting weights of a run, which ``posthoc=True`` keeps in its folder.

An average is a sum of the weights of all steps and of those that it started
from. A checkpoint has none of the latter: they never change, and one file a
run does. It holds them as ``state_dict``; ``ema_meta`` of each checkpoint has
their fingerprint, so that a file of another run is not taken for theirs.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, Mapping

import torch
from torch import Tensor

from mmdet_ema.checkpoint.files import write_whole
from mmdet_ema.checkpoint.format import WEIGHTS

START = 'start'
"""Key of the fingerprint in ``ema_meta``."""


def start_name(restarted: int) -> str:
    """Return the name of the file; after a restart before an epoch, another.

    Files from before the restart keep theirs.
    """
    # not .pth: mmdet 2 looks for the latest of these, and wants a number
    return f'ema_start_epoch_{restarted}.pt' if restarted else 'ema_start.pt'


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return a hash of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f'{name} {tensor.dtype} {[*tensor.shape]}'.encode())
        if tensor.layout is not torch.strided:
            continue  # sparse: torch makes no bytes of it
        # one element may have any stride
        flat = tensor.detach().cpu().reshape(-1)
        flat = flat.clone(memory_format=torch.contiguous_format)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_there(path: str, found: Any) -> bool:
    """Return whether a file holds the weights of that fingerprint."""
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
        return bool(fingerprint(content[WEIGHTS]) == found)
    except Exception:  # it may be damaged, or something else
        return False


def keep_start(path: str, weights: Mapping[str, Tensor], log: Any) -> str:
    """Write the starting weights if need be; return their fingerprint."""
    mine = fingerprint(weights)
    if not is_there(path, mine):
        if os.path.exists(path):
            log.warning(
                f'EMA: {path} has the starting weights of another run; those '
                f'of this one take their place.'
            )
        content = {WEIGHTS: dict(weights)}
        write_whole(path, lambda file: torch.save(content, file))
        log.info(f'EMA: {path}: what the averages start from (posthoc=True).')
    return mine
