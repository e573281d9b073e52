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


class Codec(NamedTuple):
    """How one type is stored.

    Attributes:
        type: The type; instances of subclasses are not included.
        encode: From an instance to plain values under string keys.
        decode: The way back.
    """

    type: Type[Any]
    encode: Callable[[Any], Dict[str, Any]]
    decode: Callable[[Dict[str, Any]], Any]

    @property
    def tag(self) -> str:
        """Name under which it is stored."""
        return f'{self.type.__module__}.{self.type.__qualname__}'


def to_plain(value: Any, codecs: List[Codec]) -> Any:
    """Return a value with everything in it made plain.

    Dicts, lists and tuples are rebuilt (dicts keep their order and their
    ``_metadata``), types with a codec are tagged, NumPy scalars become Python
    numbers. What is left stays as it is.

    Args:
        value: Any nesting of containers.
        codecs: Types to be tagged.

    Returns:
        The plain value.
    """
    for codec in codecs:
        if type(value) is codec.type:
            inner = to_plain(codec.encode(value), codecs)
            return {TAG: codec.tag, **inner}
    if _is_numpy_scalar(value):
        return _python_number(value)
    return _rebuild(value, lambda item: to_plain(item, codecs))


def from_plain(value: Any, codecs: List[Codec]) -> Any:
    """Return a value with everything tagged made again what it was.

    Args:
        value: What :func:`to_plain` returned.
        codecs: The same types.

    Returns:
        The value.
    """
    if isinstance(value, dict) and TAG in value:
        for codec in codecs:
            if value[TAG] == codec.tag:
                inner = {k: v for k, v in value.items() if k != TAG}
                return codec.decode(from_plain(inner, codecs))
    return _rebuild(value, lambda item: from_plain(item, codecs))


def foreign(value: Any) -> List[str]:
    """Return the names of the types in a value that are not plain.

    Args:
        value: Any nesting of containers.

    Returns:
        Qualified type names, each once, in order.
    """
    if isinstance(value, dict):
        parts = list(value) + list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    else:
        return [] if _is_plain_leaf(value) else [_name(type(value))]
    own = [] if _is_plain_container(value) else [_name(type(value))]
    return list(dict.fromkeys(own + [n for p in parts for n in foreign(p)]))


def _rebuild(value: Any, convert: Callable[[Any], Any]) -> Any:
    if isinstance(value, OrderedDict):
        new = OrderedDict((convert(k), convert(v)) for k, v in value.items())
        new.__dict__.update(value.__dict__)
        return new
    if isinstance(value, dict):
        return {convert(k): convert(v) for k, v in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(convert(item) for item in value)
    return value


def _is_plain_leaf(value: Any) -> bool:
    plain = (bool, int, float, complex, str, bytes, type(None), torch.dtype)
    tensors = (torch.Tensor, torch.nn.Parameter, torch.Size, torch.device)
    return type(value) in plain or type(value) in tensors


def _is_plain_container(value: Any) -> bool:
    return type(value) in (dict, OrderedDict, list, tuple, set, torch.Size)


def _is_numpy_scalar(value: Any) -> bool:
    kind = type(value)
    return (
        kind.__module__ == 'numpy'
        and hasattr(kind, 'item')
        and (
            getattr(value, 'shape', None) == ()
            and not hasattr(value, 'fill_')
            and kind.__name__ != 'ndarray'
        )
    )


def _python_number(value: Any) -> Any:
    number = value.item()
    return float(number) if type(number) is type(value) else number


def _name(kind: Type[Any]) -> str:
    return f'{kind.__module__}.{kind.__qualname__}'
