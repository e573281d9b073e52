"""Weight decay scaled to a nominal batch size.

``weight_decay * samples / nominal``, where ``samples`` is what one optimizer
step takes: batch size x processes x accumulated iterations. With twice as many
samples a step there are half as many steps an epoch, and twice the decay a
step keeps the decay an epoch.
"""

from __future__ import annotations

import contextlib
import functools
import types
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterable,
    List,
    Optional,
)

from torch.optim import Optimizer

_NOMINAL = 'nominal_batch_size'
# in a group: the samples that its weight decay is scaled to, 0 for not yet;
# saved with the optimizer, so that a resumed run does not scale twice
_SAMPLES = 'samples_per_step'
_GIVEN = '_mmdet_ema_samples_per_step'


def mark(
    optimizer: Optimizer, nominal: Optional[int], samples: Optional[int]
) -> None:
    """Mark the groups of a new optimizer as waiting for their scaling.

    ``samples`` are those that the user gave, None for what a hook finds.
    """
    if nominal is not None:
        setattr(optimizer, _GIVEN, samples)
        for group in optimizer.param_groups:
            group[_NOMINAL], group[_SAMPLES] = nominal, 0


def scale_weight_decay(
    optimizers: Iterable[Any], samples: int, log: Any
) -> None:
    """Scale what is marked and not scaled to these samples yet.

    What the user gave goes first. May be called again and again.
    """
    for optimizer in optimizers:
        wanted = getattr(optimizer, _GIVEN, None) or samples
        groups = [g for g in _decayed(optimizer) if g[_SAMPLES] != wanted]
        if any('initial_weight_decay' in group for group in groups):
            log.warning(
                'EMAOptimizerConstructor: a scheduler of weight_decay knows '
                'the value before the scaling only; give '
                'paramwise_cfg=dict(batch_size=...), which scales before the '
                'schedulers are built.'
            )
        for index, group in enumerate(groups):
            scaled_to, nominal = group[_SAMPLES], group[_NOMINAL]
            factor = wanted / (scaled_to or nominal)
            decay = group['weight_decay']
            group['weight_decay'] = decay * factor
            group[_SAMPLES] = wanted
            if index == 0:  # all groups of an optimizer are scaled alike
                before = f'{scaled_to} before'
                if not scaled_to:
                    before = f'nominal {nominal}'
                log.info(
                    f'EMAOptimizerConstructor: weight decay x {factor:.6g} '
                    f'for {wanted} samples a step ({before}): group '
                    f'{group["name"]!r} {decay:.6g} -> {decay * factor:.6g}'
                )


def remind(optimizer: Optimizer, log: Any) -> None:
    """Warn at the first step if nobody has scaled the weight decay by then."""

    def look() -> ContextManager[Any]:
        end()
        if not all(group[_SAMPLES] for group in _decayed(optimizer)):
            log.warning(
                'EMAOptimizerConstructor: the weight decay is NOT scaled to '
                'the nominal batch size, because nothing told the batch '
                'size; add EMAHook, BiasWarmupHook or '
                'paramwise_cfg=dict(batch_size=...), or say '
                'nominal_batch_size=None.'
            )
        return contextlib.nullcontext()

    if not all(group[_SAMPLES] for group in _decayed(optimizer)):
        end = around_step(optimizer, look)


def _decayed(optimizer: Optimizer) -> List[Dict[str, Any]]:
    return [
        group
        for group in optimizer.param_groups
        if group.get('weight_decay') and _NOMINAL in group
    ]


def around_step(
    optimizer: Any, context: Callable[[], ContextManager[Any]]
) -> Callable[[], None]:
    """Enter a context around every step, and leave it if the step fails too.

    Steps that a gradient scaler skips and iterations that only accumulate
    gradients are no steps. Returns a function that ends it, in a step too.
    """
    # torch's own step hooks know no failed step, torch 1.13 has none, and a
    # step that calls its parent's would be heard twice
    step = optimizer.step
    contexts = [context]

    @functools.wraps(step)
    def heard(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        with contexts[0]() if contexts else contextlib.nullcontext():
            return step(*args, **kwargs)

    # schedulers ask whose method it is
    optimizer.step = types.MethodType(heard, optimizer)
    # the wrapper stays: others may have wrapped it by now
    return contexts.clear
