"""Put something around a method, once."""

from __future__ import annotations

import functools
from typing import Any, Callable

_MARK = '_mmdet_ema_wrapped'


def wrap_once(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by ``around(method, *args, **kwargs)``.

    Args:
        owner: An object, or a class; then ``method`` takes ``self`` first.
        name: Name of the method. Wrapping it again does nothing.
        around: Called in its place, with the method before its arguments.
    """
    method = getattr(owner, name)
    if getattr(method, _MARK, False):
        return

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)
