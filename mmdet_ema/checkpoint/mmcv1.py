"""Checkpoints of mmcv 1.x: ours, and those of other EMA hooks.

mmcv keeps what hooks want to find again in ``meta['hook_msgs']``: our EMA part
moves between there and the layout of :mod:`mmdet_ema.checkpoint.format`.

mmcv's own EMA hook and mmdet 2's two keep root buffers ``ema_a_b_c`` beside a
parameter ``a.b.c`` (mmdet's, beside buffers too), in one flat ``state_dict``.
They swap the two after an epoch and back before the next one.

BEVDet's ``MEGVIIEMAHook`` writes ``epoch_N_ema.pth`` (or ``iter_N_ema.pth``)
beside a raw ``epoch_N.pth``: with ``epoch`` or ``iter``, ``state_dict`` (the
averages) and ``updates`` (its count, which starts at ``init_updates``).
"""

from __future__ import annotations

import ast
import os
from collections import OrderedDict
from typing import (
    Any,
    Dict,
    Iterable,
    List,
    Mapping,
    MutableMapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from torch import Tensor

from mmdet_ema.checkpoint.format import (
    EMA,
    META,
    MORE,
    PREFIX,
    STEPS,
    WEIGHTS,
    check_names,
    pack,
    plain_name,
)
from mmdet_ema.checkpoint.mapped import read_file
from mmdet_ema.errors import CheckpointError

MESSAGE = 'EMAHook'
UPDATES = 'updates'
ITERATION = 'iteration'
HOLDS = ('ema', 'raw')

_DATA = (
    *(ast.Module, ast.Assign, ast.Expr, ast.Constant, ast.Name, ast.keyword),
    *(ast.Dict, ast.List, ast.Set, ast.Tuple, ast.Load, ast.Store),
    *(ast.UnaryOp, ast.USub, ast.UAdd),
)

Checkpoint = MutableMapping[str, Any]
_PART = (EMA, META, MORE)


def put_message(
    messages: MutableMapping[str, Any], checkpoint: Checkpoint
) -> None:
    """Move the EMA part of a checkpoint into ``meta['hook_msgs']``."""
    keys = [key for key in _PART if key in checkpoint]
    messages[MESSAGE] = {key: checkpoint.pop(key) for key in keys}


def take_message(checkpoint: Checkpoint) -> None:
    """Move the EMA part back to the top of a checkpoint, if it has one."""
    meta = checkpoint.get('meta')
    messages = meta.get('hook_msgs', {}) if isinstance(meta, dict) else {}
    check_names(messages, "'hook_msgs' in the meta")
    part = messages.pop(MESSAGE, {})
    check_names(part, f"{MESSAGE!r} in 'hook_msgs'")
    checkpoint.update({k: part[k] for k in _PART if k in part})


def put_iteration(checkpoint: Checkpoint, iteration: int) -> None:
    """Note the iterations that are done; mmcv's ``iter`` may be one less."""
    checkpoint[META][ITERATION] = iteration


def iteration_of(checkpoint: Checkpoint) -> int:
    """Return the iterations done, 0 if the checkpoint does not tell."""
    meta = checkpoint.get(META)
    found = meta.get(ITERATION) if isinstance(meta, Mapping) else None
    return found if isinstance(found, int) and found > 0 else 0


def drop(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Drop names from both halves of an EMA part, if there is one.

    mmcv saves buffers that the model itself neither saves nor loads.
    """
    halves = [checkpoint.get(WEIGHTS), checkpoint.get(EMA)]
    more: Any = checkpoint.get(MORE, {})
    if not all(isinstance(half, dict) for half in (*halves, more)):
        return
    # what is wrong with one is found when the part is read
    halves += [x.get(WEIGHTS) for x in more.values() if isinstance(x, dict)]
    for half in filter(None, halves):
        for name in names:
            half.pop(name, None)
            half.pop(PREFIX + name, None)


def take_program(checkpoint: Checkpoint) -> Optional[str]:
    """Take the config's text out of a checkpoint, and return it, if it runs.

    A runner of mmcv runs the text when it resumes, to compare the number of
    GPUs. What mmcv's ``Config.pretty_text`` writes are plain values, which
    stay.
    """
    text = checkpoint['meta'].get('config')
    try:
        nodes = ast.walk(ast.parse(text if isinstance(text, str) else ''))
        if '_base_' not in str(text) and all(map(_is_data, nodes)):
            return None
    # Python 3.8 has too little stack for hundreds of brackets: MemoryError
    except (MemoryError, RecursionError, SyntaxError, ValueError):
        pass
    return checkpoint['meta'].pop('config')  # type: ignore[no-any-return]


def _is_data(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return getattr(node.func, 'id', '') == 'dict' and not node.args
    return isinstance(node, _DATA)


class Converted(NamedTuple):
    """Whether the plain keys hold the averages, also in words; doubts."""

    is_swapped: bool
    roles: str
    line: str
    warnings: List[str]


def convert_buffers(
    checkpoint: Checkpoint,
    tied: Sequence[Sequence[str]] = (),
    filename: str = '',
    holds: Optional[str] = None,
) -> Optional[Converted]:
    """Turn the ``ema_*`` buffers of mmcv's or mmdet's hook into an EMA part.

    Args:
        checkpoint: What was read from a file, changed in place.
        tied: Names that share one tensor in the model, group by group.
        filename: Name of the file, which says what wrote it.
        holds: What the plain keys hold where the file does not tell, 'ema'
            or 'raw'; None to go by the name of the file.

    Returns:
        What was found and assumed; None if there are no such buffers, and
        then nothing is changed.
    """
    if WEIGHTS not in checkpoint:
        return None
    weights = checkpoint[WEIGHTS]
    check_names(weights, WEIGHTS)
    groups = names_by_buffer(weights)
    if not groups:
        return None
    # of tied names the hooks swap each one; the first buffer holds what was
    # swapped out of the tensor
    first = {name: names[0] for names in tied for name in names}
    own = {n[0]: weights[b] for b, n in groups.items() if len(n) == 1}
    pairs = {
        k: own[first.get(k, k)] for k in weights if first.get(k, k) in own
    }
    swapped, reason, warnings = _is_swapped(weights, pairs, filename, holds)
    plain = {k: v for k, v in weights.items() if k not in groups}
    raws = {**plain, **pairs} if swapped else plain
    several = {b: names for b, names in groups.items() if len(names) > 1}
    for buffer, names in several.items() if swapped else ():
        # swapped through one buffer, one after the other: each holds the raw
        # weights of the one before, the buffer those of the last
        rotated = [*(weights[n] for n in names[1:]), weights[buffer]]
        raws.update(zip(names, rotated))
    averages = OrderedDict(raws)
    for name in pairs:
        if isinstance(plain[name], Tensor) and plain[name].is_floating_point():
            averages[name] = plain[name] if swapped else pairs[name]
    if hasattr(weights, '_metadata'):
        averages._metadata = weights._metadata  # type: ignore[attr-defined]
    meta = checkpoint.get('meta')
    steps = meta.get('iter', 0) if isinstance(meta, Mapping) else 0
    checkpoint[WEIGHTS] = averages
    checkpoint[EMA] = {STEPS: steps, **{PREFIX + k: raws[k] for k in raws}}
    if several:
        collided = ', '.join(x for names in several.values() for x in names)
        warnings.append(
            f'EMA: that hook kept one average for several of these tensors, '
            f'whose names differ in "." and "_" only: {collided}. It averaged '
            f'none of them; their average starts from the raw weights.'
        )
    kind = 'the averages' if swapped else 'the raw weights'
    roles = f'its plain keys are taken as {kind}, because {reason}'
    line = (
        f"EMA: the checkpoint was written by mmcv's or mmdet's own EMA hook "
        f'(n={steps}); {roles}.'
    )
    return Converted(swapped, roles, line, warnings)


def names_by_buffer(weights: Mapping[str, Any]) -> Dict[str, List[str]]:
    """Return the names whose averages, or raw weights, a buffer may hold."""
    # names that differ in "." and "_" only collide in one buffer
    buffers = {k for k in weights if k.startswith('ema_') and '.' not in k}
    groups: Dict[str, List[str]] = {}
    for name in weights:
        buffer = 'ema_' + name.replace('.', '_')
        if name not in buffers and buffer in buffers:
            shapes = [getattr(weights[x], 'shape', x) for x in (name, buffer)]
            if shapes[0] == shapes[1]:
                groups.setdefault(buffer, []).append(name)
    return groups


def is_of_iteration(path: str) -> bool:
    """Return whether a file's name says that it was saved by iteration.

    mmcv's latest.pth is a link, whose target has the name.
    """
    names = map(os.path.basename, (path, os.path.realpath(path)))
    return any('_iter_' in f'_{name}' for name in names)


def _is_swapped(
    weights: Mapping[str, Any],
    pairs: Mapping[str, Any],
    filename: str,
    holds: Optional[str],
) -> Tuple[bool, str, List[str]]:
    """Return whether a file was saved swapped, why, and what to warn of."""
    for name, buffer in pairs.items():
        # mmdet 2's hooks swap BatchNorm's counters, and do not count
        if name.endswith('num_batches_tracked'):
            plain, held = int(weights[name]), int(buffer)
            if plain != held:
                reason = f'the counter {name} is {plain}, {held} in its buffer'
                return plain < held, reason, []
    if holds is not None:
        return holds == 'ema', f'state_dict_holds={holds!r} says so', []
    if is_of_iteration(filename):
        name = os.path.basename(filename)
        return False, f'{name!r} was saved by iteration, between swaps', []
    warning = (
        'EMA: the file does not tell whether its plain keys are the averages; '
        'they are the raw weights if that hook had a priority of 50 or more '
        '(of 71 for best_*.pth). If so, give our hook '
        "state_dict_holds='raw', else 'ema'."
    )
    return True, 'it was saved by epoch', [warning]


def is_second_file(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether what was read is the second file of BEVDet's hook."""
    return UPDATES in checkpoint and WEIGHTS in checkpoint


def add_averages(
    checkpoint: Checkpoint, path: str, init_updates: int
) -> List[str]:
    """Give a raw checkpoint, in place, the averages of a second file.

    The file's count starts at the hook's ``init_updates``. Returns sentences
    on what may be wrong.
    """
    second = read_file(path)
    updates, weights = second.get(UPDATES), second.get(WEIGHTS)
    if not isinstance(updates, int) or not isinstance(weights, Mapping):
        raise CheckpointError(
            f"resume={path!r} is no EMA file of BEVDet's MEGVIIEMAHook, with "
            f"'{UPDATES}' and '{WEIGHTS}' in it; give the epoch_N_ema.pth "
            f'or iter_N_ema.pth of that hook, or leave resume out.'
        )
    if updates < init_updates:
        raise CheckpointError(
            f'init_updates={init_updates} is more than the {updates} updates '
            f'that {path!r} has seen; use the init_updates of the run that '
            f'wrote it.'
        )
    raws = checkpoint[WEIGHTS]
    found = {plain_name(k, raws): v for k, v in weights.items()}
    unknown = [name for name in found if name not in raws]
    if unknown:
        raise CheckpointError(
            f'{path!r} has averages of {len(unknown)} tensors '
            f'({", ".join(unknown[:3])}) that the checkpoint does not have; '
            f'give the file beside it, of the same run.'
        )
    # that hook leaves integers as they were at the start
    averages = {
        name: value
        for name, value in found.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    pack(checkpoint, averages, {}, updates - init_updates, {})
    doubts = []
    missing = sorted(raws.keys() - found.keys())
    if missing:
        doubts.append(
            f'{len(missing)} tensors of the checkpoint are not in {path!r} '
            f'({", ".join(missing[:3])}); their average starts from the raw '
            f'weights.'
        )
    return doubts + other_moments(second, checkpoint.get('meta') or {}, path)


def other_moments(
    second: Mapping[str, Any], meta: Mapping[str, Any], path: str
) -> List[str]:
    """Return a sentence if a second file was not written with the first."""
    # a hook may note the number before or after the runner counts up, and
    # mmcv's own `iter` may be one less than the iterations done
    for unit, late in (('epoch', 0), ('iter', 1)):
        theirs, ours = second.get(unit), meta.get(unit)
        if not isinstance(theirs, int) or not isinstance(ours, int):
            continue
        if not -1 <= theirs - ours <= late:
            return [
                f'{path!r} was written at {unit} {theirs}, the checkpoint at '
                f'{unit} {ours}: averages and raw weights of different '
                f'moments. Give the file beside the checkpoint.'
            ]
    return []
