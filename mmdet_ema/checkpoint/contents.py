"""What is in a checkpoint of any project, and what a format of one is.

:func:`read_contents` asks the formats of :mod:`mmdet_ema.checkpoint.formats`
one after the other. Tensors are mapped from the file: nothing is in memory
before somebody looks at it.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch
from torch import Tensor

from mmdet_ema.checkpoint.files import one_line
from mmdet_ema.checkpoint.format import check_names
from mmdet_ema.checkpoint.mapped import read_file
from mmdet_ema.errors import CheckpointError, show
from mmdet_ema.schedules import SCHEDULES, Schedule, parse_schedule

RAW, AVERAGE, UNKNOWN = 'raw', 'average', 'unknown'
Content = Mapping[str, Any]
Written = Tuple[Dict[str, Any], List[str]]


@dataclass
class Weights:
    """One set of weights.

    Attributes:
        tensors: By plain name, without a wrapper's prefix. Names that share
            one tensor in the file have the same object.
        role: ``'raw'``, ``'average'`` or ``'unknown'``.
        updates: n, the updates that an average has seen; None if unknown.
        schedule: That of an average as text, ``name(option=value, ...)``;
            empty if the file does not tell.
        steps: Steps of the optimizer that were counted: more than updates
            with an interval above 1. Defaults to these.
        averaged_steps: The step of the last update; None if unknown.
        interval: Steps between updates.
        skipped: Steps that were left out because they were not finite.
        evidence: How the role is known, in a sentence.
        metadata: ``_metadata`` of a ``state_dict``: versions of modules.
    """

    tensors: Dict[str, Tensor]
    role: str = UNKNOWN
    updates: Optional[int] = None
    schedule: str = ''
    steps: Optional[int] = None
    averaged_steps: Optional[int] = None
    interval: int = 1
    skipped: int = 0
    evidence: str = ''
    metadata: Optional[Dict[str, Any]] = None

    def __post_init__(self) -> None:
        if self.steps is None:
            self.steps = self.updates

    def build_schedule(self) -> Optional[Schedule]:
        """Return the schedule, None if the file tells none with a name."""
        is_known = self.schedule.partition('(')[0] in SCHEDULES
        return parse_schedule(self.schedule) if is_known else None

    def state_dict(self, prefix: str = '') -> Dict[str, Any]:
        """Return the weights as a module's ``state_dict`` has them."""
        state: Any = OrderedDict(
            (prefix + name, tensor) for name, tensor in self.tensors.items()
        )
        if self.metadata is not None and not prefix:
            state._metadata = self.metadata
        return state  # type: ignore[no-any-return]


@dataclass
class Contents:
    """What is in a checkpoint.

    Attributes:
        path: The file.
        format: Name of its format, one of ``formats.FORMATS``.
        writer: What wrote it, as far as that is known.
        sets: Sets of weights by name: ``'raw'``, ``'ema'``, further averages
            by their own; ``'weights'`` where the role is not known.
        deployed: Name of the set that the framework's own tools load.
        meta: ``meta`` of the file: plain values about the run.
        rest: What else was in it (optimizer, histories, ...).
        notes: Sentences on what a user should know of it.
    """

    path: str
    format: str
    writer: str
    sets: Dict[str, Weights]
    deployed: str
    meta: Dict[str, Any] = field(default_factory=dict)
    rest: Dict[str, Any] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)

    @property
    def raw(self) -> Optional[Weights]:
        """The raw weights, None if they are not in the file."""
        return self.sets.get('raw')

    @property
    def average(self) -> Optional[str]:
        """Name of the main average: the deployed one, else ``'ema'``."""
        names = [k for k, x in self.sets.items() if x.role == AVERAGE]
        for name in (self.deployed, 'ema', *names):
            if name in names:
                return name
        return None

    def choose(self, name: Optional[str] = None) -> str:
        """Return the name of a set; by default the average, or the only one.

        Raises:
            CheckpointError: If there is no such set.
        """
        if name is None:
            return self.average or self.deployed
        if name in self.sets:
            return name
        known = ', '.join(self.sets)
        what = f'no weights named {name!r}'
        if set(self.sets) == {'weights'} and name in ('ema', 'raw'):
            what = 'one set of weights, and does not tell whether they are'
            what += f' the averages: it cannot be asked for {name!r}'
        raise CheckpointError(
            f'{self.path!r} ({self.format}) has {what}; there is: {known}.'
        )

    def both(self) -> Tuple[Weights, Weights]:
        """Return raw weights and main average, for a file that needs both."""
        name = self.average
        if self.raw is None or name is None:
            found = ', '.join(self.sets)
            raise CheckpointError(
                f'{self.path!r} ({self.format}) has only: {found}; this '
                f'format needs raw weights and averages. To keep one set of '
                f'weights use extract.'
            )
        raw, average = self.raw, self.sets[name]
        alone = sorted(raw.tensors.keys() ^ average.tensors.keys())
        if alone:
            few = ', '.join(map(show, alone[:3]))
            raise CheckpointError(
                f'{self.path!r} ({self.format}) has raw weights or averages '
                f'alone of {len(alone)} tensors ({few}); '
                f'the file is damaged, or of two models.'
            )
        return raw, average


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


