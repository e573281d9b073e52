"""Estimate BatchNorm statistics again, from batches of training data.

An average of weights computes other activations than any of the weights it is
made of, so the averages of their statistics need not fit it (SWA,
arXiv:1803.05407, section 3.2).
"""

from __future__ import annotations

import itertools
import math
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Tuple,
)

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet_ema.averaging.averager import WeightAverager
from mmdet_ema.averaging.distributed import add_up
from mmdet_ema.training.options import Options
from mmdet_ema.training.passes import leaving_no_trace, side_by_side

Metrics = Mapping[str, Any]


def recalibrate(
    averager: WeightAverager,
    options: Options,
    model: nn.Module,
    loader: Iterable[Any],
    forward: Callable[[Any], Any],
    evaluate: Callable[[], Metrics],
    choose_by: Callable[[Metrics], Tuple[str, bool]],
    log: Any,
) -> None:
    """Estimate statistics of the deployed averages again; keep the better.

    Call it on all ranks, with averages that are equal there. ``forward`` calls
    the model on a batch, as training does; ``evaluate`` returns the metrics of
    these averages, at least on rank 0; ``choose_by`` that which is compared,
    and whether higher is better.
    """
    deploy, count = options.deploy, options.recalibrate
    said = f'EMA: recalibrate={count}'
    log.info(
        f'{said}: estimating the statistics of '
        f'{len(layers_to_estimate(model))} BatchNorm layers; they are '
        f'evaluated before and after'
    )
    before = evaluate()
    with averager.applied(deploy):
        batches = first_batches(loader, count)
        estimates = batch_statistics(model, batches, forward)
    averages = dict(averager.named_parts(deploy))
    old = {name: averages[name].clone() for name in estimates}
    is_kept = False
    try:
        for name, estimate in estimates.items():
            averages[name].copy_(estimate)
        after = evaluate()
        if after:
            metric, greater = choose_by(after)
            left, right = before[metric], after[metric]
            is_kept = is_better(left, right, greater)
        # where rank 0 alone has metrics the others do what it does
        votes = torch.tensor([float(is_kept)], dtype=torch.float64)
        add_up([votes])
        is_kept = bool(votes)
    finally:
        if not is_kept:
            for name, value in old.items():
                averages[name].copy_(value)
    if not after:
        log.warning(f'{said} has no effect: there are no metrics.')
        return
    log.info(side_by_side({'after': after, 'before': before}))
    better = 'higher' if greater else 'lower'
    kept = 'the new ones are kept' if is_kept else 'the old ones stay'
    log.info(
        f'{said}: {kept}: {metric} {left:.4f} before, {right:.4f} after '
        f'({better} is better)'
    )


def layers_to_estimate(model: nn.Module) -> Dict[str, nn.Module]:
    """Return the BatchNorm layers that follow the training data, by name.

    A layer in evaluation mode is frozen, one without running statistics
    needs none.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.training
        and module.running_mean is not None
    }


@torch.no_grad()
def batch_statistics(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any]
) -> Dict[str, Tensor]:
    """Return BatchNorm statistics of data, estimated with the present weights.

    Each layer normalises a batch by that batch's own statistics, as in
    training. Its new ones are the mean and the unbiased variance of all values
    that it has seen, summed up in float64, on all ranks: batches and ranks may
    have different sizes, and every value counts once. A layer that is called
    several times a pass gets one estimate over all calls.

    Only layers in training mode are estimated. Afterwards the model, its
    buffers and the random generators are as they were before.

    Args:
        model: The model, unwrapped, in the modes of its training.
        batches: As many on each rank, with synchronised BatchNorm.
        forward: Calls the model on a batch, as training does.

    Returns:
        Float64 tensors of shape (channels,), by their name in ``state_dict``;
        without the layers that saw fewer than two values.
    """
    layers = layers_to_estimate(model)
    estimated = set(map(id, layers.values()))
    # of each layer the sum, the sum of squares and the count
    sums: Dict[str, List[Tensor]] = {}
    for name, layer in layers.items():
        total: Any = layer.running_mean
        total = torch.zeros_like(total, dtype=torch.float64)
        sums[name] = [total, total.clone(), total.new_zeros(())]

    def adding(name: str) -> Callable[[nn.Module, Tuple[Any, ...]], None]:
        def add(layer: nn.Module, inputs: Tuple[Any, ...]) -> None:
            values = inputs[0].double().transpose(0, 1).flatten(1)
            total, squares, count = sums[name]
            total += values.sum(1)
            squares += (values * values).sum(1)
            count += values.shape[1]

        return add

    with leaving_no_trace(model):
        for module in model.modules():
            # dropout would not be there when the model is used; a module with
            # parts may ask its own mode what a loss needs
            is_leaf = next(module.children(), None) is None
            if is_leaf and id(module) not in estimated:
                module.training = False
        handles = [
            layer.register_forward_pre_hook(adding(name))
            for name, layer in layers.items()
        ]
        try:
            for batch in batches:
                forward(batch)
        finally:
            for handle in handles:
                handle.remove()
    add_up([*itertools.chain.from_iterable(sums.values())])
    found: Dict[str, Tensor] = {}
    for name, (total, squares, count) in sums.items():
        n = float(count)
        if n > 1:
            mean = total / n
            prefix = f'{name}.' if name else ''
            found[f'{prefix}running_mean'] = mean
            # rounding may leave less than nothing of a constant
            variance = (squares / n - mean * mean).clamp(min=0) * (n / (n - 1))
            found[f'{prefix}running_var'] = variance
    return found


def first_batches(loader: Iterable[Any], count: int) -> Iterator[Any]:
    """Yield batches from an iterator that is made when they are asked for."""
    yield from itertools.islice(loader, count)


def is_better(before: float, after: float, greater: bool) -> bool:
    """Return whether a metric has improved; to NaN it never has."""
    if not math.isfinite(after):
        return False
    better = after > before if greater else after < before
    return better or not math.isfinite(before)
