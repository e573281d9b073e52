"""Ctrl-C, kept waiting while tensors and counters do not agree."""

from __future__ import annotations

# what ``signal`` wraps, without its enums: they would take a tenth of an
# update of a small model
import _signal as signals  # type: ignore[import-not-found]
import threading
from types import TracebackType
from typing import Any, List, Optional, Tuple, Type


class DeferredInterrupts:
    """Holds Ctrl-C back until the body is done, then lets it through.

    A swap that stops half-way would leave some raw weights in the model and
    some among the averages; an update, averages of a step without its
    buffers. Only the main thread receives interrupts.
    """

    __slots__ = ('_held', '_previous')

    def __enter__(self) -> None:
        """Take the place of the handler, where there is one."""
        self._held: List[Tuple[Any, ...]] = []
        self._previous: Any = signals.getsignal(signals.SIGINT)
        here = threading.current_thread() is threading.main_thread()
        if here and callable(self._previous):
            signals.signal(signals.SIGINT, self._hold)
        else:
            self._previous = None

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        """Put the handler back, and call it if it was asked for."""
        if self._previous is None:
            return
        signals.signal(signals.SIGINT, self._previous)
        if self._held:
            self._previous(*self._held[0])

    def _hold(self, *received: Any) -> None:
        self._held.append(received)
