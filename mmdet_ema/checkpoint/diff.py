"""Say what differs between two checkpoints, by tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import List, Optional, Tuple

from torch import Tensor

from mmdet_ema.checkpoint.compare import gap
from mmdet_ema.checkpoint.contents import Contents, read_contents
from mmdet_ema.errors import OptionError


@dataclass
class Difference:
    """One tensor that differs.

    Attributes:
        weights: Name of the weights in the first file.
        kind: ``'only in A'``, ``'only in B'``, ``'shape'``, ``'dtype'`` or
            ``'values'``.
        largest: Largest absolute difference; None unless values differ.
        relative: ``||A - B|| / ||B||``; None unless values differ.
    """

    weights: str
    name: str
    kind: str
    detail: str
    largest: Optional[float] = None
    relative: Optional[float] = None


@dataclass
class Comparison:
    """Which weights of A and B were compared, and what differs.

    ``compared`` is how many tensors are in both; ``unpaired`` are weights
    that only one of the files has.
    """

    pairs: List[Tuple[str, str]]
    compared: int
    differences: List[Difference]
    unpaired: List[str]


def diff(
    first: str,
    second: str,
    *,
    weights: Optional[str] = None,
    against: Optional[str] = None,
    atol: float = 0.0,
    unsafe: bool = False,
) -> Comparison:
    """Compare two checkpoints of any formats, tensor by tensor.

    Args:
        first: A file.
        second: A file; it may be the same one.
        weights: Which weights of the first. Defaults to all that have a
            counterpart of their name in the second; where none has, to what
            each deploys.
        against: Which weights of the second. Defaults to those of the same
            name.
        atol: Largest absolute difference that is none. Defaults to 0.
        unsafe: Whether to run code that the files ask for. Defaults to False.

    Raises:
        CheckpointError: If a file cannot be read, or lacks the weights.
        OptionError: If ``atol`` is out of range.
    """
    if not 0 <= atol < math.inf:
        raise OptionError(f'--atol {atol!r} is out of range; use 0 or more.')
    a = read_contents(first, unsafe=unsafe)
    b = read_contents(second, unsafe=unsafe)
    pairs, unpaired = _pairs(a, b, weights, against)
    compared, found = 0, []
    for left, right in pairs:
        ours, theirs = a.sets[left].tensors, b.sets[right].tensors
        for name in {**ours, **theirs}:
            difference = _of_tensor(
                left, name, ours.get(name), theirs.get(name), atol
            )
            compared += name in ours and name in theirs
            if difference is not None:
                found.append(difference)
    return Comparison(pairs, compared, found, unpaired)


def _pairs(
    a: Contents, b: Contents, weights: Optional[str], against: Optional[str]
) -> Tuple[List[Tuple[str, str]], List[str]]:
    if weights is not None or against is not None:
        left = a.choose(weights)
        return [(left, b.choose(against or left))], []
    shared = [name for name in a.sets if name in b.sets]
    if not shared:
        return [(a.choose(), b.choose())], []
    alone = [
        f'{name} (only in {path!r})'
        for path, mine, other in ((a.path, a, b), (b.path, b, a))
        for name in mine.sets
        if name not in other.sets
    ]
    return [(name, name) for name in shared], alone


def _of_tensor(
    weights: str,
    name: str,
    a: Optional[Tensor],
    b: Optional[Tensor],
    atol: float,
) -> Optional[Difference]:
    if a is None or b is None:
        kind = 'only in B' if a is None else 'only in A'
        return Difference(
            weights, name, kind, _describe(a if b is None else b)
        )
    detail = f'{_describe(a)} | {_describe(b)}'
    if a.shape != b.shape:
        return Difference(weights, name, 'shape', detail)
    found = gap(a, b)
    if found.largest > atol:
        relative = math.inf
        if 0 < found.size < math.inf:
            relative = math.sqrt(found.squares / found.size)
        return Difference(
            *(weights, name, 'values', detail, found.largest, relative)
        )
    if a.dtype != b.dtype:
        return Difference(weights, name, 'dtype', detail)
    return None


def _describe(tensor: Optional[Tensor]) -> str:
    assert tensor is not None
    shape = 'x'.join(map(str, tensor.shape)) or 'scalar'
    return f'{str(tensor.dtype).split(".")[-1]} {shape}'
