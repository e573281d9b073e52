"""A sum of sets of weights of files: with what it is worth, and its file.

Sums are in float64 and one tensor at a time.
"""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import (
    Any,
    Dict,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

import torch
from torch import Tensor

from mmdet_ema.averaging.averages import MAIN
from mmdet_ema.checkpoint import recipe
from mmdet_ema.checkpoint.contents import AVERAGE, Contents, read_contents
from mmdet_ema.checkpoint.extract import meta_for_use, write_weights
from mmdet_ema.checkpoint.profiles import Fit
from mmdet_ema.errors import CheckpointError

COMMAND = 'average'
# elements that are summed up at once
_CHUNK = 2**20


class Term(NamedTuple):
    """A set of weights of a file, and what it counts in a sum.

    Its running statistics may count something else.
    """

    contents: Contents
    name: str
    coefficient: float
    statistics: float

    @property
    def tensors(self) -> Dict[str, Tensor]:
        """Those of the set, by name."""
        return self.contents.sets[self.name].tensors

    def counts(self, key: str) -> float:
        """Return what a tensor of it counts."""
        return self.statistics if _is_statistic(key) else self.coefficient


@dataclass
class Combination:
    """Sets of weights with their coefficients.

    Attributes:
        lead: Whose integers, and copied tensors, are taken: those of a set of
            the newest file.
        fit: What the coefficients are worth; None where they are exact.
        statistics: The same of those of the running statistics, where these
            have coefficients of their own, none negative.
        tracked: Whether it stands for an average that the run could have
            tracked: it copies what those of the run copy.
        notes: Sentences that a user should read.
    """

    terms: List[Term]
    lead: Tuple[Contents, str]
    fit: Optional[Fit] = None
    statistics: Optional[Fit] = None
    tracked: bool = False
    notes: List[str] = field(default_factory=list)

    @property
    def absolute_sum(self) -> float:
        """Sum of the absolute coefficients."""
        return sum(abs(term.coefficient) for term in self.terms)

    def state_dict(self) -> Dict[str, Tensor]:
        """Return the weights by name, in the order of the newest file.

        Raises:
            CheckpointError: If a file holds NaN or Inf.
        """
        contents, name = self.lead
        weights = contents.sets[name]
        lead = weights.tensors
        for other, which in (self.lead, *(term[:2] for term in self.terms)):
            check_same(contents, other, which)
        copied = _copied(contents) if self.tracked else set()
        state: Any = OrderedDict()
        made: Dict[Any, Tensor] = {}  # names of one tensor stay names of one
        for key, tensor in lead.items():
            parts = (tensor, *(term.tensors[key] for term in self.terms))
            which_parts = tuple(map(id, parts))
            if which_parts not in made:
                is_copied = key in copied or not _has_mean(tensor)
                made[which_parts] = (
                    tensor.clone() if is_copied else self._sum(key)
                )
            state[key] = made[which_parts]
        if weights.metadata is not None:
            state._metadata = weights.metadata
        return state  # type: ignore[no-any-return]

    def _sum(self, key: str) -> Tensor:
        terms = [term for term in self.terms if term.counts(key)]
        parts = [term.tensors[key] for term in terms]
        first = parts[0]
        if all(same(first, part) for part in parts[1:]):
            return first.clone()  # masks of -inf, too
        # torch promotes no 8-bit floats, not even to one of them
        dtypes = dict.fromkeys(part.dtype for part in parts)
        try:
            dtype = functools.reduce(torch.promote_types, dtypes)
        except RuntimeError:
            raise CheckpointError(
                f'{key} is of {" and of ".join(map(str, dtypes))} in the '
                f'files; extract these by the same --dtype before.'
            ) from None
        wide = torch.complex128 if dtype.is_complex else torch.float64
        result = torch.empty(first.shape, dtype=dtype)
        flat = [part.reshape(-1) for part in parts]
        for begin in range(0, first.numel(), _CHUNK):
            here = slice(begin, begin + _CHUNK)
            total = torch.zeros(len(flat[0][here]), dtype=wide)
            for term, part in zip(terms, flat):
                values = part[here].to(wide)
                if not torch.isfinite(values).all():
                    raise CheckpointError(
                        f'{term.contents.path!r} holds NaN or Inf in {key} '
                        f'of {term.name}; leave this file out.'
                    )
                # a fused operation rounds once, or twice: as the CPU likes
                total += values * term.counts(key)
            result.view(-1)[here] = total.to(dtype)
        return result

    def save(
        self,
        state: Mapping[str, Tensor],
        made: Mapping[str, Any],
        path: str,
        force: bool = False,
    ) -> str:
        """Write what a framework's own tools load; return its path.

        ``made`` is the recipe of ``state``.
        """
        meta, _ = meta_for_use(self.lead[0])
        # pickle writes an object that is there twice once: a recipe that was
        # read is to be written as one that was made
        made = json.loads(json.dumps(made))
        return write_weights(state, meta, made, path, force=force)

    def recipe(self, options: Mapping[str, Any]) -> Dict[str, Any]:
        """Return the recipe of a file with this combination.

        ``options`` are what it was made by, and is done to it afterwards.
        """
        files = [term.contents for term in self.terms] + [self.lead[0]]
        paths = list(dict.fromkeys(contents.path for contents in files))
        if self.fit is not None:  # for people
            options = {**options, 'error': f'{self.fit.error:.4g}'}
        made = recipe.make(
            COMMAND,
            paths,
            {
                **options,
                'tracked': self.tracked,
                'lead': [paths.index(self.lead[0].path), self.lead[1]],
                # as text: torch 1.13 reads no float by weights_only=True
                'terms': [
                    [paths.index(contents.path), name, *map(repr, counts)]
                    for contents, name, *counts in self.terms
                ],
            },
        )
        # what it is, for whoever reads the file
        made['holds'] = {'role': AVERAGE, 'name': MAIN}
        return made

    @staticmethod
    def of_recipe(
        options: Mapping[str, Any], paths: Sequence[str], unsafe: bool = False
    ) -> Combination:
        """Return the combination of a recipe: the same to the last bit.

        ``paths`` are those of its files, as ``recipe.check_inputs`` returns
        them.
        """
        files = read_files(paths, unsafe=unsafe)
        try:
            terms = [
                Term(files[i], files[i].choose(str(name)), float(c), float(s))
                for i, name, c, s in options['terms']
            ]
            for sum_ in (
                sum(term.coefficient for term in terms),
                sum(term.statistics for term in terms),
            ):
                if not abs(sum_ - 1) < 1e-6:
                    raise ValueError(f'they sum up to {sum_:.6g}, not to 1')
            i, name = options['lead']
            lead = files[i], files[i].choose(str(name))
            return Combination(terms, lead, tracked=bool(options['tracked']))
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f'the recipe has no terms that can be repeated ({error}); '
                f'give one that mmdet-ema average made.'
            ) from None


