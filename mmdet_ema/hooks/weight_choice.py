"""Which weights of a checkpoint go where when it is loaded.

A checkpoint with an EMA part holds two sets of weights, and the framework
loads one, ``state_dict``. Each function here prepares a checkpoint for one
purpose, in place, before the framework loads it.
"""

from __future__ import annotations

from typing import Any, Mapping, MutableMapping, Optional

import torch
from torch import nn

from mmdet_ema.checkpoint.layout import EMAPart, put_raw, unpack
from mmdet_ema.core.errors import CheckpointError
from mmdet_ema.core.fit import check_fit

Checkpoint = MutableMapping[str, Any]

_SETS = {
    'ema': 'the averages',
    'raw': 'the raw weights',
    'both': 'the averages and the raw weights',
}


def for_resume(
    checkpoint: Checkpoint, model: nn.Module, strict: bool, log: Any
) -> Optional[EMAPart]:
    """Prepare a checkpoint that training resumes from: raw weights load.

    Args:
        checkpoint: The checkpoint, changed in place.
        model: The model, unwrapped; only its shapes are looked at.
        strict: Whether all names must be the same.
        log: Where lines go.

    Returns:
        The EMA part to go on from; None to start from the loaded weights.

    Raises:
        CheckpointError: If the EMA part does not fit the model, or with
            ``strict`` if there is none.
    """
    part = unpack(checkpoint)
    if part is None:
        if strict:
            raise CheckpointError(
                'strict_load=True, but the checkpoint has no EMA part. With '
                'strict_load=False the average starts from its weights.'
            )
        log.warning(
            'EMA: the checkpoint has no EMA part; the average starts from '
            'its weights.'
        )
        return None
    _check_fits(part, model, strict, log)
    put_raw(checkpoint, part)
    begun = part.steps > 0 or 'num_steps' in part.meta
    return part if begun else None


def for_fine_tuning(checkpoint: Checkpoint, log: Any) -> None:
    """Note what a fresh training starts from; ``state_dict`` loads as it is.

    Args:
        checkpoint: The checkpoint.
        log: Where lines go.
    """
    part = _if_readable(checkpoint, log)
    origin = 'weights' if part is None else f'averages ({part.steps} steps)'
    log.info(
        f'EMA: the average starts anew (n = 0), from the {origin} of the '
        f'checkpoint.'
    )


def for_evaluation(
    checkpoint: Checkpoint, model: nn.Module, evaluate: str, log: Any
) -> Optional[EMAPart]:
    """Prepare a checkpoint that is only evaluated.

    Args:
        checkpoint: The checkpoint, changed in place.
        model: The model, unwrapped; only its shapes are looked at.
        evaluate: 'ema', 'raw' or 'both'.
        log: Where lines go.

    Returns:
        The EMA part if both sets will be evaluated: then the raw weights
        load, and the averages are put in for the evaluation.

    Raises:
        CheckpointError: If raw weights are asked for and there are none.
    """
    needed = evaluate != 'ema'
    part = unpack(checkpoint) if needed else _if_readable(checkpoint, log)
    if part is None:
        _check_single(evaluate, log)
        return None
    log.info(f'EMA: evaluating {_SETS[evaluate]} (n={part.steps}).')
    if needed:
        put_raw(checkpoint, part)
    if evaluate != 'both':
        return None
    _check_fits(part, model, False, log)
    return part


def _if_readable(checkpoint: Checkpoint, log: Any) -> Optional[EMAPart]:
    """Return the EMA part where ``state_dict`` is all that is needed."""
    try:
        return unpack(checkpoint)
    except CheckpointError as error:
        log.warning(f'EMA: the EMA part is left out: {error}')
        return None


def _check_single(evaluate: str, log: Any) -> None:
    if evaluate != 'ema':
        raise CheckpointError(
            f'evaluate={evaluate!r} needs raw weights, but the checkpoint '
            f'holds one set of weights and no EMA part; use '
            f"evaluate='ema' to evaluate what it holds."
        )
    log.info('EMA: the checkpoint has no EMA part; evaluating its weights.')


def _check_fits(
    part: EMAPart, model: nn.Module, strict: bool, log: Any
) -> None:
    state = model.state_dict().items()
    shapes = {k: v for k, v in state if isinstance(v, torch.Tensor)}
    try:
        for half in (part.averages, part.raws):
            _check_kinds(shapes, half)
            check_fit(shapes, part.tensors(half), strict)
    except CheckpointError as error:
        raise CheckpointError(
            f'the EMA part of the checkpoint does not fit: {error} To start '
            f'a new training from this file, use load_from without resume.'
        ) from None
    missing = [name for name in shapes if name not in part.averages]
    if shapes and len(missing) == len(shapes):
        raise CheckpointError(
            'no tensor of the model is in the EMA part of the checkpoint; it '
            'belongs to another model.'
        )
    if missing:
        log.warning(
            f'EMA: {len(missing)} tensors of the model are not in the '
            f'checkpoint ({", ".join(missing[:3])}); their average starts '
            f'from the weights that they have.'
        )


def _check_kinds(shapes: Mapping[str, Any], half: Mapping[str, Any]) -> None:
    """Check that tensors are tensors, and floats floats."""
    for name, present in shapes.items():
        value = half.get(name, present)
        kind = getattr(value, 'dtype', None)
        if kind is None or (
            kind.is_floating_point != present.dtype.is_floating_point
        ):
            raise CheckpointError(
                f'{name} is {type(value).__name__} of {kind}, the model has '
                f'{present.dtype} there; the file is damaged, or belongs to '
                f'another model.'
            )
