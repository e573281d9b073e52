"""Weight decay scaled to a nominal batch size.

``weight_decay * samples / nominal``, where ``samples`` is what one optimizer
step takes: batch size x processes x accumulated iterations. With twice as many
samples a step there are half as many steps an epoch, and twice the decay a
step keeps the decay an epoch.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, Optional, Sequence

from torch.optim import Optimizer

from mmdet_ema.optimizers.around_step import AroundStep

NOMINAL_KEY = 'nominal_batch_size'
SAMPLES_KEY = 'samples_per_step'
"""In a group: the samples that its weight decay is scaled to; 0 for not yet.

Saved with the optimizer, so that a resumed run does not scale twice."""

_GIVEN = '_mmdet_ema_samples_per_step'


def mark(
    optimizer: Optimizer, nominal: Optional[int], samples: Optional[int]
) -> None:
    """Mark the groups of a new optimizer as waiting for their scaling.

    Args:
        optimizer: The optimizer; its weight decay is that of ``nominal``.
        nominal: Nominal batch size; None for no scaling.
        samples: Samples a step that the user gave; None for those that a
            hook finds.
    """
    if nominal is None:
        return
    setattr(optimizer, _GIVEN, samples)
    for group in optimizer.param_groups:
        group[NOMINAL_KEY], group[SAMPLES_KEY] = nominal, 0


def scale_weight_decay(
    optimizers: Sequence[Optimizer], samples: int, log: Any
) -> None:
    """Scale what is marked and not scaled to these samples yet.

    May be called again and again. Optimizers of other constructors are left
    alone, and samples that the user gave go before ``samples``.

    Args:
        optimizers: Optimizers of the run.
        samples: Samples that one optimizer step takes, over all processes.
        log: Has ``info(text)`` and ``warning(text)``.
    """
    for optimizer in optimizers:
        _scale(optimizer, getattr(optimizer, _GIVEN, None) or samples, log)


def is_waiting(optimizer: Optimizer) -> bool:
    """Return whether a weight decay still has to be scaled."""
    return any(not group[SAMPLES_KEY] for group in _decayed(optimizer))


def remind(optimizer: Optimizer, log: Any) -> None:
    """Warn at the first step if nobody has scaled the weight decay by then.

    Args:
        optimizer: The optimizer.
        log: Has ``warning(text)``.
    """
    around: Optional[AroundStep] = None

    def look() -> None:
        if around is not None:
            around.pause()
        if is_waiting(optimizer):
            log.warning(
                'EMAOptimizerConstructor: the weight decay is NOT scaled to '
                'the nominal batch size, because nothing told the batch '
                'size; add EMAHook, BiasWarmupHook or '
                'paramwise_cfg=dict(batch_size=...), or say '
                'nominal_batch_size=None.'
            )

    around = AroundStep(optimizer, look, lambda: None)


def _scale(optimizer: Optimizer, samples: int, log: Any) -> None:
    found = [g for g in _decayed(optimizer) if g[SAMPLES_KEY] != samples]
    if not found:
        return
    if any('initial_weight_decay' in group for group in found):
        log.warning(
            'EMAOptimizerConstructor: a scheduler of weight_decay knows the '
            'value before the scaling only; give '
            'paramwise_cfg=dict(batch_size=...), which scales before the '
            'schedulers are built.'
        )
    log.info(_describe(found[0], samples))
    for group in found:
        group['weight_decay'] *= _factor(group, samples)
        group[SAMPLES_KEY] = samples


def _factor(group: Dict[str, Any], samples: int) -> float:
    return samples / float(group[SAMPLES_KEY] or group[NOMINAL_KEY])


def _decayed(optimizer: Optimizer) -> Iterator[Dict[str, Any]]:
    for group in optimizer.param_groups:
        if group.get('weight_decay') and NOMINAL_KEY in group:
            yield group


def _describe(group: Dict[str, Any], samples: int) -> str:
    """Say it in one line; the groups of an optimizer are scaled alike."""
    old, nominal = group[SAMPLES_KEY], group[NOMINAL_KEY]
    factor, decay = _factor(group, samples), group['weight_decay']
    before = f'{old} before' if old else f'nominal {nominal}'
    return (
        f'EMAOptimizerConstructor: weight decay x {factor:.6g} for {samples} '
        f'samples a step ({before}): group {group["name"]!r} '
        f'{decay:.6g} -> {decay * factor:.6g}'
    )
