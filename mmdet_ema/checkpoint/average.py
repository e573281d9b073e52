"""An average of files: what another schedule would have given, or a mean.

Sums are in float64 and one tensor at a time. A profile that is asked of all
steps (an EMA, SWA) is fitted by the raw weights, the averages and the
starting weights that the files hold (:mod:`mmdet_ema.checkpoint.profiles`);
one that is asked of the files (a mean, LAWA, WSM, BEMA, a soup) has its
coefficients at once.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import (
    Any,
    Callable,
    Dict,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch
from torch import Tensor

from mmdet_ema.averaging.averages import MAIN
from mmdet_ema.checkpoint import profiles, recipe, saving
from mmdet_ema.checkpoint.contents import (
    AVERAGE,
    RAW,
    Contents,
    as_count,
    read_contents,
)
from mmdet_ema.checkpoint.extract import meta_for_use
from mmdet_ema.checkpoint.format import CHANGED, META, WEIGHTS
from mmdet_ema.checkpoint.profiles import Fit, Profile
from mmdet_ema.checkpoint.start import START, fingerprint, start_name
from mmdet_ema.errors import CheckpointError, OptionError, show
from mmdet_ema.schedules import Schedule

Evaluate = Callable[[Mapping[str, Tensor]], float]

COMMAND = 'average'
_OTHER = (
    'To combine files of different runs use --profile mean or soup:greedy, '
    'or --coefficients.'
)
# of a profile, in steps: 80 MB a basis
_LONGEST = 10**7
# elements that are summed up at once
_CHUNK = 2**20
# buffers that have coefficients of their own where a variance needs them
_STATISTICS = ('running_', 'moving_')


class Term(NamedTuple):
    """A set of weights of a file, and what it counts in a sum.

    Attributes:
        contents: The file.
        name: The set.
        coefficient: What it counts.
        statistics: What its running statistics count.
    """

    contents: Contents
    name: str
    coefficient: float
    statistics: float

    @property
    def tensors(self) -> Dict[str, Tensor]:
        """The tensors of the set by name."""
        return self.contents.sets[self.name].tensors


@dataclass
class Combination:
    """Sets of weights with their coefficients.

    Attributes:
        terms: What is summed up.
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
            _check_same(contents, other, which)
        copied = _copied(contents) if self.tracked else {}
        tied: Dict[Tuple[int, ...], List[str]] = {}
        for key, tensor in lead.items():
            parts = (tensor, *(term.tensors[key] for term in self.terms))
            tied.setdefault(tuple(map(id, parts)), []).append(key)
        state: Any = OrderedDict.fromkeys(lead)
        for names in tied.values():
            key = names[0]
            is_copied = key in copied or not _has_mean(lead[key])
            made = lead[key].clone() if is_copied else self._sum(key)
            state.update(dict.fromkeys(names, made))
        if weights.metadata is not None:
            state._metadata = weights.metadata
        return state  # type: ignore[no-any-return]

    def _sum(self, key: str) -> Tensor:
        is_statistic = key.rpartition('.')[2].startswith(_STATISTICS)
        parts = []
        for term in self.terms:
            count = term.statistics if is_statistic else term.coefficient
            if count:
                parts.append((term, term.tensors[key], count))
        first = parts[0][1]
        dtype = first.dtype
        for _, part, _ in parts:
            dtype = torch.promote_types(dtype, part.dtype)
        if all(_same(first, part) for _, part, _ in parts[1:]):
            return first.to(dtype, copy=True)  # masks of -inf, too
        wide = torch.promote_types(dtype, torch.float64)
        result = torch.empty(first.shape, dtype=dtype)
        flat = [(term, x.reshape(-1), count) for term, x, count in parts]
        for begin in range(0, first.numel(), _CHUNK):
            here = slice(begin, begin + _CHUNK)
            total = torch.zeros(len(flat[0][1][here]), dtype=wide)
            for term, part, count in flat:
                values = part[here].to(wide)
                if not torch.isfinite(values).all():
                    raise CheckpointError(
                        f'{term.contents.path!r} holds NaN or Inf in {key} '
                        f'of {term.name}; leave this file out.'
                    )
                # a fused operation rounds once, or twice: as the CPU likes
                total += values * count
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

        Args:
            state: The weights.
            made: Their recipe.
            path: The file.
            force: Whether to replace one. Defaults to False.
        """
        meta, _ = meta_for_use(self.lead[0])
        content = {'meta': meta, WEIGHTS: state}
        # pickle writes an object that is there twice once: a recipe that was
        # read is to be written as one that was made
        recipe.add(content, json.loads(json.dumps(made)))
        return saving.save(content, path, force=force)

    def recipe(self, options: Mapping[str, Any]) -> Dict[str, Any]:
        """Return the recipe of a file with this combination.

        Args:
            options: What it was made by, and what is done to it afterwards.
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

        Args:
            options: Those of the recipe.
            paths: Its files, as ``recipe.check_inputs`` returns them.
            unsafe: Whether to run code that a file asks for.

        Raises:
            CheckpointError: If it is no such recipe.
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
        files: The files, as :func:`read_files` returns them.
        profile: What the average should be.
        weights: Which weights of each file a mean, a soup or coefficients
            take. Defaults to those that it deploys; for lawa and wsm to the
            raw ones, if all have them.
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
    run = Run(files, start)
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
    if weights is None and all(x.raw is not None for x in last):
        weights = RAW
    combination = _weighted(last, each, weights)
    combination.notes += run.notes
    return combination


