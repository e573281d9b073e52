"""Call something right before and right after every optimizer step."""

from __future__ import annotations

import functools
import types
from typing import Any, Callable


def around_step(
    optimizer: Any, before: Callable[[], None], after: Callable[[], None]
) -> Callable[[], None]:
    """Call ``before`` and ``after`` around every step, failed ones too.

    Steps that a gradient scaler skips and iterations that only accumulate
    gradients are no steps.

    Returns:
        A function that ends it; it may be called in a step, too.
    """
    # torch's own step hooks know no failed step, torch 1.13 has none, and a
    # step that calls its parent's would be heard twice
    step = optimizer.step
    active = True

    @functools.wraps(step)
    def heard(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not active:
            return step(*args, **kwargs)
        before()
        try:
            return step(*args, **kwargs)
        finally:
            after()

    def end() -> None:
        # the wrapper stays: others may have wrapped it by now
        nonlocal active
        active = False

    # schedulers ask whose method it is
    optimizer.step = types.MethodType(heard, optimizer)
    return end
