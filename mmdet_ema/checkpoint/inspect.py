"""Say what is in a checkpoint: which weights, of which kind, how far apart."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, Dict, List, Mapping, Optional

from mmdet_ema.checkpoint.compare import count_nonfinite, distances
from mmdet_ema.checkpoint.contents import (
    AVERAGE,
    Contents,
    Weights,
    read_contents,
)
from mmdet_ema.checkpoint.recipe import KEY
from mmdet_ema.errors import OptionError
from mmdet_ema.schedules import check_decay, window


def inspect(
    path: str, *, quick: bool = False, unsafe: bool = False
) -> Dict[str, Any]:
    """Return a report on a checkpoint: plain values, as ``--json`` prints.

    Args:
        path: A file of any known format.
        quick: Whether to read names, shapes and counters only, without
            checksums, distances and a look for NaN. Defaults to False.
        unsafe: Whether to run code that the file asks for. Defaults to False.

    Returns:
        ``path``, ``bytes``, ``format``, ``writer``, ``deployed``, ``notes``;
        ``sets`` by name: ``role`` and its ``evidence``, ``updates`` (n),
        ``schedule``, ``decay`` and ``window`` at n, ``tensors``,
        ``parameters`` (elements, tied ones once), ``bytes``, ``dtypes``,
        ``tied``, ``nonfinite``, and ``distance`` from the raw weights:
        ``total`` and by ``modules``. ``collisions`` are names that mmcv's
        hook takes for one. ``recipe``, if it has one.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    contents = read_contents(path, unsafe=unsafe, check=not quick)
    names = [k for x in contents.sets.values() for k in x.tensors]
    report: Dict[str, Any] = {
        'path': path,
        'bytes': os.path.getsize(path),
        'format': contents.format,
        'writer': contents.writer,
        'deployed': contents.deployed,
        'notes': list(contents.notes),
        'sets': {
            name: _of_set(contents, name, quick) for name in contents.sets
        },
        'collisions': _alike({name: name.replace('.', '_') for name in names}),
        'rest': sorted(contents.rest),
    }
    recipe = contents.meta.get(KEY) or contents.rest.get(KEY)
    if recipe:
        report['recipe'] = recipe
    return report


def _of_set(contents: Contents, name: str, quick: bool) -> Dict[str, Any]:
    weights = contents.sets[name]
    unique = {id(x): x for x in weights.tensors.values()}
    dtypes = Counter(str(x.dtype).split('.')[-1] for x in unique.values())
    report: Dict[str, Any] = {
        'role': weights.role,
        'evidence': weights.evidence,
        'updates': weights.updates,
        'steps': weights.steps,
        'interval': weights.interval,
        'skipped': weights.skipped,
        'schedule': weights.schedule,
        **_decay(weights),
        'tensors': len(weights.tensors),
        'parameters': sum(x.numel() for x in unique.values()),
        'bytes': sum(x.numel() * x.element_size() for x in unique.values()),
        'dtypes': dict(dtypes),
        'tied': _alike({k: id(x) for k, x in weights.tensors.items()}),
    }
    if quick:
        return report
    bad = {k: count_nonfinite(x) for k, x in weights.tensors.items()}
    report['nonfinite'] = {k: n for k, n in bad.items() if n}
    if weights.role == AVERAGE and contents.raw is not None:
        found = distances(weights.tensors, contents.raw.tensors)
        total = found.pop('')
        report['distance'] = {'total': total, 'modules': found}
    return report


def _decay(weights: Weights) -> Dict[str, Optional[float]]:
    """Return the decay of update n, and its window in steps."""
    decay = None
    try:
        schedule = weights.build_schedule()
        if schedule is not None and weights.steps:
            decay = check_decay(schedule, weights.steps)
    except OptionError:
        pass  # a file may say anything
    return {
        'decay': decay,
        'window': None if decay is None else window(decay),
    }


def _alike(keys: Mapping[str, Any]) -> List[List[str]]:
    """Return the groups of names that have the same key."""
    groups: Dict[Any, List[str]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    return [x for x in groups.values() if len(x) > 1]
