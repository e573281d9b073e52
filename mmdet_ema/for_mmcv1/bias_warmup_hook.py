"""``BiasWarmupHook`` for mmcv's runners."""

from __future__ import annotations

import math
from typing import Any

from mmcv.runner.hooks import Hook, LrUpdaterHook
from mmcv.runner.hooks.momentum_updater import MomentumUpdaterHook

from mmdet_ema.for_mmcv1.runner import facts_of, optimizers_of
from mmdet_ema.optimizers.warmup import Warmup

_UPDATERS = {'lr': LrUpdaterHook, 'momentum': MomentumUpdaterHook}


class BiasWarmupHook(Hook):  # type: ignore[misc]
    """Warm-up of the learning rates and the momentum.

    At iteration i of n, a value v of the schedule is, in the step,
    ``start + (v - start) * i / n``. Works with every ``lr_config`` and
    ``momentum_config``, which never see these values. It also completes the
    scaling of the weight decay of ``EMAOptimizerConstructor``.

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

    def __init__(self, **options: Any):
        self._warmup = Warmup(**options)

    def before_run(self, runner: Any) -> None:
        """Forget an earlier run."""
        self._warmup.stop()

    def before_train_iter(self, runner: Any) -> None:
        """Begin at the first iteration; tell the warm-up where it is."""
        if not self._warmup.running:
            facts = facts_of(runner)
            self._warmup.start(
                optimizers_of(runner),
                iters_per_epoch=len(runner.data_loader),
                max_iters=facts.max_iters,
                samples=facts.samples,
                log=runner.logger,
                others={
                    value: [
                        f'{value}_config(warmup={hook.warmup!r})'
                        for hook in runner.hooks
                        if isinstance(hook, updater)
                        and hook.warmup is not None
                        and (hook.warmup_iters or math.inf) > runner.iter
                    ]
                    for value, updater in _UPDATERS.items()
                },
            )
        runner.log_buffer.update(self._warmup.at(runner.iter))

    def after_run(self, runner: Any) -> None:
        """Leave the optimizers alone."""
        self._warmup.stop()
