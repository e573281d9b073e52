"""What a run under mmengine's ``DeepSpeedStrategy`` writes, and resumes from.

DeepSpeed writes a folder: a file a rank, which only it can read, of raw
weights in pieces. The strategy asks no hook. So one more file goes into the
folder, last of all: the one that a single process would write, without the
state of the optimizer. It deploys as it is, and a resume reads the averages
from it.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from typing import Any, Callable, ContextManager, Dict, Optional

import torch
from mmengine.dist import all_gather_object, barrier, is_main_process
from mmengine.runner.checkpoint import save_checkpoint
from torch import Tensor, nn

from mmdet_ema.averaging.shards import gather
from mmdet_ema.checkpoint.files import read_structure
from mmdet_ema.checkpoint.pickles import LOADS_SAFELY
from mmdet_ema.errors import CheckpointError
from mmdet_ema.training.patches import wrap_once

WHOLE = 'ema.pth'
"""Name of that file."""


def watch_saves(
    strategy: Any, model: nn.Module, raw: Callable[[], ContextManager[None]]
) -> None:
    """Let a strategy write the whole file after its own.

    The model is unwrapped; in the context ``raw`` it has the raw weights.
    """

    def save_both(
        save: Any,
        filename: str,
        *,
        extra_ckpt: Optional[Dict[str, Any]] = None,
        callback: Optional[Callable[[Any], Any]] = None,
        **options: Any,
    ) -> None:
        path, extra = os.path.join(filename, WHOLE), extra_ckpt or {}
        with raw():
            if is_main_process():
                # not to stand beside the files of another moment
                with contextlib.suppress(OSError):
                    os.unlink(path)
            barrier()
            save(filename, extra_ckpt=extra, **options)
            state = model.state_dict(keep_vars=True)
            weights = OrderedDict(
                (name, x.detach() if isinstance(x, Tensor) else x)
                for name, x in gather(state.items()).items()
            )
        if not is_main_process():
            weights.clear()  # of parameters that are whole everywhere
        weights._metadata = state._metadata  # type: ignore[attr-defined]
        extra.pop('optim_wrapper', None)
        checkpoint = {'state_dict': weights, **extra}
        if callback is not None:
            callback(checkpoint)
        barrier()  # now DeepSpeed's files are whole
        if is_main_process():
            # without the optimizer it writes one file
            alone = os.path.isfile(filename)
            save_checkpoint(checkpoint, filename if alone else path)

    wrap_once(strategy, 'save_checkpoint', save_both)


def is_watched(strategy: Any) -> bool:
    """Return whether :func:`watch_saves` was called for a strategy."""
    return 'save_checkpoint' in vars(strategy)


def read_whole(folder: str, iteration: Optional[int]) -> Any:
    """Read the whole file of a folder that DeepSpeed has just loaded.

    None if there is no such file. It is refused where DeepSpeed's part has
    seen other iterations, if they are given.
    """
    path = os.path.join(folder, WHOLE)
    seen = all_gather_object(os.path.isfile(path))
    if not any(seen):
        return None
    if not all(seen):
        lacking = [rank for rank, sees in enumerate(seen) if not sees]
        raise CheckpointError(
            f'{path!r} is not there on the ranks {lacking}; copy it to where '
            f'they look for it, or share the folder.'
        )
    found = read_structure(path).get('meta', {}).get('iter')
    if iteration is not None and found not in (None, iteration):
        raise CheckpointError(
            f'{path!r} is of iteration {found}, the files of DeepSpeed beside '
            f'it are of iteration {iteration}; take another checkpoint.'
        )
    options = {'weights_only': True} if LOADS_SAFELY else {}
    return torch.load(path, map_location='cpu', **options)
