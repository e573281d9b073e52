"""Run something at the end of a loop, however the loop ends."""

from __future__ import annotations

import functools
from typing import Any, Callable, Optional

_MARK = '_mmdet_ema_guard'


def guard_loop(
    loop: Any,
    leave: Callable[[], None],
    around: Optional[Callable[[Callable[[], Any]], Any]] = None,
) -> None:
    """Make ``loop.run()`` call ``leave`` when it returns or raises.

    A framework's evaluation loop has no ``finally``: without this, an
    exception in it, or Ctrl-C, would leave averages in the model.

    Args:
        loop: A loop object; its ``run`` is wrapped once.
        leave: Called at the end of every run.
        around: Called instead of the loop's own ``run``, which it is given.
    """
    run = loop.run
    if getattr(run, _MARK, False):
        return

    @functools.wraps(run)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        once = functools.partial(run, *args, **kwargs)
        try:
            return around(once) if around is not None else once()
        finally:
            leave()

    setattr(guarded, _MARK, True)
    loop.run = guarded
