"""Notice the steps that an optimizer really took."""

from __future__ import annotations

import functools
from typing import Any, Callable, List, Sequence

from torch.optim import Optimizer


class _Unwrap:
    """Puts back the ``step`` of an optimizer."""

    def __init__(self, optimizer: Any, step: Any):
        self._optimizer, self._step = optimizer, step

    def remove(self) -> None:
        self._optimizer.step = self._step


class StepCounter:
    """Listens to optimizers; knows whether any of them stepped.

    Gradient accumulation and a gradient scaler that skips do not call
    ``step()``. A fused optimizer is called by the scaler all the same, with
    ``found_inf`` set: that call does not count either.

    Args:
        optimizers: The optimizers of the run.
        before_step: Called just before a step may change the weights.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], before_step: Callable[[], None]
    ):
        self._stepped = False
        self._before_step = before_step
        self._handles: List[Any] = []
        for optimizer in optimizers:
            if hasattr(optimizer, '_optimizer_step_post_hooks'):
                self._handles += [
                    optimizer.register_step_pre_hook(self._on_pre_step),
                    optimizer.register_step_post_hook(self._on_post_step),
                ]
            else:
                self._handles.append(self._wrap(optimizer))

    def take(self) -> bool:
        """Return whether there was a step since the last call."""
        stepped, self._stepped = self._stepped, False
        return stepped

    def detach(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _wrap(self, optimizer: Any) -> _Unwrap:
        """Listen to an optimizer that never called torch's constructor."""
        step = optimizer.step

        @functools.wraps(step)
        def listened(*args: Any, **kwargs: Any) -> Any:
            self._on_pre_step(optimizer, args, kwargs)
            result = step(*args, **kwargs)
            self._on_post_step(optimizer, args, kwargs)
            return result

        optimizer.step = listened
        return _Unwrap(optimizer, step)

    def _on_pre_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._before_step()

    def _on_post_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, 'found_inf', None)
        if found_inf is None or not bool(found_inf):
            self._stepped = True
