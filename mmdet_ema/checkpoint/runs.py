"""Files of one run, by step: what averages can be made of them.

A profile that is asked of all steps (an EMA, SWA) is fitted by the raw
weights, the averages and the starting weights that the files hold
(:mod:`mmdet_ema.checkpoint.profiles`).
"""

from __future__ import annotations

import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor

from mmdet_ema.checkpoint import profiles
from mmdet_ema.checkpoint.combination import (
    Combination,
    Term,
    are_sound,
    check_same,
    same,
)
from mmdet_ema.checkpoint.contents import (
    AVERAGE,
    RAW,
    Contents,
    as_count,
    read_contents,
)
from mmdet_ema.checkpoint.format import CHANGED, META
from mmdet_ema.checkpoint.profiles import Fit, Profile
from mmdet_ema.checkpoint.start import START, fingerprint, start_name
from mmdet_ema.errors import CheckpointError, OptionError, show
from mmdet_ema.schedules import Schedule

_OTHER = (
    'Give the files of one run; to combine those of several use mmdet-ema '
    'average with --profile mean or soup:greedy, or --coefficients.'
)
# keys of projects that tell when a file was written
_WHEN = (
    *('iter', 'global_step', 'iteration', 'epoch', 'last_epoch'),
    *('start_epoch', 'current_epoch'),
)
# of a profile, in steps: 80 MB a basis
_LONGEST = 10**7


class Source(NamedTuple):
    """A set of weights of a run, and its profile."""

    contents: Contents
    name: str
    profile: Tensor


