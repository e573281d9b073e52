"""Ctrl-C, kept waiting while tensors and counters do not agree."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import Any, Iterator, List, Tuple


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back until the body is done, then let it through.

    A swap that stops half-way would leave some raw weights in the model and
    some among the averages; an update, averages of a step without its
    buffers. Only the main thread receives interrupts.
    """
    previous = signal.getsignal(signal.SIGINT)
    here = threading.current_thread() is threading.main_thread()
    if not here or not callable(previous):
        yield
        return
    held: List[Tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *received: held.append(received))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            previous(*held[0])
