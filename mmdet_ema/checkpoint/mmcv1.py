"""The EMA part in checkpoints of mmcv 1.x.

It is in ``meta['hook_msgs']``, where mmcv keeps what hooks want to find
again; here it is moved to and from the layout of
:mod:`mmdet_ema.checkpoint.format`.
"""

from __future__ import annotations

from typing import Any, Iterable, Mapping, MutableMapping

from mmdet_ema.checkpoint.format import (
    EMA,
    META,
    PREFIX,
    WEIGHTS,
    check_names,
)

MESSAGE = 'EMAHook'
ITERATION = 'iteration'

Checkpoint = MutableMapping[str, Any]


def put_message(
    messages: MutableMapping[str, Any], checkpoint: Checkpoint
) -> None:
    """Move the EMA part of a checkpoint among the hooks' messages.

    Args:
        messages: ``meta['hook_msgs']`` of the file that will be written.
        checkpoint: A checkpoint with an EMA part, which it loses.
    """
    part = {key: checkpoint.pop(key) for key in (EMA, META)}
    messages[MESSAGE] = part


def take_message(checkpoint: Checkpoint) -> None:
    """Move the EMA part back to the top of a checkpoint, if it has one.

    Args:
        checkpoint: What was read from a file of mmcv, changed in place.

    Raises:
        CheckpointError: If there is something else where it belongs.
    """
    meta = checkpoint.get('meta')
    messages = meta.get('hook_msgs', {}) if isinstance(meta, dict) else {}
    check_names(messages, "'hook_msgs' in the meta")
    part = messages.pop(MESSAGE, {})
    check_names(part, f"{MESSAGE!r} in 'hook_msgs'")
    checkpoint.update({k: part[k] for k in (EMA, META) if k in part})


def put_iteration(checkpoint: Checkpoint, iteration: int) -> None:
    """Note the iterations that are done; mmcv's ``iter`` may be one less.

    Args:
        checkpoint: A checkpoint with an EMA part, changed in place.
        iteration: Iterations done.
    """
    checkpoint[META][ITERATION] = iteration


def iteration_of(checkpoint: Checkpoint) -> int:
    """Return the iterations done, 0 if the checkpoint does not tell.

    Args:
        checkpoint: A checkpoint.
    """
    meta = checkpoint.get(META)
    found = meta.get(ITERATION) if isinstance(meta, Mapping) else None
    return found if isinstance(found, int) and found > 0 else 0


def drop(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Drop names from both halves of an EMA part.

    mmcv saves buffers that the model itself neither saves nor loads.

    Args:
        checkpoint: A checkpoint, changed in place if it has an EMA part.
        names: The names.
    """
    halves = (checkpoint.get(WEIGHTS), checkpoint.get(EMA))
    if all(isinstance(half, dict) for half in halves):
        for name in names:
            checkpoint[WEIGHTS].pop(name, None)
            checkpoint[EMA].pop(PREFIX + name, None)
