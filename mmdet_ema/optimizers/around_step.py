"""Call something right before and right after every optimizer step."""

from __future__ import annotations

import functools
import types
from typing import Any, Callable, List

from torch.optim import Optimizer


class AroundStep:
    """Listens to the steps of an optimizer.

    Steps that a gradient scaler skips and iterations that only accumulate
    gradients are no steps.

    Args:
        optimizer: The optimizer.
        before: Called before a step.
        after: Called after a step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[], None],
        after: Callable[[], None],
    ):
        self._before, self._after = before, after
        self._active = True
        self._handles: List[Any] = []
        if hasattr(optimizer, '_optimizer_step_post_hooks'):
            self._handles += [
                optimizer.register_step_pre_hook(self._on_before),
                optimizer.register_step_post_hook(self._on_after),
            ]
        else:
            self._wrap(optimizer)

    def pause(self) -> None:
        """Call nothing any more; may be called in a step, too."""
        self._active = False

    def remove(self) -> None:
        """Stop listening."""
        self.pause()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _wrap(self, optimizer: Any) -> None:
        """Listen to an optimizer without step hooks (torch 1.x).

        The wrapper stays when it is not active any more: others may have
        wrapped it by then. It is a bound method, as torch's schedulers want
        it to be.
        """
        step = optimizer.step

        @functools.wraps(step)
        def listened(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            self._on_before()
            try:
                return step(*args, **kwargs)
            finally:
                self._on_after()

        optimizer.step = types.MethodType(listened, optimizer)

    def _on_before(self, *args: Any) -> None:
        if self._active:
            self._before()

    def _on_after(self, *args: Any) -> None:
        if self._active:
            self._after()