class Run:
    """Files of one run, by step: what averages can be made of.

    Files of several runs are refused.

    Args:
        files: Its files, in any order.
        start: The file with the starting weights. Defaults to the one beside
            the files.

    Attributes:
        at: The step of each file.
        notes: Sentences that a user should read.
    """

    def __init__(self, files: Sequence[Contents], start: Optional[str] = None):
        self.notes: List[str] = []
        _check_one_run(files, self.notes)
        at = places(files, self.notes)
        self.files: List[Contents] = []
        self.at: List[int] = []
        for i in sorted(range(len(files)), key=at.__getitem__):
            if self.at and at[i] == self.at[-1]:
                self._pass_over(files[i])
            else:
                self.files.append(files[i])
                self.at.append(at[i])
        self.steps = self.at[-1]
        self._sources: List[Source] = []
        self.start = _find_start(self.files[-1], start, self.notes)
        self._decays: Dict[str, Tensor] = {}

    def _pass_over(self, other: Contents) -> None:
        """Leave out the same weights again, as those of a best file."""
        contents = self.files[-1]
        here, there = (x.sets[x.deployed].tensors for x in (contents, other))
        if not all(same(here[name], there[name]) for name in here):
            raise CheckpointError(
                f'{contents.path!r} and {other.path!r} are both of step '
                f'{self.at[-1]}, and differ: they are of different runs. '
                f'{_OTHER}'
            )
        self.notes.append(
            f'{other.path} holds the same as {contents.path}: it is left out'
        )

    def look(self) -> List[Source]:
        """Return what there is, with profiles; made when first asked for."""
        if self._sources:
            return self._sources
        if self.steps > _LONGEST:
            raise CheckpointError(
                f'{self.files[-1].path!r} says that its averages have seen '
                f'{self.steps:,} steps; a profile is made of at most '
                f'{_LONGEST:,}. {_OTHER}'
            )
        silent = set()
        for contents, at in zip(self.files, self.at):
            if not steps_of(contents):
                raise CheckpointError(
                    f'{contents.path!r} ({contents.format}) does not say how '
                    f'many steps its averages have seen: leave it out; the '
                    f'mean of the last files is --profile lawa:K. {_OTHER}'
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
                    self._sources.append(Source(contents, name, profile))
        if self.start is not None:
            name = self.start.choose()
            profile = profiles.raw(0, self.steps)
            self._sources.append(Source(self.start, name, profile))
        for name in sorted(silent):
            self.notes.append(
                f'{name}: the files do not say which schedule made it: it is '
                f'not used'
            )
        return self._sources

    def target(self, profile: Profile) -> Tensor:
        """Return what the run would have tracked, at its own interval."""
        last = self.files[-1]
        intervals = [weights.interval for weights in last.sets.values()]
        interval = max(1, *intervals)
        done = [weights.averaged_steps or 0 for weights in last.sets.values()]
        # raw weights alone can be averaged up to the last step
        return profile.target(self.steps, interval, max(done) or None)

    def fit(self, profile: Profile) -> Combination:
        """Return the combination nearest to a profile, if near enough."""
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
        if not are_sound(made):
            made.statistics = profiles.fit(bases, target, 1)
            made.terms = terms(made.statistics)
        return made

    def bema(self, profile: Profile) -> Combination:
        """Return the last average with less lag, BEMA."""
        last = self.files[-1]
        name = last.average
        if name is None or last.raw is None or self.start is None:
            found = {
                'an average': name,
                'raw weights': last.raw,
                'starting weights (ema_start.pt)': self.start,
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
            Term(self.start, self.start.choose(), -share, 0.0),
        ]
        notes = [*self.notes]
        return Combination(terms, (last, name), tracked=True, notes=notes)

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


def with_averages(
    files: Sequence[Contents], notes: List[str]
) -> Sequence[Contents]:
    """Leave out files of the time before a run had averages, if there are."""
    found = [contents for contents in files if steps_of(contents)]
    if not found:
        return files
    notes += [
        f'{contents.path} has no averages yet: it is left out'
        for contents in files
        if not steps_of(contents)
    ]
    return found


def places(files: Sequence[Contents], notes: List[str]) -> List[int]:
    """Return where each file is in the run: steps, else what it says, else i.

    A shell sorts names: that of epoch 10 stands before that of epoch 9.
    """
    said = [{**contents.rest, **contents.meta} for contents in files]
    for found in (
        # 0 before the averages begin, whenever that is
        [steps_of(contents) or None for contents in files],
        *([as_count(x.get(key)) for x in said] for key in _WHEN),
    ):
        known = [x for x in found if x is not None]
        if len(known) == len(files):
            return known
    silent = [
        contents.path
        for contents, keys in zip(files, said)
        if steps_of(contents) is None and keys.keys().isdisjoint(_WHEN)
    ]
    which = f' ({silent[0]} says nothing)' if silent else ''
    notes.append(
        f'the files do not say when they were written{which}: they are taken '
        f'in the order given, as if evenly spaced'
    )
    return [*range(1, len(files) + 1)]


def _check_one_run(files: Sequence[Contents], notes: List[str]) -> None:
    """Check that files are of one run, as far as they tell."""
    # a run may have had no averages at first
    first = next((x for x in files if _begun(x)), files[0])
    before = _begun(first)
    made_by: Dict[str, Tuple[str, str]] = {}
    for contents in files:
        meta = _begun(contents) or before
        for key, said in (
            ('restarted', 'were restarted between them (give later ones)'),
            (START, 'started from other weights'),
        ):
            # as text, because tensors cannot be compared
            if str(meta.get(key)) != str(before.get(key)):
                raise CheckpointError(
                    f'{first.path!r} and {contents.path!r} cannot be '
                    f'combined by steps: their averages {said}. {_OTHER}'
                )
        for name, weights in contents.sets.items():
            schedule = _schedule_of(contents, name)
            if schedule is None or CHANGED in contents.rest.get(META, {}):
                continue
            found = f'{schedule} every {weights.interval} steps'
            known, path = made_by.setdefault(name, (found, contents.path))
            if known != found:
                raise CheckpointError(
                    f'{name} is by {known} in {path!r}, and by {found} in '
                    f'{contents.path!r}: it was changed in the run, and '
                    f'nobody knows when. {_OTHER}'
                )
    silent = [x for x in files if START not in _begun(x)]
    if silent and len(files) > 1:
        notes.append(
            'nothing in the files says that they are of one run: it is '
            'taken for granted (posthoc=True writes what tells it)'
        )


def _begun(contents: Contents) -> Dict[str, Any]:
    """Return what a file says of its averages; empty before they begin."""
    return contents.rest.get(META, {}) if steps_of(contents) else {}


def _find_start(
    contents: Contents, path: Optional[str], notes: List[str]
) -> Optional[Contents]:
    """Return the starting weights of a run, None if there are none."""
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
        check_same(contents, found)
        return found
    said = f'{path} does not have the starting weights of {contents.path}'
    if given:
        raise CheckpointError(f'{said}; leave --start out.')
    notes.append(f'{said}: it is not used')
    return None