def read_files(
    paths: Sequence[str], *, unsafe: bool = False, check: bool = True
) -> List[Contents]:
    """Read files that are to be combined: they must have the same tensors.

    Args:
        paths: The files.
        unsafe: Whether to run code that a file asks for. Defaults to False.
        check: Whether to compare every record with its checksum. Defaults to
            True.

    Raises:
        CheckpointError: If one cannot be read, or has other tensors.
    """
    files = [read_contents(x, unsafe=unsafe, check=check) for x in paths]
    for contents in files[1:]:
        _check_same(files[0], contents)
    return files


class Source(NamedTuple):
    """A set of weights of a run, and its profile."""

    contents: Contents
    name: str
    profile: Tensor


class Run:
    """Files of one run, by step: what averages can be made of.

    Args:
        files: Its files, in any order.
        start: The file with the starting weights. Defaults to the one beside
            the files.

    Raises:
        CheckpointError: If they are not of one run, or do not tell their
            steps.

    Attributes:
        files: The files, by step.
        at: The step of each.
        steps: That of the last one.
        sources: What there is, with profiles.
        notes: Sentences that a user should read.
    """

    def __init__(self, files: Sequence[Contents], start: Optional[str] = None):
        self.notes: List[str] = []
        _check_one_run(files, self.notes)
        at = _places(files, self.notes)
        self.files: List[Contents] = []
        self.at: List[int] = []
        for i in sorted(range(len(files)), key=at.__getitem__):
            if self.at and at[i] == self.at[-1]:
                self._pass_over(files[i])
            else:
                self.files.append(files[i])
                self.at.append(at[i])
        self.steps = self.at[-1]
        self.sources: List[Source] = []
        self._start = _find_start(self.files[-1], start, self.notes)
        self._decays: Dict[str, Tensor] = {}

    def _pass_over(self, other: Contents) -> None:
        """Leave out the same weights again, as those of a best file."""
        contents = self.files[-1]
        here, there = (x.sets[x.deployed].tensors for x in (contents, other))
        if not all(_same(here[name], there[name]) for name in here):
            raise CheckpointError(
                f'{contents.path!r} and {other.path!r} are both of step '
                f'{self.at[-1]}, and differ: they are of different runs. '
                f'{_OTHER}'
            )
        self.notes.append(
            f'{other.path} holds the same as {contents.path}: it is left out'
        )

    def look(self) -> List[Source]:
        """Return what there is, with profiles; made when first asked for.

        Raises:
            CheckpointError: If the counters of a file do not fit.
        """
        if self.sources:
            return self.sources
        if self.steps > _LONGEST:
            raise CheckpointError(
                f'{self.files[-1].path!r} says that its averages have seen '
                f'{self.steps:,} steps; a profile is made of at most '
                f'{_LONGEST:,}. {_OTHER}'
            )
        silent = set()
        for contents, at in zip(self.files, self.at):
            if steps_of(contents) is None:
                raise CheckpointError(
                    f'{contents.path!r} ({contents.format}) does not say how '
                    f'many steps its averages have seen; the mean of its last '
                    f'files is --profile lawa:K. {_OTHER}'
                )
            changed = contents.rest.get(META, {}).get(CHANGED, 0)
            if changed:
                self.notes.append(
                    f'{contents.path}: a decay was changed after step '
                    f'{changed}: its averages are not used'
                )
            for name, weights in contents.sets.items():
                if changed and weights.role == AVERAGE:
                    continue
                profile = self._profile_of(contents, name, at)
                if profile is None:
                    silent.add(name)
                else:
                    self.sources.append(Source(contents, name, profile))
        if self._start is not None:
            name = self._start.choose()
            profile = profiles.raw(0, self.steps)
            self.sources.append(Source(self._start, name, profile))
        for name in sorted(silent):
            self.notes.append(
                f'{name}: the files do not say which schedule made it: it is '
                f'not used'
            )
        return self.sources

    def target(self, profile: Profile) -> Tensor:
        """Return what the run would have tracked, at its own interval."""
        last = self.files[-1]
        intervals = [weights.interval for weights in last.sets.values()]
        interval = max(1, *intervals)
        done = [weights.averaged_steps or 0 for weights in last.sets.values()]
        # raw weights alone can be averaged up to the last step
        return profile.target(self.steps, interval, max(done) or None)

    def fit(self, profile: Profile) -> Combination:
        """Return the combination that is nearest to a profile.

        Raises:
            CheckpointError: If it is not near enough.
        """
        combination = self.nearest(profile)
        assert combination.fit is not None
        if combination.fit.problem:
            notes = f' ({"; ".join(self.notes)}.)' if self.notes else ''
            raise CheckpointError(
                f'{show(profile.text)} cannot be made of these files: '
                f'{combination.fit.problem}. Windows between those of two '
                f'averages can be made, and none below the spacing of the '
                f'files: train with posthoc=True, give all files of the run '
                f'and ema_start.pt.{notes}'
            )
        return combination

    def nearest(self, profile: Profile) -> Combination:
        """Return the combination that is nearest, however far it is."""
        sources = self.look()
        if not sources:
            raise CheckpointError(
                f'{self.files[-1].path!r} and the others do not say which '
                f'schedule made their averages. {_OTHER}'
            )
        bases = [source.profile for source in sources]
        target = self.target(profile)
        found = profiles.fit(bases, target)

        def terms(statistics: Fit) -> List[Term]:
            each = found.coefficients, statistics.coefficients
            return [
                Term(source.contents, source.name, c, s)
                for source, c, s in zip(sources, *each)
                if c or s
            ]

        last = self.files[-1]
        lead = last, last.deployed
        made = Combination(terms(found), lead, found, tracked=True)
        made.notes += self.notes
        if not _are_sound(made):
            made.statistics = profiles.fit(bases, target, 1)
            made.terms = terms(made.statistics)
        return made

    def bema(self, profile: Profile) -> Combination:
        """Return the last average with less lag, BEMA.

        Raises:
            CheckpointError: If average, raw or starting weights are missing.
        """
        last = self.files[-1]
        name = last.average
        if name is None or last.raw is None or self._start is None:
            found = {
                'an average': name,
                'raw weights': last.raw,
                'starting weights (ema_start.pt)': self._start,
            }
            missing = [what for what, x in found.items() if x is None]
            raise CheckpointError(
                f'{profile.text} needs {" and ".join(missing)} beside what '
                f'{last.path!r} holds; train with posthoc=True.'
            )
        share = profiles.bema_share(self.steps, profile.value)
        terms = [
            Term(last, name, 1.0, 1 / (1 + share)),
            Term(last, RAW, share, share / (1 + share)),
            Term(self._start, self._start.choose(), -share, 0.0),
        ]
        return Combination(
            terms, (last, name), tracked=True, notes=[*self.notes]
        )

    def _profile_of(
        self, contents: Contents, name: str, at: int
    ) -> Optional[Tensor]:
        weights = contents.sets[name]
        if weights.role == RAW:
            return profiles.raw(at, self.steps)
        schedule, steps = _schedule_of(contents, name), weights.steps
        if weights.role != AVERAGE or schedule is None or steps is None:
            return None
        averaged, interval = weights.averaged_steps, weights.interval
        if averaged is None:
            averaged = steps
        if interval < 1 or weights.updates != -(-averaged // interval):
            raise CheckpointError(
                f'{contents.path!r}: {name} has counted {weights.updates} '
                f'updates in {averaged} steps, which interval={interval} '
                f'does not give: it was changed in the run. {_OTHER}'
            )
        text = str(schedule)
        if len(self._decays.get(text, ())) < steps:
            self._decays[text] = profiles.decays_of(schedule, self.steps)
        decays = self._decays[text][:steps]
        profile = profiles.profile_of(decays, interval, averaged)
        return profiles.placed(profile, at, self.steps)


def _schedule_of(contents: Contents, name: str) -> Optional[Schedule]:
    try:
        return contents.sets[name].build_schedule()
    except OptionError as error:
        raise CheckpointError(
            f'{contents.path!r}: the schedule of {name} is damaged: {error}'
        ) from None


def steps_of(contents: Contents) -> Optional[int]:
    """Return the step after which a file was written; None if unknown."""
    sets = contents.sets.values()
    return max((x.steps for x in sets if x.steps is not None), default=None)


def _places(files: Sequence[Contents], notes: List[str]) -> List[int]:
    """Return where each file is in the run: steps, else iterations, else i."""
    for place in (steps_of, lambda x: as_count(x.meta.get('iter'))):
        found = [place(contents) for contents in files]
        known = [x for x in found if x is not None]
        if len(known) == len(files):
            return known
    notes.append(
        'the files do not say when they were written: they are taken in the '
        'order given, as if evenly spaced'
    )
    return [*range(1, len(files) + 1)]


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
    positive = [max(c, 0.0) for c in coefficients]
    total = sum(positive)
    terms = [
        Term(contents, name, c, p / total if total != 1 else p)
        for contents, name, c, p in zip(files, names, coefficients, positive)
        if c
    ]
    # of equal ones the last that was given
    places = _places(files, [])
    newest = max(range(len(files)), key=lambda i: (places[i], i))
    return Combination(terms, (files[newest], names[newest]))


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


def _are_sound(combination: Combination) -> bool:
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
        name = key.rpartition('.')[2]
        if not name.startswith(_STATISTICS) or name.endswith('mean'):
            continue
        parts = [x.tensors[key].double() for x in terms if key in x.tensors]
        if len(parts) < len(terms):
            return False
        total = sum(x.coefficient * part for x, part in zip(terms, parts))
        least = torch.stack(parts).amin(0)
        if not bool((total >= share * least).all()):
            return False
    return True


def _check_same(first: Contents, other: Contents, weights: str = '') -> None:
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


def _check_one_run(files: Sequence[Contents], notes: List[str]) -> None:
    """Check that files are of one run, as far as they tell."""
    first = files[0]
    before: Dict[str, Any] = first.rest.get(META, {})
    made_by: Dict[str, Tuple[str, str]] = {}
    for contents in files:
        meta = contents.rest.get(META, {})
        for key, said in (
            (START, 'started from other weights'),
            ('restarted', 'were restarted between them'),
        ):
            # as text, because tensors cannot be compared
            if str(meta.get(key)) != str(before.get(key)):
                raise CheckpointError(
                    f'{first.path!r} and {contents.path!r} cannot be '
                    f'combined by steps: their averages {said}. {_OTHER}'
                )
        for name, weights in contents.sets.items():
            schedule = _schedule_of(contents, name)
            if schedule is None or CHANGED in meta:
                continue
            found = f'{schedule} every {weights.interval} steps'
            known, path = made_by.setdefault(name, (found, contents.path))
            if known != found:
                raise CheckpointError(
                    f'{name} is by {known} in {path!r}, and by {found} in '
                    f'{contents.path!r}: it was changed in the run, and '
                    f'nobody knows when. {_OTHER}'
                )
    if START not in before and len(files) > 1:
        notes.append(
            'nothing in the files says that they are of one run: it is '
            'taken for granted (posthoc=True writes what tells it)'
        )


def _find_start(
    contents: Contents, path: Optional[str], notes: List[str]
) -> Optional[Contents]:
    """Return the starting weights of a run, None if there are none.

    Raises:
        CheckpointError: If the file that was given is not theirs.
    """
    meta, given = contents.rest.get(META, {}), path is not None
    wanted = meta.get(START)
    if path is None:
        if not isinstance(wanted, str):
            return None
        name = start_name(as_count(meta.get('restarted')) or 0)
        path = os.path.join(os.path.dirname(contents.path), name)
        if not os.path.isfile(path):
            notes.append(
                f'{path} with the starting weights is not there: windows '
                f'that reach back to them cannot be made'
            )
            return None
    found = read_contents(path)
    if fingerprint(found.sets[found.choose()].tensors) == wanted:
        _check_same(contents, found)
        return found
    said = f'{path} does not have the starting weights of {contents.path}'
    if given:
        raise CheckpointError(f'{said}; leave --start out.')
    notes.append(f'{said}: it is not used')
    return None


def _copied(contents: Contents) -> Dict[str, None]:
    """Return names of tensors that averages of a file copy, not average.

    Frozen ones, and buffers for which a mean has no meaning: all sets hold
    the same. Where everything is the same (at the start of a run), none.
    """
    sets = [x.tensors for x in contents.sets.values()]
    if len(sets) < 2:
        return {}
    first = sets[0]
    names = {
        name: None
        for name, tensor in first.items()
        if all(name in x and _same(tensor, x[name]) for x in sets[1:])
    }
    floats = {name for name, tensor in first.items() if _has_mean(tensor)}
    return {} if floats <= names.keys() else names


def _has_mean(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _same(left: Tensor, right: Tensor) -> bool:
    return left is right or (
        left.dtype == right.dtype and torch.equal(left, right)
    )
