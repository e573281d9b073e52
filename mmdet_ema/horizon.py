"""What a schedule will do over a run: windows, products, what is left."""

from __future__ import annotations

import math

from mmdet_ema.schedule_spec import check_decay
from mmdet_ema.schedules import Schedule

_NOTHING_LEFT = 1e-12


def decay_over(schedule: Schedule, first: int, last: int) -> float:
    """Return the decay of one update that stands for several steps.

    The product ``d(first) * ... * d(last)``: for a constant d over k steps
    ``d ** k``, so that the averaging window does not depend on the interval.

    Args:
        schedule: The schedule.
        first: First step that the update stands for, from 1.
        last: Last step that it stands for.

    Returns:
        The decay.

    Raises:
        OptionError: If the schedule returns no decay in [0, 1].
    """
    if first == last:
        return check_decay(schedule, last)
    return math.prod(check_decay(schedule, n) for n in range(first, last + 1))


def window(decay: float) -> float:
    """Return the effective averaging window of a decay in steps.

    ``1 / (1 - decay)``, the mean age plus one of what a constant decay
    averages; infinite for a decay of 1.

    Args:
        decay: A decay in [0, 1].

    Returns:
        The window in steps, at least 1.
    """
    return math.inf if decay >= 1 else 1 / (1 - decay)


def initial_share(schedule: Schedule, steps: int, first: int = 1) -> float:
    """Return the share of the initial weights in the average after a run.

    Args:
        schedule: The schedule.
        steps: Number of steps in the run.
        first: The step to begin with. Defaults to 1.

    Returns:
        ``d(first) * ... * d(steps)``; 0 as soon as it is below 1e-12.

    Raises:
        OptionError: If the schedule returns no decay in [0, 1].
    """
    share = 1.0
    for n in range(first, steps + 1):
        share *= check_decay(schedule, n)
        if share < _NOTHING_LEFT:
            return 0.0
    return share
