"""Several sets of weights, each evaluated in a pass of its own.

The main set has the plain names of metrics, ``coco/bbox_mAP``; of another one
the name comes last, ``coco/bbox_mAP_raw``: OpenMMLab's log tools keep what
follows the last slash. No pass leaves a trace in the model.
"""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict, defaultdict, deque
from typing import Any, Dict, Iterable, Iterator, Mapping, Sequence, Tuple

import torch
from torch import nn

from mmdet_ema.averaging.averages import MAIN
from mmdet_ema.averaging.swap import same_modes
from mmdet_ema.averaging.tensors import writable
from mmdet_ema.errors import OptionError, show
from mmdet_ema.training.options import RAW, Options

_OLD = f'{RAW}/'
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


def sets_of_weights(passes: Sequence[str]) -> str:
    """Return the sets of weights that are evaluated in words."""
    words = {MAIN: 'the averages', RAW: 'the raw weights'}
    names = [passes[-1], *passes[:-1]]  # the main one first
    return ' and '.join(words.get(x, f'the averages {x!r}') for x in names)


def metric_of(weights: str, metric: str) -> str:
    """Return the name of a metric of a set that is not the main one."""
    return f'{metric}_{weights}'


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


def monitored(
    options: Options, where: str, word: str, given: str
) -> Tuple[str, bool]:
    """Check that ``where(word=given)`` waits for a metric that is computed.

    Returns its name, as ``given`` may be ``raw/coco/bbox_mAP`` of an older
    config, and whether it is of another set of weights than the main one.
    """
    name = given
    if given.startswith(_OLD):
        name = metric_of(RAW, given[len(_OLD) :])
    known = (MAIN, RAW, *options.further)
    # 'very_fast' before 'fast'
    for weights in sorted(known, key=len, reverse=True):
        metric = name[: -len(weights) - 1]
        if metric and name == metric_of(weights, metric):
            break
    else:
        return name, False
    *others, main = options.passes
    if weights in others:
        return name, True
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
    """Say that something waits for metrics by other names than given."""
    return (
        f'EMA: {where}({word}={show(given)}) waits for {", ".join(new)}: the '
        f'set of weights comes last in the names of metrics now.'
    )


def compare(metrics: Mapping[str, Any], passes: Sequence[str]) -> str:
    """Return a table of the metrics that several sets of weights have."""
    columns = {passes[-1]: metrics}
    for x in passes[:-1]:
        columns[x] = {k: metrics.get(metric_of(x, k)) for k in metrics}
    return side_by_side(columns)


def side_by_side(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of metrics by column, the first compared with others."""
    main, *others = columns
    rows = []
    for name, value in columns[main].items():
        values = [value, *(columns[x].get(name) for x in others)]
        if others and all(isinstance(x, (int, float)) for x in values):
            gaps = [value - x for x in values[1:]]
            cells = [f'{x:10.4f}' for x in values]
            cells += [f'{x:+10.4f}' for x in gaps]
            rows.append((name, ''.join(cells)))
    if not rows:
        return ''
    head = ''.join(f'{x:>10}' for x in (main, *others))
    head += ''.join(f'{f"- {x}":>10}' for x in others)
    width = max(map(len, ['metric', *(name for name, _ in rows)]))
    return '\n'.join(
        f'EMA: {name:{width}}{cells}'
        for name, cells in [('metric', head), *rows]
    )


@contextlib.contextmanager
def same_randomness() -> Iterator[None]:
    """Run the body; random generators are then as they were before."""
    import numpy as np  # here, as nothing else in training/ needs it

    python, numpy = random.getstate(), np.random.get_state()
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = [torch.cuda.current_device()] if on_gpu else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Run the body; the model is then as it was, but for its parameters.

    What an evaluation leaves behind is undone: a frame that the model
    remembers, layers that a hook has fused, statistics in buffers. Attributes
    are kept one level deep: a list gets its items back, an object that the
    body changed inside stays changed.
    """
    # torch's wrappers (FSDP) keep there what one forward pass sets up for all
    modules = [
        module
        for module in model.modules()
        if not any(
            kind.__module__.startswith('torch.distributed.')
            for kind in type(module).__mro__
        )
    ]
    before = [(vars(module), dict(vars(module))) for module in modules]
    contents = [
        (value, value.copy())
        for _, attributes in before
        for value in attributes.values()
        if type(value) in _CONTAINERS
    ]
    buffers = [
        (buffer, buffer.detach().clone())
        for buffer in model.buffers()
        if writable(buffer)
    ]
    try:
        # left before attributes come back, which tell what is merged
        with same_randomness(), same_modes(model):
            yield
    finally:
        for live, attributes in before:
            live.clear()
            live.update(attributes)
        for value, content in contents:
            # the same object: handles of hooks refer to it
            value.clear()
            add = value.extend if hasattr(value, 'extend') else value.update
            add(content)
        for buffer, content in buffers:
            if buffer.shape != content.shape:
                buffer.resize_(content.shape)  # observers do that in place
            buffer.data.copy_(content)
