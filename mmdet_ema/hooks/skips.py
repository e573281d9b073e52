"""What the hook says of a step that was skipped because of NaN or Inf."""

from __future__ import annotations

import math
from typing import Optional

from mmdet_ema.core.averager import WeightAverager


def describe_skip(averager: WeightAverager, iteration: int) -> Optional[str]:
    """Say that a step was skipped, at the 1st, 10th, 100th, ... one.

    Args:
        averager: The averager that skipped it.
        iteration: The iteration of that step, from 1.

    Returns:
        A line; None at the other steps.
    """
    count = averager.known_skipped
    if not math.log10(count).is_integer():
        return None
    # found later, the weight may have recovered
    where = averager.first_nonfinite() or 'the weights'
    return (
        f'EMA: iteration {iteration} left NaN or Inf in {where}; the step was '
        f'not averaged ({count} skipped so far).'
    )
