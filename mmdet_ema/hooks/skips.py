"""What the hook says of a step that was skipped because of NaN or Inf."""

from __future__ import annotations

import math
from typing import Optional

from mmdet_ema.core.averager import WeightAverager

_GOES_ON = 10


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
    found = averager.first_nonfinite()
    line = (
        f'EMA: iteration {iteration} left NaN or Inf in '
        f'{found or "the weights"}; the step was not averaged ({count} '
        f'skipped so far).'
    )
    if found is None or count < _GOES_ON:
        return line
    return (
        f'{line} As long as it holds some no step is averaged, and weights do '
        f'not recover from NaN by themselves: resume from a file from before '
        f'it, with a lower learning rate or clipped gradients '
        f'(clip_grad). If {found} is meant to hold Inf, '
        f'copied=[{found!r}] copies it and lets the others be averaged.'
    )
