"""What both generations change on the objects of a run: how it saves."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import types
from typing import Any, Callable, Iterable, Iterator, Optional

from mmdet_ema.checkpoint.files import write_whole
from mmdet_ema.checkpoint.folder import RemovesLater, newer_best

_MARK = '_mmdet_ema_wrapped'


def wrap_once(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by ``around(method, *args, **kwargs)``.

    It stays a bound method, with the signature that it has. Wrapping it again
    does nothing.
    """
    method = getattr(owner, name)
    if getattr(method, _MARK, False):
        return
    bound = inspect.ismethod(method)

    @functools.wraps(method.__func__ if bound else method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args[bound:], **kwargs)

    setattr(wrapped, _MARK, True)
    new = types.MethodType(wrapped, owner) if bound else wrapped
    setattr(owner, name, new)


@contextlib.contextmanager
def replacing(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let an object have another attribute in the body."""
    was_own, before = name in vars(owner), getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def remove_later(hooks: Iterable[Any], backend: str) -> None:
    """Let hooks remove old files when the next one is written."""
    for hook in hooks:
        found = getattr(hook, backend, None)
        if found and not isinstance(found, RemovesLater):
            setattr(hook, backend, RemovesLater(found))


@contextlib.contextmanager
def moving_into_place(
    kind: Any, hooks: Iterable[Any], backend: str
) -> Iterator[None]:
    """Let backends of a kind write whole files here; old ones go then."""

    def put(self: Any, content: bytes, path: Any) -> None:
        write_whole(str(path), content)

    with replacing(kind, 'put', put):
        yield
    for hook in hooks:
        found = getattr(hook, backend, None)
        if isinstance(found, RemovesLater):
            found.finish()


def take_newer_best(
    runner: Any, folder: str, known: Optional[str], told: Any, log: Any
) -> Any:
    """Let a best file that the resumed one does not know replace its own.

    Returns its path and its score, None if there is none.
    """
    newer = newer_best(folder, known, runner.iter, told)
    if newer is not None:
        log.info(
            f'EMA: {newer[0]} (score {newer[1]:.4f}) was written after the '
            f'file that is resumed: it is the best one.'
        )
        if known and runner.rank == 0 and os.path.isfile(known):
            os.unlink(known)
    return newer
