"""Warm up the steps of optimizers, and nothing but the steps."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence, Tuple

from torch.optim import Optimizer

from mmdet_ema.optimizers.around_step import AroundStep
from mmdet_ema.optimizers.warmup import WarmupOptions, is_bias, warm


class WarmSteps:
    """Sets the values of the warm-up during a step only.

    Whatever runs between steps (schedulers that compute the next value from
    the present one, checkpoints, other hooks) finds the values of the
    schedule.

    Args:
        optimizers: The optimizers.
        options: The options.
        length: Iterations of the warm-up.

    Attributes:
        iteration: Iterations done before the present one; to be set.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        options: WarmupOptions,
        length: int,
    ):
        self.iteration = 0
        self._optimizers, self._options = list(optimizers), options
        self._length = length
        self._kept: List[Tuple[Dict[str, Any], Dict[str, Any]]] = []
        self._around = [
            AroundStep(o, lambda o=o: self._apply(o), self.restore)  # type: ignore[misc]
            for o in optimizers
        ]

    def now(self) -> Dict[str, float]:
        """Return what a step of this iteration uses, for the log.

        Returns:
            ``step_lr`` of the first group that is not of biases, ``bias_lr``
            and ``step_momentum``, as far as there are such.
        """
        found: Dict[str, float] = {}
        for group in self._groups():
            values = {**group, **self._warm(group)}
            name = 'bias_lr' if is_bias(group) else 'step_lr'
            found.setdefault(name, float(values['lr']))
            betas = values.get('betas', (0.0,))
            momentum = values.get('momentum') or betas[0]
            if momentum:
                found.setdefault('step_momentum', float(momentum))
        return found

    def restore(self) -> None:
        """Put the values of the schedule back, also after a failed step."""
        while self._kept:
            group, values = self._kept.pop()
            group.update(values)

    def remove(self) -> None:
        """Leave the optimizers alone from now on."""
        self.restore()
        for around in self._around:
            around.remove()

    def _apply(self, optimizer: Optimizer) -> None:
        self.restore()
        for group in optimizer.param_groups:
            values = self._warm(group)
            self._kept.append((group, {name: group[name] for name in values}))
            group.update(values)

    def _warm(self, group: Dict[str, Any]) -> Dict[str, Any]:
        return warm(group, self._options, self.iteration, self._length)

    def _groups(self) -> List[Dict[str, Any]]:
        return [g for o in self._optimizers for g in o.param_groups]