def read_contents(
    path: str, *, unsafe: bool = False, check: bool = True
) -> Contents:
    """Read a checkpoint of any of the known formats.

    Args:
        path: A local file.
        unsafe: Whether to run code that the file asks for. Defaults to False.
        check: Whether to compare every record with its checksum, which reads
            the whole file. Defaults to True.

    Returns:
        The sets of weights; their tensors are mapped from the file and must
        not be changed.

    Raises:
        CheckpointError: If the file is missing, damaged, of no known format,
            or could run code.
    """
    from mmdet_ema.checkpoint.formats import FORMATS

    path = os.fspath(path)
    content = read_file(path, check=check, unsafe=unsafe)
    with one_line(path):
        for form in FORMATS.values():
            if form.recognise(content, path):
                contents = form.read(content, path)
                _check(contents)
                return contents
    keys = ', '.join(show(key)[:40] for key in list(content)[:6])
    raise CheckpointError(
        f'{path!r} has no weights in a place that is known (its keys: '
        f'{keys or "none"}); give a checkpoint with a state_dict.'
    )


def _check(contents: Contents) -> None:
    for name, weights in contents.sets.items():
        if not weights.tensors:
            raise CheckpointError(
                f'{contents.path!r} ({contents.format}) has no tensors in '
                f'its weights {name!r}; take another checkpoint.'
            )
        for key, tensor in weights.tensors.items():
            if tensor.device.type == 'meta':
                raise CheckpointError(
                    f'{contents.path!r} holds {key} as a sparse or quantized '
                    f'tensor, which is no weight that can be averaged; save '
                    f'it dense.'
                )


def holds(contents: Contents, name: str) -> Dict[str, Any]:
    """Return what a file with one set of weights says of it in its recipe."""
    weights = contents.sets[name]
    return {'name': name, 'role': weights.role, 'updates': weights.updates}


def as_count(value: Any) -> Optional[int]:
    """Return a counter of a file as an int; None if it is no whole number."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.device.type == 'meta':
            return None
        value = value.item()
    if isinstance(value, float) and math.isfinite(value) and value % 1 == 0:
        value = int(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and value >= 0 else None


def weights_of(
    half: Any, prefix: str = '', what: str = 'state_dict', **known: Any
) -> Weights:
    """Return a set of weights from a dict of a file.

    Args:
        half: Tensors by name; what else is in it is left out.
        prefix: What names begin with; others are left out. Wrappers of
            DistributedDataParallel, ``torch.compile`` and of activation
            checkpointing are stripped in any case.
        what: What to call the dict in an error.
        **known: Other fields of :class:`Weights`.
    """
    check_names(half, what)
    names = {
        name: name[len(prefix) :]
        for name, value in half.items()
        if name.startswith(prefix) and isinstance(value, Tensor)
    }
    plain = _unwrapped(list(names.values()))
    tensors: Dict[str, Tensor] = {}
    one: Dict[Any, Tensor] = {}
    for name, short in zip(names, plain):
        value = half[name]
        if short in tensors:
            raise CheckpointError(
                f'{what} of the checkpoint has two tensors named {short!r} '
                f'without what wrappers add; rename one.'
            )
        key: Any = id(value)
        dense = value.layout is torch.strided
        if dense and value.numel() and value.device.type == 'cpu':
            memory = (value.data_ptr(), value.dtype)
            key = (*memory, tuple(value.shape), value.stride())
        tensors[short] = one.setdefault(key, value)
    metadata = getattr(half, '_metadata', None)
    if not isinstance(metadata, dict) or prefix:
        metadata = None
    return Weights(tensors, metadata=metadata, **known)


_WRAPPERS = ('_orig_mod', '_checkpoint_wrapped_module', '_fsdp_wrapped_module')


def _unwrapped(names: List[str]) -> List[str]:
    """Strip what wrappers add to names."""
    if any(wrapper in name for wrapper in _WRAPPERS for name in names):
        names = [
            '.'.join(x for x in name.split('.') if x not in _WRAPPERS)
            for name in names
        ]
    # a model may have a part of that name
    while names and all(name.startswith('module.') for name in names):
        names = [name[len('module.') :] for name in names]
    return names


def is_weights(value: Any) -> bool:
    """Return whether a value is a dict with tensors in it."""
    return isinstance(value, Mapping) and any(
        isinstance(x, Tensor) for x in value.values()
    )


def complete(average: Weights, raw: Weights) -> List[str]:
    """Give averages the names that only the raw weights have, in place.

    Names of one raw tensor are names of one average; what was not averaged
    has its raw weights. Returns a sentence on the latter. Where averages have
    other names, as those of a part of the model, they stay as they are.
    """
    alone = [name for name in average.tensors if name not in raw.tensors]
    if alone:
        return [
            f'{len(alone)} averages have names that no raw weights have '
            f'({", ".join(alone[:3])}): they may be of a part of the model.'
        ]
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


def meta_of(content: Content) -> Dict[str, Any]:
    """Return ``meta`` of a checkpoint of OpenMMLab; a copy."""
    meta = content.get('meta')
    return dict(meta) if isinstance(meta, Mapping) else {}


def rest_of(content: Content, *known: str) -> Dict[str, Any]:
    """Return what is not among the known keys."""
    return {str(k): x for k, x in content.items() if k not in known}
