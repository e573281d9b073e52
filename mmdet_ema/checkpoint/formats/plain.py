"""One set of weights: a ``state_dict``, alone or beside other things."""

from __future__ import annotations

from typing import Any, Optional

from mmdet_ema.checkpoint.contents import (
    AVERAGE,
    RAW,
    UNKNOWN,
    Contents,
    weights_of,
)
from mmdet_ema.checkpoint.format import WEIGHTS
from mmdet_ema.checkpoint.formats.base import (
    Content,
    Format,
    Written,
    is_weights,
    meta_of,
    rest_of,
    state_dict,
)
from mmdet_ema.checkpoint.recipe import KEY

_PLACES = (WEIGHTS, 'model', 'model_state_dict', 'network', 'weights')


def _place(content: Content) -> Optional[str]:
    found = [key for key in _PLACES if is_weights(content.get(key))]
    return found[0] if found else None


def _recognise(content: Content, path: str) -> bool:
    return _place(content) is not None or is_weights(content)


def _read(content: Content, path: str) -> Contents:
    place = _place(content)
    half = content if place is None else content[place]
    meta = meta_of(content)
    name, role, said = 'weights', UNKNOWN, 'the file does not tell'
    made: Any = meta.get(KEY)
    made = made.get('holds') if isinstance(made, dict) else None
    if isinstance(made, dict) and made.get('role') in (RAW, AVERAGE):
        role, said = made['role'], 'its recipe says so'
        name = str(made.get('name', name))
    weights = weights_of(half, what=place or 'the file', role=role)
    weights.evidence = said
    if role == AVERAGE and isinstance(made.get('updates'), int):
        weights.updates = made['updates']
    rest = rest_of(content, place, 'meta') if place else {}
    what = 'mmdet_ema' if role != UNKNOWN else 'unknown'
    return Contents(path, FORMAT.name, what, {name: weights}, name, meta, rest)


def _write(contents: Contents, out: str) -> Written:
    weights = contents.sets[contents.choose()]
    return {'meta': dict(contents.meta), WEIGHTS: state_dict(weights)}, []


FORMAT = Format(
    'plain',
    'one state_dict, of any project',
    _recognise,
    _read,
    _write,
    holds='one',
    has_n=None,  # n and the role are in the recipe
    has_schedule=True,
)
