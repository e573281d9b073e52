"""Run something at the end of a loop, however the loop ends."""

from __future__ import annotations

import functools
from typing import Any, Callable

_MARK = '_mmdet_ema_guard'


def guard_loop(loop: Any, leave: Callable[[], None]) -> None:
    """Make ``loop.run()`` call ``leave`` when it returns or raises.

    A framework's evaluation loop has no ``finally``: without this, an
    exception in it, or Ctrl-C, would leave averages in the model.

    Args:
        loop: A loop object; its ``run`` is wrapped once.
        leave: Called at the end of every run.
    """
    run = loop.run
    if getattr(run, _MARK, False):
        return

    @functools.wraps(run)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        finally:
            leave()

    setattr(guarded, _MARK, True)
    loop.run = guarded
