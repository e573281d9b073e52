"""Plain values: what ``torch.load(weights_only=True)`` reads anywhere.

A framework puts NumPy scalars, arrays and objects of its own into its files.
:func:`to_plain` turns them into tensors and Python values under a tag, and
:func:`from_plain` turns these back into what they were.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Callable, Dict, List, NamedTuple, Type

import torch

TAG = '__mmdet_ema_type__'

_CONTAINERS = (dict, OrderedDict, list, tuple, set, torch.Size)
_LEAVES = (
    *(bool, int, float, complex, str, bytes, type(None)),
    *(torch.Tensor, torch.nn.Parameter, torch.device, torch.dtype),
)


class Codec(NamedTuple):
    """How a type is stored, without its subclasses: as a dict of values."""

    type: Type[Any]
    encode: Callable[[Any], Dict[str, Any]]
    decode: Callable[[Dict[str, Any]], Any]


def to_plain(value: Any, codecs: List[Codec]) -> Any:
    """Return a value with everything in it made plain.

    Dicts, lists and tuples are rebuilt (dicts keep their order and their
    ``_metadata``), types with a codec are tagged, NumPy scalars become Python
    numbers. What is left stays as it is.
    """
    for codec in codecs:
        if type(value) is codec.type:
            inner = to_plain(codec.encode(value), codecs)
            return {TAG: _name(codec.type), **inner}
    # whoever imports this need not have NumPy
    if 'numpy.generic' in map(_name, type(value).__mro__):
        number = value.item()
        # Python has no long double
        return float(number) if type(number) is type(value) else number
    return _rebuild(value, to_plain, codecs)


def from_plain(value: Any, codecs: List[Codec]) -> Any:
    """Return what :func:`to_plain` with the same codecs made plain."""
    if isinstance(value, dict) and TAG in value:
        for codec in codecs:
            if value[TAG] == _name(codec.type):
                inner = {k: v for k, v in value.items() if k != TAG}
                return codec.decode(from_plain(inner, codecs))
    return _rebuild(value, from_plain, codecs)


def foreign(value: Any) -> List[str]:
    """Return the types in a value that are not plain, each once, in order."""
    kind = type(value)
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = [*value]
    else:
        return [] if kind in _LEAVES else [_name(kind)]
    own = [] if kind in _CONTAINERS else [_name(kind)]
    return list(dict.fromkeys(own + [n for x in parts for n in foreign(x)]))


def _rebuild(value: Any, convert: Any, codecs: List[Codec]) -> Any:
    if isinstance(value, dict):
        pairs = value.items()
        items = [(convert(k, codecs), convert(v, codecs)) for k, v in pairs]
        if not isinstance(value, OrderedDict):
            return dict(items)
        ordered = OrderedDict(items)
        ordered.__dict__.update(value.__dict__)
        return ordered
    if type(value) in (list, tuple, set):
        return type(value)(convert(item, codecs) for item in value)
    return value


def _name(kind: Type[Any]) -> str:
    return f'{kind.__module__}.{kind.__qualname__}'
