"""Files of the EMA hooks of mmcv 1.x and mmdet 2, and BEVDet's pair of files.

One flat ``state_dict``: beside ``a.b.c`` a buffer ``ema_a_b_c``; a file that
was saved by epoch has the averages in the plain names, one saved by iteration
the raw weights. mmcv's hook averages parameters, mmdet's whole state dicts.
"""

from __future__ import annotations

import functools
import os
import re
from typing import Any, Dict, List, Optional, Tuple

from mmdet_ema.checkpoint import mmcv1
from mmdet_ema.checkpoint.compare import STATISTICS
from mmdet_ema.checkpoint.contents import (
    AVERAGE,
    RAW,
    Content,
    Contents,
    Format,
    Written,
    as_count,
    complete,
    is_weights,
    meta_of,
    rest_of,
    weights_of,
)
from mmdet_ema.checkpoint.format import EMA, PREFIX, STEPS, WEIGHTS
from mmdet_ema.checkpoint.mapped import read_file
from mmdet_ema.errors import CheckpointError

_SECOND = re.compile(r'(.*(?:epoch|iter)_\d+)_ema(\.\w+)$')
_FIRST = re.compile(r'(.*(?:epoch|iter)_\d+)(\.\w+)$')


def _has_buffers(content: Content, path: str) -> bool:
    weights: Any = content.get(WEIGHTS)
    if not is_weights(weights):
        return False
    named = {k: x for k, x in weights.items() if isinstance(k, str)}
    return bool(mmcv1.names_by_buffer(named))


def _read_buffers(content: Content, path: str) -> Contents:
    whole = dict(content)
    found = mmcv1.convert_buffers(whole, filename=path)
    assert found is not None  # _has_buffers() says so
    said = f'assumed: {found.roles}' if found.warnings else found.roles
    meta = meta_of(content)
    steps = as_count(whole[EMA].pop(STEPS)) if 'iter' in meta else None
    if steps is not None and mmcv1.is_of_iteration(path):
        steps += 1  # mmcv writes the number before it counts up
    sets = {
        'raw': weights_of(whole[EMA], PREFIX, EMA, role=RAW, evidence=said),
        'ema': weights_of(
            whole[WEIGHTS], role=AVERAGE, evidence=said, updates=steps
        ),
    }
    sets['raw'].metadata = sets['ema'].metadata
    # only mmdet's hooks average these
    names = [x for x in map(str, content[WEIGHTS]) if x.endswith(STATISTICS)]
    averaged = any(name.startswith('ema_') for name in names)
    name = 'mmdet2' if averaged or not names else 'mmcv1'
    deployed = 'ema' if found.is_swapped else 'raw'
    version = meta.get('mmcv_version')
    written = f' (mmcv {version})' if isinstance(version, str) else ''
    return Contents(
        *(path, name, f"mmcv's or mmdet's EMA hook{written}", sets, deployed),
        *(meta, rest_of(content, WEIGHTS, 'meta')),
        [w.replace('EMA: ', '', 1) for w in found.warnings],
    )


def _write_buffers(contents: Contents, out: str, whole_state: bool) -> Written:
    raw, average = contents.both()
    lost = []
    # the path that is written decides the roles, as it does for the reader
    swapped = not mmcv1.is_of_iteration(out)
    plain, held = (average, raw) if swapped else (raw, average)
    state: Any = plain.state_dict()
    by_buffer: Dict[str, List[str]] = {}
    for name in plain.tensors:
        if whole_state or not name.endswith(STATISTICS):
            buffer = 'ema_' + name.replace('.', '_')
            by_buffer.setdefault(buffer, []).append(name)
        else:  # that hook leaves them as they are in the model
            state[name] = raw.tensors[name]
    for buffer, names in by_buffer.items():
        if len(names) == 1:
            state[buffer] = held.tensors[names[0]]
            continue
        state.update((name, raw.tensors[name]) for name in names)
        lost.append(
            f'averages of {", ".join(names)}, whose buffers have one name'
        )
    if not whole_state:
        lost.append('averages of BatchNorm statistics')
    meta = dict(contents.meta)
    # mmcv's runner by iterations counts up after it has saved
    meta['iter'] = max((average.updates or 0) - (not swapped), 0)
    meta.setdefault('epoch', 0)
    return {'meta': meta, WEIGHTS: state, **contents.rest}, lost


