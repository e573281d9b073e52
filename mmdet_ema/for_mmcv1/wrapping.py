"""Put something around a method of one object, once."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any, Callable

_MARK = '_mmdet_ema_wrapped'


def wrap_once(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by ``around(method, *args, **kwargs)``.

    It stays a bound method, with the signature that it has.

    Args:
        owner: An object.
        name: Name of the method. Wrapping it again does nothing.
        around: Called instead, with the method before its arguments.
    """
    method = getattr(owner, name)
    if getattr(method, _MARK, False):
        return
    bound = inspect.ismethod(method)

    @functools.wraps(method.__func__ if bound else method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args[bound:], **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(
        owner, name, types.MethodType(wrapped, owner) if bound else wrapped
    )
