"""Which half of a file of mmcv's own EMA hooks is which.

The hooks swap averages and weights after an epoch and back before the next
one, so it depends on the runner, on what saves when, and on whether the EMA
hook came first. mmdet 2 puts the text of the config into the file: it is
read, never run.
"""

from __future__ import annotations

import ast
import os
from typing import Any, Dict, Mapping, NamedTuple, Optional

_EMA = ('EMAHook', 'ExpMomentumEMAHook', 'LinearMomentumEMAHook')
_PRIORITIES = {
    'HIGHEST': 0,
    'VERY_HIGH': 10,
    'HIGH': 30,
    'ABOVE_NORMAL': 40,
    'NORMAL': 50,
    'BELOW_NORMAL': 60,
    'LOW': 70,
    'VERY_LOW': 90,
    'LOWEST': 100,
}
# Python 3.8 has too little stack for hundreds of brackets: MemoryError
_UNREADABLE = (MemoryError, RecursionError, SyntaxError, ValueError)
_DATA = (
    *(ast.Module, ast.Assign, ast.Expr, ast.Constant, ast.Name, ast.keyword),
    *(ast.Dict, ast.List, ast.Set, ast.Tuple, ast.Load, ast.Store),
    *(ast.UnaryOp, ast.USub, ast.UAdd),
)
# of equal priority, custom hooks come after the one and before the other
_CHECKPOINT, _EVAL = 50, 71


class Roles(NamedTuple):
    """What the plain keys of a file hold.

    Attributes:
        plain_is_average: Whether they hold the averages, else raw weights.
        reason: Why, as the rest of a sentence after "because".
    """

    plain_is_average: bool
    reason: str


def find_roles(
    pairs: Mapping[str, Any], meta: Mapping[str, Any], filename: str = ''
) -> Roles:
    """Find out which half of a file is which.

    Args:
        pairs: The weights of the file, as ``{name: (plain, buffer)}``.
        meta: The ``meta`` of the file.
        filename: Name of the file.

    Returns:
        The roles, with the reason.
    """
    by_counters = _by_counters(pairs)
    if by_counters is not None:
        return by_counters
    config = read_config(meta.get('config'))
    name = os.path.basename(filename)
    by_config = _by_config(config, name) if config else None
    return by_config or _by_name(name)


def read_config(text: Any) -> Dict[str, Any]:
    """Read the literal top-level assignments of a config's text.

    Args:
        text: What mmcv's ``Config.pretty_text`` wrote; nothing is executed.

    Returns:
        Values by name; what is not literal is left out.
    """
    try:
        tree = ast.parse(text) if isinstance(text, str) else ast.parse('')
    except _UNREADABLE:
        return {}
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            if isinstance(target, ast.Name):
                found[target.id] = _value(node.value)
    return found


def take_program(checkpoint: Mapping[str, Any]) -> Optional[str]:
    """Take the config's text out of a checkpoint if it is a program.

    A runner of mmcv runs the text when it resumes, to compare the number of
    GPUs. What mmcv's ``Config.pretty_text`` writes are plain values.

    Args:
        checkpoint: A checkpoint, changed in place.

    Returns:
        What was taken out; None if the text holds plain values only.
    """
    text = checkpoint['meta'].get('config')
    try:
        tree = ast.parse(text) if isinstance(text, str) else ast.parse('')
        plain = '_base_' not in str(text) and all(
            map(_is_data, ast.walk(tree))
        )
    except _UNREADABLE:
        plain = False
    return None if plain else checkpoint['meta'].pop('config')


def _is_data(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return getattr(node.func, 'id', '') == 'dict' and not node.args
    return isinstance(node, _DATA)


def _by_counters(pairs: Mapping[str, Any]) -> Optional[Roles]:
    """Tell by BatchNorm's counters, which mmdet 2's hooks swap, not count."""
    for name, (plain, buffer) in pairs.items():
        if name.endswith('num_batches_tracked') and int(plain) != int(buffer):
            return Roles(
                int(plain) < int(buffer),
                f'the counter {name} is {int(plain)}, and '
                f'{int(buffer)} in its buffer',
            )
    return None


def _by_config(config: Mapping[str, Any], name: str) -> Optional[Roles]:
    runner = _typed(config.get('runner'), 'EpochBasedRunner')
    if runner == 'IterBasedRunner':
        return Roles(
            False, 'its config runs IterBasedRunner, which never swaps them'
        )
    saving = config.get('checkpoint_config') or {}
    best = name.startswith('best_')
    if not best and not _get(saving, 'by_epoch', True):
        return Roles(False, 'its config saves by iteration, between swaps')
    priority = _ema_priority(config.get('custom_hooks'))
    if priority is None:
        return None
    saver = 'EvalHook' if best else 'CheckpointHook'
    first = priority < (_EVAL if best else _CHECKPOINT)
    order = 'before' if first else 'after'
    return Roles(
        first,
        f'its config runs the EMA hook (priority {priority}) {order} the '
        f'{saver} that wrote the file',
    )


def _by_name(name: str) -> Roles:
    if '.iter_' in f'.{name}' or '_iter_' in name:
        return Roles(
            False,
            f'{name!r} was saved by iteration, and no config in it says more',
        )
    return Roles(
        True, 'it was saved by epoch, and no config in it says otherwise'
    )


def _ema_priority(hooks: Any) -> Optional[int]:
    """Return the priority of the EMA hook of a config, None if unknown."""
    for hook in hooks if isinstance(hooks, list) else [hooks]:
        if _typed(hook, '') in _EMA:
            priority = _get(hook, 'priority', 'NORMAL')
            if isinstance(priority, str):
                return _PRIORITIES.get(priority.upper())
            return priority if isinstance(priority, int) else None
    return None


def _typed(value: Any, default: str) -> str:
    return str(_get(value, 'type', default))


def _get(value: Any, key: str, default: Any) -> Any:
    return value.get(key, default) if isinstance(value, dict) else default


def _value(node: ast.expr) -> Any:
    """Evaluate literals, and ``dict(key=value)`` as mmcv writes them."""
    if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'dict':
        return {k.arg: _value(k.value) for k in node.keywords if k.arg}
    if isinstance(node, ast.Dict):
        items = zip(node.keys, node.values)
        return {_value(k): _value(v) for k, v in items if k is not None}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return None
