"""The warm-up: rates and momentum of the first iterations.

At iteration i = 0, 1, ... of a warm-up of n iterations, a value v of the
schedule is, in the step, ``start + (v - start) * i / n``. The learning rate of
biases starts at 0.1 and falls, the others start at 0 and rise, and momentum
rises from 0.8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Dict, Optional

from mmdet_ema.checks import check_count, check_number
from mmdet_ema.errors import OptionError, did_you_mean, show
from mmdet_ema.optimizers.kinds import BIAS

NAMES = ('warmup_epochs', 'warmup_iters', 'min_iters', 'bias_lr', 'momentum')
BIAS_LR = 0.1


@dataclass(frozen=True)
class WarmupOptions:
    """Checked options of the warm-up.

    Attributes:
        warmup_epochs: Length in epochs.
        warmup_iters: Length in iterations, in the place of epochs.
        min_iters: Shortest length of a warm-up in epochs, in iterations.
        bias_lr: Learning rate that biases start from; None for 0.1, or 0
            with an optimizer that has ``betas``.
        momentum: Momentum (first beta) to start from.
    """

    warmup_epochs: float = 3.0
    warmup_iters: Optional[int] = None
    min_iters: int = 1000
    bias_lr: Optional[float] = None
    momentum: float = 0.8

    def length(self, iters_per_epoch: Optional[int]) -> int:
        """Return the length of the warm-up in iterations.

        Args:
            iters_per_epoch: Iterations of an epoch; None if not known.
        """
        if self.warmup_iters is not None:
            return self.warmup_iters
        epochs = round(self.warmup_epochs * (iters_per_epoch or 0))
        return max(epochs, self.min_iters) if self.warmup_epochs else 0


def parse_warmup(
    warmup_epochs: float = 3.0,
    warmup_iters: Optional[int] = None,
    min_iters: int = 1000,
    bias_lr: Optional[float] = None,
    momentum: float = 0.8,
    **unknown: Any,
) -> WarmupOptions:
    """Check the options of the warm-up; see :class:`WarmupOptions`.

    Returns:
        The options.

    Raises:
        OptionError: If an option is unknown or out of range.
    """
    for name, value in unknown.items():
        raise OptionError(
            f'BiasWarmupHook has no option {name!r} (given: {name}='
            f'{show(value)}); it takes {", ".join(NAMES)}.'
            f'{did_you_mean(name, NAMES)}'
        )
    if warmup_iters is not None:
        check_count('warmup_iters', warmup_iters, 0)
    if bias_lr is not None:
        check_number('bias_lr', bias_lr, 0, math.inf)
    return WarmupOptions(
        check_number('warmup_epochs', warmup_epochs, 0, math.inf),
        warmup_iters,
        check_count('min_iters', min_iters, 0),
        bias_lr,
        check_number('momentum', momentum, 0, 1, high_open=True),
    )


def is_bias(group: Dict[str, Any]) -> bool:
    """Return whether a group is one of biases, by the name it has."""
    return str(group.get('name', '')).partition(' ')[0] == BIAS


def warm(
    group: Dict[str, Any],
    options: WarmupOptions,
    iteration: int,
    length: int,
) -> Dict[str, Any]:
    """Return what a group is to have in a step of the warm-up.

    Args:
        group: The group, with the values of the schedule.
        options: The options.
        iteration: Iterations done before this one.
        length: Iterations of the warm-up.

    Returns:
        ``lr`` and, where the optimizer uses one, ``momentum`` or ``betas``;
        empty after the warm-up.
    """
    if iteration >= length:
        return {}
    share = iteration / length
    rate = _bias_start(group, options) if is_bias(group) else 0.0
    values: Dict[str, Any] = {'lr': _between(rate, group['lr'], share)}
    if group.get('momentum'):
        momentum = _between(options.momentum, group['momentum'], share)
        values['momentum'] = momentum
    if 'betas' in group:
        first, *others = group['betas']
        first = _between(options.momentum, first, share)
        values['betas'] = (first, *others)
    return values


def _bias_start(group: Dict[str, Any], options: WarmupOptions) -> float:
    """A step of Adam is as long as the rate, however small the gradient."""
    if options.bias_lr is None:
        return 0.0 if 'betas' in group else BIAS_LR
    return options.bias_lr


def _between(start: float, end: float, share: float) -> float:
    return start + (end - start) * share
