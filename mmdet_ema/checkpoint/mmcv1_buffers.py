"""Files of mmcv's own EMA hook, and of mmdet 2's two.

They keep root buffers ``ema_a_b_c`` beside a parameter ``a.b.c`` (mmdet's,
beside buffers too), in one flat ``state_dict``.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import (
    Any,
    Dict,
    List,
    Mapping,
    MutableMapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch

from mmdet_ema.checkpoint.format import EMA, PREFIX, STEPS, WEIGHTS
from mmdet_ema.checkpoint.mmcv1_roles import Roles, find_roles

_BUFFER = 'ema_'

Checkpoint = MutableMapping[str, Any]
Weights = Mapping[str, Any]
Halves = Tuple[Dict[str, Any], Dict[str, Any]]


class Converted(NamedTuple):
    """What was found in a file of another hook.

    Attributes:
        line: What it is, and what was assumed.
        warning: What cannot be known of it; empty if all is.
    """

    line: str
    warning: str


def convert_buffers(
    checkpoint: Checkpoint,
    tied: Sequence[Sequence[str]] = (),
    filename: str = '',
) -> Optional[Converted]:
    """Turn the ``ema_*`` buffers of mmcv's or mmdet's hook into an EMA part.

    Args:
        checkpoint: What was read from a file, changed in place.
        tied: Names that share one tensor in the model, group by group.
        filename: Name of the file, which says what wrote it.

    Returns:
        What was found and assumed; None if there are no such buffers, and
        then nothing is changed.
    """
    weights = checkpoint.get(WEIGHTS)
    if not isinstance(weights, Mapping):
        return None
    groups = _groups(weights)
    if not groups:
        return None
    meta = checkpoint.get('meta') or {}
    pairs = _pairs(weights, groups, tied)
    both = {name: (weights[name], value) for name, value in pairs.items()}
    roles = find_roles(both, meta, filename)
    sort_out = _swapped if roles.plain_is_average else _unswapped
    averages, raws = sort_out(weights, groups, pairs)
    _write(checkpoint, averages, raws, meta.get('iter', 0))
    return _describe(roles, meta.get('iter', 0), groups)


def _groups(weights: Weights) -> Dict[str, List[str]]:
    """Return which names share which buffer; more than one is a collision."""
    maybe = {k for k in weights if k.startswith(_BUFFER) and '.' not in k}
    groups: Dict[str, List[str]] = {}
    for name in weights:
        buffer = _buffer_of(name)
        mine = name not in maybe and buffer in maybe
        if mine and _fits(weights[buffer], weights[name]):
            groups.setdefault(buffer, []).append(name)
    return groups


def _pairs(
    weights: Weights,
    groups: Mapping[str, List[str]],
    tied: Sequence[Sequence[str]],
) -> Dict[str, Any]:
    """Return the buffer of every name that has one of its own.

    Of tied names the hooks swap each one; the first buffer holds what was
    swapped out of the tensor.
    """
    first = {name: names[0] for names in tied for name in names}
    own = {n[0]: weights[b] for b, n in groups.items() if len(n) == 1}
    pairs = {}
    for name in weights:
        leader = first.get(name, name)
        if leader in own:
            pairs[name] = own[leader]
    return pairs


def _swapped(
    weights: Weights,
    groups: Mapping[str, List[str]],
    pairs: Mapping[str, Any],
) -> Halves:
    """Return averages and raw weights of a file that was saved swapped.

    Names that collide were swapped through one buffer, one after the other:
    each holds the raw weights of the one before, the buffer the last one's.
    """
    plain = {k: v for k, v in weights.items() if k not in groups}
    raws = {k: pairs.get(k, v) for k, v in plain.items()}
    for buffer, names in groups.items():
        if len(names) > 1:
            rotated = [*(weights[n] for n in names[1:]), weights[buffer]]
            raws.update(zip(names, rotated))
    averages = {
        k: v if k in pairs and _is_float(v) else raws[k]
        for k, v in plain.items()
    }
    return averages, raws


def _unswapped(
    weights: Weights,
    groups: Mapping[str, List[str]],
    pairs: Mapping[str, Any],
) -> Halves:
    """Return averages and raw weights of a file that was saved unswapped."""
    raws = {k: v for k, v in weights.items() if k not in groups}
    averages = {
        k: pairs[k] if k in pairs and _is_float(v) else v
        for k, v in raws.items()
    }
    return averages, raws


def _write(
    checkpoint: Checkpoint,
    averages: Mapping[str, Any],
    raws: Mapping[str, Any],
    steps: int,
) -> None:
    state: Dict[str, Any] = OrderedDict(averages)
    if hasattr(checkpoint[WEIGHTS], '_metadata'):
        state._metadata = checkpoint[WEIGHTS]._metadata  # type: ignore[attr-defined]
    checkpoint[WEIGHTS] = state
    named = {PREFIX + name: value for name, value in raws.items()}
    checkpoint[EMA] = OrderedDict({STEPS: torch.tensor(steps), **named})


def _describe(
    roles: Roles, steps: int, groups: Mapping[str, List[str]]
) -> Converted:
    plain = 'the averages' if roles.plain_is_average else 'the raw weights'
    line = (
        f"EMA: the checkpoint was written by mmcv's or mmdet's own EMA hook "
        f'(n={steps}); its plain keys are taken as {plain}, because '
        f'{roles.reason}.'
    )
    several = [names for names in groups.values() if len(names) > 1]
    if not several:
        return Converted(line, '')
    collided = ', '.join(name for names in several for name in names)
    return Converted(
        line,
        f'EMA: that hook kept one average for several of these tensors, whose '
        f'names differ in "." and "_" only: {collided}. It averaged none of '
        f'them; their average starts from the raw weights.',
    )


def _buffer_of(name: str) -> str:
    return _BUFFER + name.replace('.', '_')


def _fits(buffer: Any, value: Any) -> bool:
    shape = getattr(buffer, 'shape', None)
    return shape is not None and shape == getattr(value, 'shape', None)


def _is_float(value: Any) -> bool:
    return bool(value.is_floating_point())
