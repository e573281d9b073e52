"""Checkpoints of mmengine that ``torch.load(weights_only=True)`` reads.

mmengine puts its ``HistoryBuffer`` and NumPy scalars into every file; torch
from 2.6 on refuses to read them in a process that has not allow-listed them.
"""

from __future__ import annotations

from typing import Any, Dict, MutableMapping

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub
from torch import nn

from mmdet_ema.checkpoint.format import check_names, plain_name
from mmdet_ema.checkpoint.weights_only import (
    Codec,
    foreign,
    from_plain,
    to_plain,
)
from mmdet_ema.errors import CheckpointError

_WEIGHTS = ('state_dict', 'ema_state_dict')
_DAMAGED = 'the file is damaged. Take another checkpoint.'


def make_plain(checkpoint: MutableMapping[str, Any], log: Any) -> None:
    """Make everything in a checkpoint plain; warn of what cannot be so."""
    meta = checkpoint.get('meta', {})
    data_set = to_plain(meta.get('dataset_meta'), [])
    for key in list(checkpoint):
        if key not in _WEIGHTS:
            checkpoint[key] = to_plain(checkpoint[key], CODECS)
    if 'dataset_meta' in meta:
        # tools read it without our hook, and need what the data set gave
        checkpoint['meta']['dataset_meta'] = data_set
    left = foreign(dict(checkpoint))
    if left:
        log.warning(
            f'EMA: the checkpoint holds {", ".join(left)}; to read it with '
            f'weights_only=True, import mmdet_ema or allow-list these types '
            f'(torch.serialization.add_safe_globals).'
        )


def refuse_foreign(checkpoint: MutableMapping[str, Any], log: Any) -> None:
    """Refuse to resume from what mmengine's runner did not write.

    Raises:
        CheckpointError: If mmcv's runner wrote it, or it is damaged;
            mmengine would stop later, with the weights loaded.
    """
    meta = checkpoint.get('meta')
    if isinstance(meta, dict) and 'hook_msgs' in meta:
        raise CheckpointError(
            'the checkpoint was written by mmcv 1.x, which mmengine cannot '
            'resume; use load_from without resume to start from its weights.'
        )
    if isinstance(meta, dict) and meta.pop('config', None) is not None:
        log.warning(
            "EMA: meta['config'] of the checkpoint is left out; mmengine "
            'writes none, and would run it as a program.'
        )
    hub: Any = checkpoint.get('message_hub')
    if not isinstance(hub, MessageHub):
        check_names(hub, "'message_hub'")
        for key in ('log_scalars', 'runtime_info', 'resumed_keys'):
            check_names(hub.get(key), f"{key!r} in 'message_hub'")
        resumed = hub['resumed_keys'].values()
        if not all(isinstance(value, bool) for value in resumed):
            raise CheckpointError(
                f"'resumed_keys' in 'message_hub' of the checkpoint are not "
                f'true or false; {_DAMAGED}'
            )
    schedulers = checkpoint.get('param_schedulers', [])
    several = isinstance(schedulers, dict)
    for found in schedulers.values() if several else [schedulers]:
        if not isinstance(found, list) or not all(
            isinstance(x, dict) for x in found
        ):
            raise CheckpointError(
                f"'param_schedulers' of the checkpoint is no list of states; "
                f'{_DAMAGED}'
            )


def strip_wrapper(
    checkpoint: MutableMapping[str, Any], model: nn.Module
) -> None:
    """Name the weights as the unwrapped model does, in place.

    ``DDPStrategy`` writes the names of its wrapper, ``module.<name>``.
    """
    weights = checkpoint['state_dict']
    names = model.state_dict()
    if names.keys() >= weights.keys():
        return
    for name in list(weights):
        weights[plain_name(name, names)] = weights.pop(name)


def unmake(checkpoint: MutableMapping[str, Any]) -> None:
    """Make a checkpoint again what mmengine expects, in place.

    Raises:
        CheckpointError: If something in it is damaged.
    """
    for key in list(checkpoint):
        if key not in _WEIGHTS:
            try:
                checkpoint[key] = from_plain(checkpoint[key], CODECS)
            except Exception as error:  # damaged values can raise anything
                raise CheckpointError(
                    f'{key!r} of the checkpoint is damaged '
                    f'({type(error).__name__}). Take another checkpoint.'
                ) from None


def _encode_history(history: HistoryBuffer) -> Dict[str, Any]:
    values, counts = (torch.from_numpy(x.copy()) for x in history.data)
    length = history.max_length
    return {'values': values, 'counts': counts, 'max_length': length}


def _decode_history(plain: Dict[str, Any]) -> HistoryBuffer:
    values, counts = (plain[k].cpu().numpy() for k in ('values', 'counts'))
    return HistoryBuffer(values, counts, plain['max_length'])


def _encode_array(array: Any) -> Dict[str, Any]:
    if array.dtype.kind in 'biufc':
        return {'tensor': torch.from_numpy(np.ascontiguousarray(array))}
    return {'list': array.tolist()}


def _decode_array(plain: Dict[str, Any]) -> Any:
    if 'list' in plain:
        return np.array(plain['list'])
    return plain['tensor'].cpu().numpy()


CODECS = [
    Codec(HistoryBuffer, _encode_history, _decode_history),
    Codec(np.ndarray, _encode_array, _decode_array),
    Codec(ConfigDict, lambda c: {'dict': c.to_dict()}, lambda p: p['dict']),
]