def read_files(
    paths: Sequence[str], *, unsafe: bool = False
) -> List[Contents]:
    """Read files that are to be combined: they must have the same tensors."""
    files = [read_contents(x, unsafe=unsafe) for x in paths]
    for contents in files[1:]:
        check_same(files[0], contents)
    return files


def are_sound(combination: Combination) -> bool:
    """Return whether variances are sound under the coefficients.

    Where some are negative a variance may get below 0, or near it, which no
    average of variances is: it is at least the least one. Coefficients that
    are not negative fit a profile far worse, and are for such cases.
    """
    terms, fit = combination.terms, combination.fit
    if fit is None or all(term.coefficient >= 0 for term in terms):
        return True
    # what is exact may be far below its parts, but for rounding
    share = 1e-3 if fit.error < 1e-6 else 0.5
    for key in terms[0].tensors:
        if not _is_statistic(key) or key.endswith('mean'):
            continue
        parts = [x.tensors[key].double() for x in terms if key in x.tensors]
        if len(parts) < len(terms):
            return False
        total = sum(x.coefficient * part for x, part in zip(terms, parts))
        least = torch.stack(parts).amin(0)
        if not bool((total >= share * least).all()):
            return False
    return True


def check_same(first: Contents, other: Contents, weights: str = '') -> None:
    """Check that two files have tensors of the same names and shapes."""
    here = first.sets[first.deployed].tensors
    there = other.sets[weights or other.deployed].tensors
    for name in dict.fromkeys([*here, *there]):
        shapes = [
            tuple(x[name].shape) if name in x else None for x in (here, there)
        ]
        if shapes[0] != shapes[1]:
            said = ['none' if x is None else f'shape {x}' for x in shapes]
            raise CheckpointError(
                f'{f"{weights} of " if weights else ""}{other.path!r} is of '
                f'another model than {first.path!r}: {name} has {said[1]} '
                f'there, and {said[0]} here.'
            )


def _copied(contents: Contents) -> Set[str]:
    """Return names of tensors that averages of a file copy, not average.

    Frozen ones, and buffers for which a mean has no meaning: all sets hold
    the same. Where everything is the same (at the start of a run), none.
    """
    first, *others = (x.tensors for x in contents.sets.values())
    names = {
        name
        for name, tensor in first.items()
        if all(name in x and same(tensor, x[name]) for x in others)
    }
    floats = {name for name, tensor in first.items() if _has_mean(tensor)}
    return set() if floats <= names else names


def _is_statistic(name: str) -> bool:
    """Return whether a buffer may have coefficients of its own."""
    return name.rpartition('.')[2].startswith(('running_', 'moving_'))


def _has_mean(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def same(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors are of one dtype, and equal."""
    if left is right or left.dtype != right.dtype:
        return left is right
    if left.element_size() == 1:  # torch 2.4 compares no 8-bit floats
        left, right = left.float(), right.float()
    return torch.equal(left, right)
