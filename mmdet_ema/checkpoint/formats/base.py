"""What a format is, and what several of them share."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from torch import Tensor

from mmdet_ema.checkpoint.contents import Contents, Weights
from mmdet_ema.errors import CheckpointError

Content = Mapping[str, Any]
Written = Tuple[Dict[str, Any], List[str]]


@dataclass(frozen=True)
class Format:
    """A format of checkpoints.

    Attributes:
        name: As ``--to`` takes it.
        writer: What writes it, for people.
        recognise: Whether what was read from a file has this format.
        read: Makes sense of it; the path says what some formats leave to the
            name of the file.
        write: Returns what is to be saved under a path, and words on what
            else is lost; None where the format is only read.
        write_second: Returns path and content of a second file, for what is
            written to a path; None where there is one file.
        holds: Which sets of weights: ``'all'``, ``'both'`` (raw weights and
            the main average) or ``'one'``.
        has_n: Whether it holds n; None where the recipe does.
        has_schedule: Whether it holds the schedule, or the recipe does.
    """

    name: str
    writer: str
    recognise: Callable[[Content, str], bool]
    read: Callable[[Content, str], Contents]
    write: Optional[Callable[[Contents, str], Written]] = None
    write_second: Optional[
        Callable[[Contents, str], Tuple[str, Dict[str, Any]]]
    ] = None
    holds: str = 'both'
    has_n: Optional[bool] = True
    has_schedule: bool = False


def is_weights(value: Any) -> bool:
    """Return whether a value is a dict with tensors in it."""
    return isinstance(value, Mapping) and any(
        isinstance(x, Tensor) for x in value.values()
    )


def complete(average: Weights, raw: Weights) -> List[str]:
    """Give averages the names that only the raw weights have, in place.

    Names of one raw tensor are names of one average; what was not averaged
    has its raw weights. Returns a sentence on the latter.
    """
    known = {
        id(tensor): average.tensors[name]
        for name, tensor in raw.tensors.items()
        if name in average.tensors
    }
    missing, tensors = [], {}
    for name, tensor in raw.tensors.items():
        if name in average.tensors:
            tensors[name] = average.tensors[name]
        elif id(tensor) in known:
            tensors[name] = known[id(tensor)]
        else:
            tensors[name] = tensor
            missing.append(name)
    average.tensors = {**tensors, **average.tensors}
    if not missing:
        return []
    return [
        f'{len(missing)} tensors have no average there and keep their raw '
        f'weights: {", ".join(missing[:3])}'
        f'{", ..." if len(missing) > 3 else ""}.'
    ]


def state_dict(weights: Weights, prefix: str = '') -> Dict[str, Any]:
    """Return the weights as a module's ``state_dict`` has them."""
    state: Any = OrderedDict(
        (prefix + name, tensor) for name, tensor in weights.tensors.items()
    )
    if weights.metadata is not None and not prefix:
        state._metadata = weights.metadata
    return state  # type: ignore[no-any-return]


def meta_of(content: Content) -> Dict[str, Any]:
    """Return ``meta`` of a checkpoint of OpenMMLab; a copy."""
    meta = content.get('meta')
    return dict(meta) if isinstance(meta, Mapping) else {}


def rest_of(content: Content, *known: str) -> Dict[str, Any]:
    """Return what is not among the known keys."""
    return {str(k): x for k, x in content.items() if k not in known}


def both(contents: Contents) -> Tuple[Weights, Weights]:
    """Return raw weights and main average, for a file that needs both."""
    name = contents.average
    if contents.raw is None or name is None:
        found = ', '.join(contents.sets)
        raise CheckpointError(
            f'{contents.path!r} ({contents.format}) has only: {found}; this '
            f'format needs raw weights and averages. To keep one set of '
            f'weights use extract.'
        )
    raw, average = contents.raw, contents.sets[name]
    alone = sorted(raw.tensors.keys() ^ average.tensors.keys())
    if alone:
        raise CheckpointError(
            f'{contents.path!r} ({contents.format}) has raw weights or '
            f'averages alone of {len(alone)} tensors '
            f'({", ".join(alone[:3])}); the file is damaged, or of two '
            f'models.'
        )
    return raw, average
