"""Where raw and average weights are in a checkpoint of mmengine's layout.

``state_dict`` holds the averages, so that the file deploys as it is;
``ema_state_dict`` holds ``steps`` and the raw weights as ``module.<name>``:
the layout of mmengine's own ``EMAHook``. ``ema_meta`` says who wrote it, how.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Dict, Mapping, MutableMapping, Optional, Tuple

import torch
from torch import Tensor

from mmdet_ema.core.errors import CheckpointError
from mmdet_ema.core.state import read_count

WEIGHTS = 'state_dict'
EMA = 'ema_state_dict'
META = 'ema_meta'
STEPS = 'steps'
PREFIX = 'module.'
FORMAT_VERSION = 1
_ROLES = {WEIGHTS: 'average', EMA: 'raw'}


@dataclass
class EMAPart:
    """The EMA part of a checkpoint.

    Attributes:
        averages: Averages by name, as in ``state_dict``.
        raws: Raw weights by name.
        steps: Steps that the averages have seen.
        meta: ``ema_meta``; empty in a file of another writer.
    """

    averages: Dict[str, Any]
    raws: Dict[str, Any]
    steps: int
    meta: Dict[str, Any] = field(default_factory=dict)

    def tensors(self, half: Mapping[str, Any]) -> Dict[str, Tensor]:
        """Return the tensors of one half; extra state of modules is not."""
        return {k: v for k, v in half.items() if isinstance(v, Tensor)}


def pack(
    checkpoint: MutableMapping[str, Any],
    averages: Mapping[str, Tensor],
    raws: Mapping[str, Tensor],
    steps: int,
    meta: Mapping[str, Any],
) -> None:
    """Give a checkpoint its EMA part, in place.

    Every tensor is put into host memory; names that share one tensor share
    it in the file too.

    Args:
        checkpoint: A checkpoint whose ``state_dict`` holds the live weights.
        averages: Averages by name; names left out average to themselves.
        raws: Raw weights by name; names left out are those that are live.
        steps: Steps that the averages have seen.
        meta: What else to say in ``ema_meta``: plain values only.
    """
    live = checkpoint[WEIGHTS]
    host = _Host()
    ema: Dict[str, Any] = OrderedDict({STEPS: torch.tensor(steps)})
    for name, value in live.items():
        ema[PREFIX + name] = host(raws.get(name, value))
        live[name] = host(averages.get(name, value))
    checkpoint[EMA] = ema
    checkpoint[META] = {
        'format_version': FORMAT_VERSION,
        'roles': dict(_ROLES),
        'steps': steps,
        **meta,
    }


def unpack(checkpoint: Mapping[str, Any]) -> Optional[EMAPart]:
    """Return the EMA part of a checkpoint; the checkpoint is not changed.

    Args:
        checkpoint: What was read from a file.

    Returns:
        The part, or None if there is none.

    Raises:
        CheckpointError: If there is one that cannot be understood.
    """
    ema = checkpoint.get(EMA)
    if ema is None:
        return None
    weights = checkpoint.get(WEIGHTS)
    if not isinstance(ema, Mapping) or STEPS not in ema:
        raise CheckpointError(
            f'the {EMA!r} of the checkpoint has no {STEPS!r}; it was not '
            f'written by an EMAHook of this generation. Load the file with '
            f'load_from (no resume) to start from its weights.'
        )
    meta = checkpoint.get(META) or {}
    if not isinstance(weights, Mapping) or not isinstance(meta, Mapping):
        raise CheckpointError(
            f'{WEIGHTS!r} or {META!r} of the checkpoint is no dict; the file '
            f'is damaged. Take another checkpoint.'
        )
    _check_meta(meta)
    raws = {k[len(PREFIX) :]: v for k, v in ema.items() if _is_raw(k)}
    averages = {_plain_name(k, raws): v for k, v in weights.items()}
    return EMAPart(averages, raws, read_count(ema, STEPS), dict(meta))


def put_raw(checkpoint: MutableMapping[str, Any], part: EMAPart) -> None:
    """Make ``state_dict`` hold the raw weights, for the framework to load.

    Args:
        checkpoint: The checkpoint, changed in place.
        part: Its EMA part.

    Raises:
        CheckpointError: If it lacks the raw weights of some tensors.
    """
    weights = checkpoint[WEIGHTS]
    missing = [name for name in part.averages if name not in part.raws]
    if missing:
        raise CheckpointError(
            f'the checkpoint holds no raw weights of {len(missing)} tensors '
            f'({", ".join(missing[:3])}); training cannot resume from it, '
            f"nor can they be evaluated. Use load_from, or evaluate='ema'."
        )
    replaced = OrderedDict(
        (name, part.raws[_plain_name(name, part.raws)]) for name in weights
    )
    if hasattr(weights, '_metadata'):
        replaced._metadata = weights._metadata  # type: ignore[attr-defined]
    checkpoint[WEIGHTS] = replaced


def _is_raw(key: str) -> bool:
    return key.startswith(PREFIX)


def _plain_name(name: str, names: Mapping[str, Any]) -> str:
    """Strip the prefix of a wrapper, as the framework does when it loads."""
    short = name[len(PREFIX) :] if name.startswith(PREFIX) else name
    return name if name in names else short


def _check_meta(meta: Mapping[str, Any]) -> None:
    roles = meta.get('roles', _ROLES)
    if roles != _ROLES:
        raise CheckpointError(
            f'{META} has roles={roles!r}, this mmdet_ema reads {_ROLES}; the '
            f'file is damaged, or install a newer one.'
        )
    version = meta.get('format_version', FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f'{META} has format_version={version!r}, this mmdet_ema reads up '
            f'to {FORMAT_VERSION}; install a newer one.'
        )


class _Host:
    """Brings tensors to host memory, each one once."""

    def __init__(self) -> None:
        self._done: Dict[Tuple[Any, ...], Tensor] = {}

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        if value.device.type == 'cpu':
            return value
        key = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in self._done:
            self._done[key] = value.cpu()
        return self._done[key]
