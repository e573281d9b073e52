"""Files of mmengine's own ``EMAHook``, and of mmpretrain's."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Dict

import torch

from mmdet_ema.checkpoint.contents import AVERAGE, RAW, Contents, weights_of
from mmdet_ema.checkpoint.format import (
    EMA,
    META,
    MORE,
    PREFIX,
    STEPS,
    WEIGHTS,
    unpack,
)
from mmdet_ema.checkpoint.formats.base import (
    Content,
    Format,
    Written,
    both,
    lost_sets,
    meta_of,
    rest_of,
    state_dict,
)


def _recognise(content: Content, path: str) -> bool:
    return EMA in content


def _read(content: Content, path: str) -> Contents:
    part = unpack(content)
    assert part is not None  # it was recognised
    said = (
        f"mmengine's hook saves swapped: {WEIGHTS} holds the averages, "
        f'{EMA} {PREFIX}* the raw weights'
    )
    metadata = getattr(content[WEIGHTS], '_metadata', None)
    sets = {
        'raw': weights_of(part.raws, what=EMA, role=RAW, evidence=said),
        'ema': weights_of(
            part.averages,
            role=AVERAGE,
            evidence=said,
            updates=part.steps,
            steps=part.steps,
        ),
    }
    for weights in sets.values():
        weights.metadata = metadata
    meta = meta_of(content)
    version = meta.get('mmengine_version')
    return Contents(
        path,
        FORMAT.name,
        f'mmengine {version}' if isinstance(version, str) else 'mmengine',
        sets,
        'ema',
        meta,
        rest_of(content, WEIGHTS, EMA, 'meta'),
    )


def _write(contents: Contents, out: str) -> Written:
    raw, main = both(contents)
    updates = main.updates or 0
    ema: Dict[str, Any] = OrderedDict({STEPS: torch.tensor(updates)})
    ema.update(state_dict(raw, PREFIX))
    rest = {k: x for k, x in contents.rest.items() if k not in (META, MORE)}
    content = {
        'meta': dict(contents.meta),
        WEIGHTS: state_dict(main),
        EMA: ema,
        **rest,
    }
    lost = lost_sets(contents, 'raw', contents.average)
    if main.updates is None:
        lost.append('n, which is written as 0')
    if main.schedule:
        lost.append('the schedule')
    return content, lost


FORMAT = Format(
    'mmengine',
    "mmengine's or mmpretrain's EMAHook",
    _recognise,
    _read,
    _write,
)