def _second_of(path: str) -> Optional[str]:
    """Return the path of the averages beside a raw file of BEVDet's."""
    match = _FIRST.match(path) or _FIRST.match(os.path.realpath(path))
    return f'{match[1]}_ema{match[2]}' if match else None


def _first_of(path: str) -> Optional[str]:
    match = _SECOND.match(path) or _SECOND.match(os.path.realpath(path))
    return f'{match[1]}{match[2]}' if match else None


def _is_pair(content: Content, path: str) -> bool:
    if not is_weights(content.get(WEIGHTS)):
        return False
    if mmcv1.is_second_file(content):
        return True
    beside = _second_of(path)
    if 'meta' not in content or beside is None or not os.path.isfile(beside):
        return False
    return mmcv1.is_second_file(read_file(beside, check=False))


def _read_pair(content: Content, path: str) -> Contents:
    second_path = str(_second_of(path))
    if mmcv1.is_second_file(content):
        second, second_path, first_path = content, path, _first_of(path)
        first: Content = {}
        if first_path is not None and os.path.isfile(first_path):
            first = read_file(first_path)
            if not is_weights(first.get(WEIGHTS)):
                first = {}
    else:
        first, second = content, read_file(second_path)
    said = 'BEVDet writes averages and updates into a second file, *_ema'
    count = as_count(second[mmcv1.UPDATES])
    average = weights_of(
        second[WEIGHTS], role=AVERAGE, evidence=said, updates=count
    )
    notes = ["n starts at the hook's init_updates, which is not in the file."]
    sets = {'ema': average}
    if first:
        raw = weights_of(first[WEIGHTS], role=RAW, evidence=said)
        notes += complete(average, raw)
        sets = {'raw': raw, 'ema': average}
        notes += mmcv1.other_moments(second, meta_of(first), second_path)
    else:
        notes.append('the raw weights are in the file beside: it is not there')
    deployed = 'raw' if first is content else 'ema'
    return Contents(
        *(path, 'bevdet', "BEVDet's MEGVIIEMAHook", sets, deployed),
        *(meta_of(first), rest_of(first, WEIGHTS, 'meta'), notes),
    )


def _write_first(contents: Contents, out: str) -> Written:
    raw, _ = contents.both()
    content = {'meta': dict(contents.meta), WEIGHTS: raw.state_dict()}
    return {**content, **contents.rest}, []


def _write_second(contents: Contents, out: str) -> Tuple[str, Dict[str, Any]]:
    path = _second_of(out)
    if path is None:
        raise CheckpointError(
            f"{out!r} is no name of BEVDet's pair of files; write to "
            f'epoch_N.pth or iter_N.pth: the averages go to epoch_N_ema.pth '
            f'beside it.'
        )
    _, average = contents.both()
    unit = 'iter' if 'iter_' in os.path.basename(out) else 'epoch'
    number = int(re.findall(r'\d+', os.path.basename(out))[-1])
    return path, {
        unit: number,
        WEIGHTS: average.state_dict(),
        mmcv1.UPDATES: average.updates or 0,
    }


FORMATS = [
    Format(
        'bevdet',
        "BEVDet's MEGVIIEMAHook: two files",
        _is_pair,
        _read_pair,
        _write_first,
        _write_second,
    ),
    Format(
        'mmdet2',
        "mmdet 2's EMA hooks",
        _has_buffers,
        _read_buffers,
        functools.partial(_write_buffers, whole_state=True),
    ),
    Format(
        'mmcv1',
        "mmcv 1.x's EMAHook",
        lambda content, path: False,  # the one above reads both
        _read_buffers,
        functools.partial(_write_buffers, whole_state=False),
    ),
]
