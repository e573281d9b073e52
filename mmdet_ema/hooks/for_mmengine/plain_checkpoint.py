"""Checkpoints of mmengine that ``torch.load(weights_only=True)`` reads.

mmengine puts its ``HistoryBuffer`` and NumPy scalars into every file; torch
from 2.6 on refuses to read them in a process that has not allow-listed them.
"""

from __future__ import annotations

from typing import Any, Dict, List, MutableMapping

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from torch import nn

from mmdet_ema.checkpoint.plain import Codec, foreign, from_plain, to_plain
from mmdet_ema.core.errors import CheckpointError

_WEIGHTS = ('state_dict', 'ema_state_dict')


def make_plain(checkpoint: MutableMapping[str, Any], log: Any) -> None:
    """Make everything in a checkpoint plain, in place.

    Args:
        checkpoint: The checkpoint, about to be written.
        log: Where to warn of what cannot be made plain.
    """
    for key in list(checkpoint):
        if key not in _WEIGHTS:
            checkpoint[key] = to_plain(checkpoint[key], CODECS)
    left = foreign(dict(checkpoint))
    if left:
        log.warning(
            f'EMA: the checkpoint holds {", ".join(left)}; reading it needs '
            f'these types allow-listed (torch.serialization.add_safe_globals).'
        )


def refuse_foreign(checkpoint: MutableMapping[str, Any]) -> None:
    """Refuse to resume from a file of mmcv 1.x.

    Args:
        checkpoint: What was read.

    Raises:
        CheckpointError: If mmcv's runner wrote it; mmengine would stop at
            ``message_hub`` later, with the weights loaded.
    """
    meta = checkpoint.get('meta')
    if isinstance(meta, dict) and 'hook_msgs' in meta:
        raise CheckpointError(
            'the checkpoint was written by mmcv 1.x, which mmengine cannot '
            'resume; use load_from without resume to start from its weights.'
        )


def strip_wrapper(
    checkpoint: MutableMapping[str, Any], model: nn.Module
) -> None:
    """Name the weights as the model does, in place.

    ``DDPStrategy`` writes the names of its wrapper, ``module.<name>``.

    Args:
        checkpoint: The checkpoint, about to be written.
        model: The model, unwrapped.
    """
    weights = checkpoint['state_dict']
    names = set(model.state_dict())
    if names.issuperset(weights):
        return
    prefix = 'module.'
    for name in list(weights):
        short = name[len(prefix) :] if name.startswith(prefix) else name
        weights[short if short in names else name] = weights.pop(name)


def unmake(checkpoint: MutableMapping[str, Any]) -> None:
    """Make a checkpoint again what mmengine expects, in place.

    Args:
        checkpoint: The checkpoint, just read.
    """
    for key in list(checkpoint):
        if key not in _WEIGHTS:
            checkpoint[key] = from_plain(checkpoint[key], CODECS)


def _encode_history(history: HistoryBuffer) -> Dict[str, Any]:
    values, counts = history.data
    return {
        'values': torch.from_numpy(values.copy()),
        'counts': torch.from_numpy(counts.copy()),
        'max_length': history.max_length,
    }


def _decode_history(plain: Dict[str, Any]) -> HistoryBuffer:
    values, counts = plain['values'].cpu(), plain['counts'].cpu()
    return HistoryBuffer(values.numpy(), counts.numpy(), plain['max_length'])


def _encode_array(array: Any) -> Dict[str, Any]:
    if array.dtype.kind in 'biufc':
        return {'tensor': torch.from_numpy(np.ascontiguousarray(array))}
    return {'list': array.tolist()}


def _decode_array(plain: Dict[str, Any]) -> Any:
    if 'list' in plain:
        return np.array(plain['list'])
    return plain['tensor'].cpu().numpy()


CODECS: List[Codec] = [
    Codec(HistoryBuffer, _encode_history, _decode_history),
    Codec(np.ndarray, _encode_array, _decode_array),
    Codec(ConfigDict, lambda c: {'dict': c.to_dict()}, lambda p: p['dict']),
]
