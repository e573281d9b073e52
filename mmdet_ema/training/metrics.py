"""Names of the metrics of several sets of weights.

The main set has the plain names, ``coco/bbox_mAP``; of another one the name
comes last, ``coco/bbox_mAP_raw``: OpenMMLab's log tools keep what follows the
last slash.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, Mapping, Optional, Tuple

from mmdet_ema.averaging.averages import MAIN
from mmdet_ema.errors import OptionError, show
from mmdet_ema.training.options import RAW, Options
from mmdet_ema.training.report import metric_of, sets_of_weights

# what names began with in version 0.1
_OLD = f'{RAW}/'


def named(metrics: Mapping[str, Any], weights: str) -> Dict[str, Any]:
    """Return the metrics of a set of weights that is not the main one."""
    return {metric_of(weights, k): value for k, value in metrics.items()}


def add_metrics(metrics: Dict[str, Any], others: Mapping[str, Any]) -> None:
    """Put the metrics of other sets next to those of the main one."""
    for name in others:
        if name in metrics:
            raise OptionError(
                f'the metric {name!r} is there twice: by itself, and of '
                f'another set of weights; give that set another name in '
                f'averages= of the EMA hook, or leave it out of evaluate=.'
            )
    metrics.update(others)


def is_of_other(options: Options, name: Any) -> bool:
    """Return whether a metric is of another set of weights than the main."""
    found = _split(options, name) if isinstance(name, str) else None
    return found is not None and found[1] in options.passes[:-1]


def _split(options: Options, name: str) -> Optional[Tuple[str, str]]:
    """Return a metric and whose it is; None for a name without a set."""
    known = (MAIN, RAW, *options.further)
    # 'very_fast' before 'fast'
    for weights in sorted(known, key=len, reverse=True):
        metric = name[: -len(weights) - 1]
        if metric and name == metric_of(weights, metric):
            return metric, weights
    return (name[len(_OLD) :], RAW) if name.startswith(_OLD) else None


def monitored(options: Options, where: str, word: str, given: str) -> str:
    """Return what the metric is called that ``where(word=given)`` waits for.

    ``given`` may be a name of version 0.1 (``raw/coco/bbox_mAP``).
    """
    found = _split(options, given)
    if found is None:
        return given
    metric, weights = found
    others, main = options.passes[:-1], options.passes[-1]
    if weights in others:
        return metric_of(weights, metric)
    plain, what = f'{word}={show(metric)}', sets_of_weights([weights])
    if weights == main:
        raise OptionError(
            f'{where}({word}={show(given)}): the metrics of {what} have the '
            f'plain names with this evaluate=; use {plain}.'
        )
    sets = [main, *others, weights]
    wanted = 'both' if sorted(sets) == [MAIN, RAW] else sets
    raise OptionError(
        f'{where}({word}={show(given)}) needs the metrics of {what} beside '
        f'those of {sets_of_weights(options.passes)}; give EMAHook '
        f'evaluate={wanted!r}, or use {plain}.'
    )


def renamed(where: str, word: str, given: Any, new: Iterable[str]) -> str:
    """Say that something waits for metrics by their names of today."""
    return (
        f'EMA: {where}({word}={show(given)}) waits for {", ".join(new)}: the '
        f'set of weights comes last in the names of metrics now.'
    )


def of_version_0_1(name: str) -> str:
    """Return today's form of a name, which may have others in front.

    ``val/raw/coco/bbox_mAP`` and ``best_score_raw/coco/bbox_mAP`` are of
    mmengine's message hub.
    """
    for start in ('val/', 'test/', 'best_score_', 'best_ckpt_'):
        if name.startswith(start + _OLD):
            return metric_of(RAW, start + name[len(start + _OLD) :])
    return name
