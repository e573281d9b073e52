"""The start of a training with warm-up, whatever framework runs it."""

from __future__ import annotations

from typing import Any, List, Mapping, Optional, Sequence

from torch.optim import Optimizer

from mmdet_ema.optimizers.nominal import scale_weight_decay
from mmdet_ema.optimizers.warm_steps import WarmSteps
from mmdet_ema.optimizers.warmup import BIAS_LR, WarmupOptions, is_bias


def start_warmup(
    optimizers: Sequence[Optimizer],
    options: WarmupOptions,
    *,
    iters_per_epoch: Optional[int],
    max_iters: int,
    samples: int,
    log: Any,
    others: Optional[Mapping[str, Sequence[str]]] = None,
) -> WarmSteps:
    """Scale the weight decay, say what the warm-up will do, and begin.

    Args:
        optimizers: Optimizers of the run.
        options: The options.
        iters_per_epoch: Iterations of an epoch; None if not known.
        max_iters: Iterations of the run.
        samples: Samples that one optimizer step takes, over all processes.
        log: Has ``info(text)`` and ``warning(text)``.
        others: 'lr' or 'momentum' -> schedulers that warm it up as well, in
            words. Defaults to None.

    Returns:
        The running warm-up.
    """
    scale_weight_decay(optimizers, samples, log)
    length = options.length(iters_per_epoch)
    groups = [g for o in optimizers for g in o.param_groups]
    if length:
        log.info(_describe(options, groups, length))
    for line in _warnings(groups, length, max_iters, others or {}):
        log.warning(line)
    return WarmSteps(optimizers, options, length)


def _describe(options: WarmupOptions, groups: List[Any], length: int) -> str:
    rate = options.bias_lr
    if rate is None:
        rate = 0.0 if any('betas' in group for group in groups) else BIAS_LR
    return (
        f'BiasWarmupHook: {length} iterations; lr of biases from {rate:g}, '
        f'other lrs from 0, momentum from {options.momentum:g} to the values '
        f'of the schedule'
    )


def _warnings(
    groups: List[Any],
    length: int,
    max_iters: int,
    others: Mapping[str, Sequence[str]],
) -> List[str]:
    if not length:
        return []
    found = []
    if not any(is_bias(group) for group in groups):
        found.append(
            "BiasWarmupHook: no parameter group is named 'bias', so every lr "
            "rises from 0; set constructor='EMAOptimizerConstructor'."
        )
    if length > max_iters / 2:
        found.append(
            f'BiasWarmupHook: the warm-up takes {length} of the {max_iters} '
            f'iterations; lower warmup_epochs and min_iters, or give '
            f'warmup_iters={max(max_iters // 10, 1)}.'
        )
    found += [
        f'BiasWarmupHook: {" and ".join(names)} warms up the {value} as well, '
        f'so that both act on it; remove one of them.'
        for value, names in others.items()
        if names
    ]
    return found
