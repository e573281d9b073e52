"""An average of files: what another schedule would have given, or a mean.

A profile of the files (a mean, LAWA, WSM, BEMA, a soup) has its coefficients
at once; one of all steps is fitted, by :mod:`mmdet_ema.checkpoint.runs`.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Callable, List, Mapping, Optional, Sequence

from torch import Tensor

from mmdet_ema.checkpoint import profiles
from mmdet_ema.checkpoint.combination import Combination, Term
from mmdet_ema.checkpoint.contents import AVERAGE, RAW, UNKNOWN, Contents
from mmdet_ema.checkpoint.profiles import Profile
from mmdet_ema.checkpoint.runs import Run, places, with_averages
from mmdet_ema.errors import CheckpointError, OptionError, show

Evaluate = Callable[[Mapping[str, Tensor]], float]


def average(
    files: Sequence[Contents],
    profile: Profile,
    *,
    weights: Optional[str] = None,
    start: Optional[str] = None,
    evaluate: Optional[Evaluate] = None,
) -> Combination:
    """Return the combination of files that a profile asks for.

    Args:
        files: The files, as ``combination.read_files`` returns them.
        profile: What the average should be.
        weights: Which weights of each file a mean, a soup or coefficients
            take. Defaults to those that it deploys; for lawa and wsm to the
            raw ones, if all have them, or are of a run without averages.
        start: The file with the starting weights. Defaults to
            ``ema_start.pt`` beside the files.
        evaluate: Returns a score of weights for 'soup:greedy', higher for
            better ones.

    Raises:
        CheckpointError: If the files do not allow it.
        OptionError: If the profile cannot be made of them.
    """
    of_steps = profile.is_fitted or profile.kind == 'bema'
    unused = ('weights', weights) if of_steps else ('start', start)
    if unused[1] is not None:
        raise OptionError(
            f'{unused[0]}={show(unused[1])} has no effect on {profile.text}; '
            f'leave it out.'
        )
    if profile.kind == 'coefficients':
        _check_coefficients(profile.value, files)
        return _weighted(files, profile.value, weights)
    if profile.kind == 'mean':
        return _mean(files, weights)
    if profile.kind == 'soup':
        return _greedy_soup(files, weights, evaluate)
    notes: List[str] = []
    if of_steps:
        files = with_averages(files, notes)
    run = Run(files, start)
    run.notes[:0] = notes
    if profile.kind == 'bema':
        return run.bema(profile)
    if profile.is_fitted:
        return run.fit(profile)
    if profile.kind == 'lawa':
        last = run.files[-profile.value :]
        if len(last) < profile.value:
            raise CheckpointError(
                f'{profile.text} needs {profile.value} files of a run, '
                f'{len(last)} are given.'
            )
        each = [1 / len(last)] * len(last)
    else:
        last = run.files
        each = [*profiles.wsm_coefficients(profile.value, run.at)]
    raws = [_raw_of(contents) for contents in last]
    if weights is None and None not in raws:
        combination = _combined(last, each, [str(name) for name in raws])
    else:
        combination = _weighted(last, each, weights)
    combination.notes += run.notes
    return combination


def _raw_of(contents: Contents) -> Optional[str]:
    """Return the name of raw weights, of a run without averages too."""
    if contents.raw is not None:
        return RAW
    (weights, *more) = contents.sets.values()
    is_alone = not more and weights.role == UNKNOWN
    return contents.deployed if is_alone else None


def _weighted(
    files: Sequence[Contents],
    coefficients: Sequence[float],
    weights: Optional[str],
) -> Combination:
    """Combine one set of weights of each file."""
    names = [
        contents.deployed if weights is None else contents.choose(weights)
        for contents in files
    ]
    return _combined(files, coefficients, names)


def _combined(
    files: Sequence[Contents],
    coefficients: Sequence[float],
    names: Sequence[str],
) -> Combination:
    positive = [max(c, 0.0) for c in coefficients]
    total = sum(positive)
    terms = [
        Term(contents, name, c, p / total if total != 1 else p)
        for contents, name, c, p in zip(files, names, coefficients, positive)
        if c
    ]
    # of equal ones the last that was given
    at = places(files, [])
    newest = max(range(len(files)), key=lambda i: (at[i], i))
    counts = Counter(os.path.realpath(contents.path) for contents in files)
    notes = [
        f'{path} is given {count} times, and counts as often'
        for path, count in counts.items()
        if count > 1
    ]
    roles = {term.contents.sets[term.name].role for term in terms}
    if AVERAGE in roles and len(roles) > 1:
        notes.append(
            'averages are combined with weights that are none, or may be '
            'none: choose by weights'
        )
    return Combination(terms, (files[newest], names[newest]), notes=notes)


def _mean(files: Sequence[Contents], weights: Optional[str]) -> Combination:
    return _weighted(files, [1 / len(files)] * len(files), weights)


def _check_coefficients(
    coefficients: Sequence[float], files: Sequence[Contents]
) -> None:
    total = sum(coefficients)
    if len(coefficients) != len(files):
        raise OptionError(
            f'{len(coefficients)} coefficients are given for {len(files)} '
            f'files; give one a file, in the same order.'
        )
    if not abs(total - 1) < 1e-6:
        raise OptionError(
            f'the coefficients sum up to {total:.6g}; they must sum up to 1.'
        )
    largest = sum(map(abs, coefficients))
    if largest > profiles.LARGEST_SUM:
        raise OptionError(
            f'the absolute coefficients sum up to {largest:.3g}, above '
            f'{profiles.LARGEST_SUM:g}: what differs in the files would be '
            f'amplified. Choose smaller ones.'
        )


def _greedy_soup(
    files: Sequence[Contents],
    weights: Optional[str],
    evaluate: Optional[Evaluate],
) -> Combination:
    """Take a file into the mean if that does not make it worse, best first.

    Wortsman et al. 2022, arXiv:2203.05482, recipe 1.
    """
    if evaluate is None:
        raise OptionError(
            'soup:greedy chooses by a metric: give --config CONFIG, whose '
            'evaluator and validation data are used.'
        )

    def score(chosen: Sequence[Contents]) -> float:
        return evaluate(_mean(chosen, weights).state_dict())

    scores = [score([contents]) for contents in files]
    # equal ones stay in order
    order = sorted(range(len(files)), key=lambda i: -scores[i])
    chosen, best = [files[order[0]]], scores[order[0]]
    for i in order[1:]:
        found = score([*chosen, files[i]])
        if found >= best:
            chosen, best = [*chosen, files[i]], found
    combination = _mean(chosen, weights)
    combination.notes += [
        f'{contents.path}: {value:.4f}'
        for contents, value in zip(files, scores)
    ]
    combination.notes.append(
        f'soup of {len(chosen)} of {len(files)}: {best:.4f}'
    )
    return combination
