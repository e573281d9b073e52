"""What the hook says of steps: of those it skipped, and of those that lack."""

from __future__ import annotations

import math
from typing import Optional, Sequence

from mmdet_ema.averaging.averager import WeightAverager

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


def describe_steps(steps: int, skipped: int, iterations: int) -> str:
    """Say what became of the iterations so far.

    Args:
        steps: Steps that were averaged.
        skipped: Steps that were left out because of NaN or Inf.
        iterations: Iterations since the average began.
    """
    return (
        f'EMA: {steps} steps averaged, {skipped} skipped (NaN or Inf), '
        f'in {iterations} iterations.'
    )


def describe_idle(iterations: int) -> str:
    """Say that the weights stand still, and what to look at.

    Args:
        iterations: Iterations in a row that did not change them.
    """
    return (
        f'EMA: {iterations} iterations in a row did not change the weights, '
        f'so the average stands still. Unless gradients are accumulated for '
        f'longer than that, look at the learning rate, at whether the '
        f'optimizer has the parameters of this model, and at whether a '
        f'gradient scaler skips every step.'
    )


def describe_replaced(names: Sequence[str]) -> str:
    """Say that parameters of the model are other objects now.

    Args:
        names: Their names, at least one.
    """
    more = f' and {len(names) - 1} more' if len(names) > 1 else ''
    return (
        f'EMA: {names[0]}{more} replaced in the model. The average goes on '
        f'with what has the same name and shape; the rest starts from its '
        f'present values.'
    )
