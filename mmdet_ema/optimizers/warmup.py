"""The warm-up: rates and momentum of the first iterations.

At iteration i = 0, 1, ... of a warm-up of n iterations, a value v of the
schedule is, in the step, ``start + (v - start) * i / n``. The learning rate of
biases starts at 0.1 and falls, the others start at 0 and rise, and momentum
rises from 0.8.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

from torch.optim import Optimizer

from mmdet_ema.checks import check_count, check_names, check_number
from mmdet_ema.optimizers.kinds import BIAS
from mmdet_ema.optimizers.nominal import around_step, scale_weight_decay

_NAMES = ('warmup_epochs', 'warmup_iters', 'min_iters', 'bias_lr', 'momentum')


class Warmup:
    """Sets the values of the warm-up during a step only.

    Whatever runs between steps (schedulers that compute the next value from
    the present one, checkpoints, other hooks) finds the values of the
    schedule. The options are those of ``BiasWarmupHook``.
    """

    def __init__(
        self,
        warmup_epochs: float = 3.0,
        warmup_iters: Optional[int] = None,
        min_iters: int = 1000,
        bias_lr: Optional[float] = None,
        momentum: float = 0.8,
        **unknown: Any,
    ):
        check_names('BiasWarmupHook', unknown, _NAMES)
        if warmup_iters is not None:
            check_count('warmup_iters', warmup_iters, 0)
        if bias_lr is not None:
            check_number('bias_lr', bias_lr, 0, math.inf)
        inf = math.inf
        self._epochs = check_number('warmup_epochs', warmup_epochs, 0, inf)
        self._iters, self._bias_lr = warmup_iters, bias_lr
        self._min_iters = check_count('min_iters', min_iters, 0)
        self._momentum = check_number(
            'momentum', momentum, 0, 1, high_open=True
        )
        self._optimizers: List[Optimizer] = []
        self._ends: List[Callable[[], None]] = []
        self._length = self._iteration = 0
        self.running = False

    def start(
        self,
        optimizers: List[Optimizer],
        *,
        iters_per_epoch: Optional[int],
        max_iters: int,
        samples: int,
        log: Any,
        others: Mapping[str, List[str]],
    ) -> None:
        """Scale the weight decay, say what the warm-up will do, and begin.

        ``others`` names what warms up 'lr' or 'momentum' as well.
        """
        scale_weight_decay(optimizers, samples, log)
        self._optimizers = list(optimizers)
        epochs = round(self._epochs * (iters_per_epoch or 0))
        self._length = max(epochs, self._min_iters) if self._epochs else 0
        if self._iters is not None:
            self._length = self._iters
        if self._length:
            self._report(max_iters, others, log)
        self._ends = [
            around_step(optimizer, functools.partial(self._warmed, optimizer))
            for optimizer in optimizers
        ]
        self.running = True

    def at(self, iteration: int) -> Dict[str, float]:
        """Go to an iteration, from 0; return what its step will use.

        That is ``step_lr`` of the first group that is not of biases,
        ``bias_lr`` and ``step_momentum``, as far as there are such.
        """
        self._iteration = iteration
        found: Dict[str, float] = {}
        for group in self._groups():
            values = {**group, **self._warm(group)}
            name = 'bias_lr' if _is_bias(group) else 'step_lr'
            found.setdefault(name, float(values['lr']))
            momentum = values.get('momentum') or values.get('betas', (0.0,))[0]
            if momentum:
                found.setdefault('step_momentum', float(momentum))
        return found

    def stop(self) -> None:
        """Leave the optimizers alone from now on."""
        for end in self._ends:
            end()
        self._ends, self.running = [], False

    def _groups(self) -> List[Dict[str, Any]]:
        return [g for o in self._optimizers for g in o.param_groups]

    @contextlib.contextmanager
    def _warmed(self, optimizer: Optimizer) -> Iterator[None]:
        kept = []
        for group in optimizer.param_groups:
            values = self._warm(group)
            kept.append((group, {name: group[name] for name in values}))
            group.update(values)
        try:
            yield
        finally:
            for group, values in kept:
                group.update(values)

    def _warm(self, group: Mapping[str, Any]) -> Dict[str, Any]:
        """Return what a group is to have in a step, nothing at the end."""
        i, n = self._iteration, self._length
        if i >= n:
            return {}

        def warm(start: float, value: float) -> float:
            return start + (value - start) * (i / n)

        rate = self._bias_start(group) if _is_bias(group) else 0.0
        values: Dict[str, Any] = {'lr': warm(rate, group['lr'])}
        if group.get('momentum'):
            values['momentum'] = warm(self._momentum, group['momentum'])
        if 'betas' in group:
            first, *others = group['betas']
            values['betas'] = (warm(self._momentum, first), *others)
        return values

    def _bias_start(self, group: Mapping[str, Any]) -> float:
        if self._bias_lr is not None:
            return self._bias_lr
        # a step of Adam is as long as the rate, however small the gradient
        return 0.0 if 'betas' in group else 0.1

    def _report(
        self, max_iters: int, others: Mapping[str, List[str]], log: Any
    ) -> None:
        groups, length = self._groups(), self._length
        rate = min(map(self._bias_start, groups), default=0.0)
        log.info(
            f'BiasWarmupHook: {length} iterations; lr of biases from '
            f'{rate:g}, other lrs from 0, momentum from {self._momentum:g} to '
            f'the values of the schedule'
        )
        if not any(map(_is_bias, groups)):
            log.warning(
                "BiasWarmupHook: no parameter group is named 'bias', so every "
                "lr rises from 0; set constructor='EMAOptimizerConstructor'."
            )
        if length > max_iters / 2:
            log.warning(
                f'BiasWarmupHook: the warm-up takes {length} of the '
                f'{max_iters} iterations; lower warmup_epochs and min_iters, '
                f'or give warmup_iters={max(max_iters // 10, 1)}.'
            )
        for value, names in others.items():
            if names:
                log.warning(
                    f'BiasWarmupHook: {" and ".join(names)} warms up the '
                    f'{value} as well, so that both act on it; remove one of '
                    f'them.'
                )


def _is_bias(group: Mapping[str, Any]) -> bool:
    return str(group.get('name', '')).partition(' ')[0] == BIAS
