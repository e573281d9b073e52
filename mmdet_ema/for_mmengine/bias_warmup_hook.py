"""``BiasWarmupHook`` for mmengine's runners."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook

from mmdet_ema.for_mmengine import runner as runners
from mmdet_ema.optimizers.warmup import Warmup

_RISING = ('Linear', 'Constant', 'QuadraticWarmup')
_ENDINGS = {'lr': 'LR', 'momentum': 'Momentum'}


class BiasWarmupHook(Hook):  # type: ignore[misc]
    """Warm-up of the learning rates and the momentum.

    At iteration i of n, a value v of the schedule is, in the step,
    ``start + (v - start) * i / n``. Works with every ``param_scheduler``,
    which never sees these values. It also completes the scaling of the
    weight decay of ``EMAOptimizerConstructor``.

    Args:
        warmup_epochs (float): Length in epochs; 0 for no warm-up. Defaults
            to 3.
        warmup_iters (int, optional): Length in iterations, instead of epochs.
            Defaults to None.
        min_iters (int): Least iterations of a warm-up in epochs. Defaults to
            1000.
        bias_lr (float, optional): Learning rate that the groups of biases
            start from; the others start from 0. Defaults to 0.1, or to 0
            with an optimizer that has ``betas``.
        momentum (float): Momentum, or first beta, to start from. Defaults
            to 0.8.

    Raises:
        OptionError: If an option is unknown or out of range (a
            ``ValueError``).

    Example:
        >>> custom_hooks = [dict(type='EMAHook'), dict(type='BiasWarmupHook')]
    """

    priority = 'NORMAL'

    def __init__(self, **options: Any):
        self._warmup = Warmup(**options)

    def before_train(self, runner: Any) -> None:
        """Begin; optimizers and schedulers are loaded by now."""
        self._warmup.stop()
        try:
            length = len(runner.train_dataloader)
        except TypeError:  # an iterable dataset without a length
            length = None
        facts = runners.facts_of(runner)
        self._warmup.start(
            runners.optimizers_of(runner),
            iters_per_epoch=length,
            max_iters=facts.max_iters,
            samples=facts.samples,
            log=runners.RunLog(),
            others={
                value: [
                    f'{type(s).__name__}(end={s.end})'
                    for s in runners.schedulers_of(runner)
                    if type(s).__name__ in [f'{x}{ending}' for x in _RISING]
                    if s.begin == 0
                    if s.end > (runner.epoch if s.by_epoch else runner.iter)
                ]
                for value, ending in _ENDINGS.items()
            },
        )

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Tell the warm-up where it is; record what the step will use."""
        for name, value in self._warmup.at(runner.iter).items():
            runner.message_hub.update_scalar(f'train/{name}', value)

    def after_train(self, runner: Any) -> None:
        """Leave the optimizers alone."""
        self._warmup.stop()
