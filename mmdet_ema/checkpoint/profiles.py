"""What an average is made of: its profile over the steps, and how to make it.

After N steps an average is ``sum over t of p(t) w(t)``: p is its *profile*,
``w(0)`` what it started from, ``w(t)`` the weights after step t. A decay of
d(t) gives ``p(t) = (1 - d(t)) * d(t + 1) * ... * d(N)``, and the product of
all decays for ``w(0)``. An average of averages has the average of their
profiles, so what files hold can be combined into what another schedule would
have given: the *coefficients* are those whose profile is nearest to it.

Profiles are exact, step by step: float64 tensors of shape (steps + 1,) that
sum up to 1.

Sources: post-hoc EMA, Karras et al. 2024, arXiv:2312.02696; SWA,
arXiv:1803.05407; WSM, arXiv:2507.17634; BEMA, arXiv:2508.00180.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor

from mmdet_ema.checks import check_choice, check_number
from mmdet_ema.errors import OptionError, show
from mmdet_ema.schedules import (
    Schedule,
    check_decay,
    constant,
    exponential,
    parse_schedule,
)

LARGEST_ERROR = 0.1
"""Of a profile, relative to the one that was asked for."""
LARGEST_SUM = 3.0
"""Of the absolute coefficients, which amplify what differs in the files."""
WSM: Dict[str, Callable[[float], float]] = {
    '1-sqrt': lambda u: 1 - math.sqrt(u),
    'cosine': lambda u: (1 + math.cos(math.pi * u)) / 2,
    'linear': lambda u: 1 - u,
}
"""Decays of a learning rate, from 1 to 0, that a merge can stand for."""
# rows of a QR decomposition at once
_ROWS = 2**16
# singular values below are rounding of the profiles themselves
_RCOND = 1e-11


def decays_of(schedule: Schedule, steps: int) -> Tensor:
    """Return d(1), ..., d(steps), each checked to be in [0, 1]."""
    decays = [check_decay(schedule, n) for n in range(1, steps + 1)]
    return torch.tensor(decays, dtype=torch.float64)


def profile_of(
    decays: Tensor, interval: int = 1, averaged: Optional[int] = None
) -> Tensor:
    """Return the profile of an average of these decays.

    Args:
        decays: Those of its steps, from the first on.
        interval: Steps between its updates; the decay of an update is the
            product of those since the last one. Defaults to 1.
        averaged: The last step that was averaged. Defaults to the last one.
    """
    steps = len(decays)
    averaged = steps if averaged is None else averaged
    profile = decays.new_zeros(steps + 1)
    interval = min(interval, max(averaged, 1))
    updates = -(-averaged // interval)
    # the first update may follow fewer steps than an interval
    padded = decays.new_ones(updates * interval)
    padded[len(padded) - averaged :] = decays[:averaged]
    each = padded.view(updates, interval).prod(1)
    # what all later updates leave of each
    left = each.flip(0).cumprod(0).flip(0)
    profile[0] = left[0] if updates else 1.0
    after = torch.cat([left[1:], left.new_ones(1)])[:updates]
    last = averaged - interval * torch.arange(updates).flip(0)
    profile[last] = (1 - each) * after
    return profile


def placed(profile: Tensor, at: int, total: int) -> Tensor:
    """Return a profile of an average that ends at a step of a longer run.

    Where it has fewer steps than ``at``, it started later, from the weights
    of that moment.
    """
    longer = profile.new_zeros(total + 1)
    longer[at + 1 - len(profile) : at + 1] = profile
    return longer


def raw(step: int, total: int) -> Tensor:
    """Return the profile of the weights after a step; 0 for the start."""
    profile = torch.zeros(total + 1, dtype=torch.float64)
    profile[step] = 1
    return profile


def power_decays(sigma_rel: float, steps: int) -> Tensor:
    """Return the decays of a power average, of profile ``p(t) ~ t**gamma``.

    ``d(t) = (1 - 1 / t)**(gamma + 1)``; the standard deviation of t under the
    profile is ``sigma_rel`` of the run, whatever its length.
    """
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    decays: Tensor = (1 - 1 / t) ** (power_exponent(sigma_rel) + 1)
    return decays


def power_exponent(sigma_rel: float) -> float:
    """Return the gamma that has this relative standard deviation.

    ``sigma_rel**2 = (gamma + 1) / ((gamma + 2)**2 * (gamma + 3))``, which
    falls from 0.2886 at gamma = 0.
    """
    sigma_rel = check_number(
        'sigma_rel', sigma_rel, 0, 1 / math.sqrt(12), low_open=True
    )
    low, high = 0.0, 1 / sigma_rel
    for _ in range(100):
        gamma = (low + high) / 2
        found = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))
        low, high = (gamma, high) if found > sigma_rel**2 else (low, gamma)
    return (low + high) / 2


def wsm_coefficients(decay: str, steps: Sequence[int]) -> Tuple[float, ...]:
    """Return what files of raw weights count in a merge, WSM.

    The merge stands for a learning rate that decays from the first file on by
    the factor f, to 0 one spacing after the last: the weights that changed
    before file i count ``f(i)``, so the file counts ``f(i) - f(i + 1)``.
    Under 'linear', all count the same. ``steps`` are those of the files.
    """
    factor, count = WSM[decay], len(steps)
    if count == 1:
        return (1.0,)
    span = (steps[-1] - steps[0]) * count / (count - 1)
    factors = [factor((step - steps[0]) / span) for step in steps] + [0.0]
    return tuple(a - b for a, b in zip(factors, factors[1:]))


def bema_share(steps: int, eta: float) -> float:
    """Return how much of ``w(steps) - w(0)`` BEMA adds to an average."""
    return float((10.0 + steps) ** -eta)


@dataclass(frozen=True)
class Profile:
    """What an average of files should be; made by :func:`parse_profile`."""

    text: str
    kind: str
    value: Any = None

    @property
    def is_fitted(self) -> bool:
        """Whether it is asked of all steps, not of the files alone."""
        return self.kind in ('ema', 'power', 'schedule', 'swa')

    def target(
        self, steps: int, interval: int = 1, averaged: Optional[int] = None
    ) -> Tensor:
        """Return the profile after so many steps of a run.

        Args:
            steps: The steps.
            interval: Steps between the updates of the run: between them
                nothing is averaged. Defaults to 1.
            averaged: The step of the last update. Defaults to the last one.
        """
        if self.kind == 'swa':
            last = self.value
            if isinstance(last, float):
                last = max(round(last * steps), 1)
            if last > steps:
                raise OptionError(
                    f'{self.text}: the files end at step {steps}; ask for '
                    f'at most as many, or for a share, as swa:25%.'
                )
            averaged = steps if averaged is None else averaged
            first = min(steps - last, averaged - 1)  # a step at least
            counted = torch.arange(averaged, first, -interval)
            profile = torch.zeros(steps + 1, dtype=torch.float64)
            profile[counted] = 1 / len(counted)
            return profile
        if self.kind == 'power':
            decays = power_decays(self.value, steps)
        else:
            decays = decays_of(self.value, steps)
        return profile_of(decays, interval, averaged)


_FORMS = (
    "'mean', 'ema:0.9995', 'ema:0.9999/2000' (with the tau of a ramp), "
    "'swa:25%', 'swa:5000' (steps), 'power:0.05', 'lawa:5' (files), "
    "'wsm:cosine', 'bema:0.2', 'soup:greedy', 'coefficients:0.3,0.7' (a "
    "file each), or a schedule, as 'inverse(decay=0.999)'"
)


def parse_profile(text: str) -> Profile:
    """Read a profile as it is written on the command line."""
    kind, _, given = text.partition(':')
    if '(' in text:
        return Profile(text, 'schedule', parse_schedule(text))
    if text in ('mean', 'soup:greedy'):
        return Profile(text, kind)
    read = _READ.get(kind)
    if read is None or not given:
        raise OptionError(f'profile={show(text)} is not known; use {_FORMS}.')
    try:
        return Profile(text, kind, read(given))
    except OptionError as error:
        raise OptionError(f'profile={show(text)}: {error}') from None
    except (ValueError, TypeError):
        raise OptionError(
            f'profile={show(text)} cannot be read; use {_FORMS}.'
        ) from None


def _read_ema(given: str) -> Schedule:
    decay, slash, tau = given.partition('/')
    if slash:
        return exponential(float(decay), float(tau))
    return constant(float(decay))


def _read_swa(given: str) -> float:
    if not given.endswith('%'):
        return _read_count(given)
    share = check_number('swa', float(given[:-1]), 0, 100, low_open=True)
    return share / 100


def _read_count(given: str) -> int:
    count = int(given)
    if count < 1:
        raise ValueError(given)
    return count


def _read_power(given: str) -> float:
    power_exponent(float(given))
    return float(given)


_READ: Dict[str, Callable[[str], Any]] = {
    'coefficients': lambda x: [float(y) for y in x.split(',')],
    'bema': lambda x: check_number('eta', float(x), 0, 1, low_open=True),
    'ema': _read_ema,
    'lawa': _read_count,
    'power': _read_power,
    'swa': _read_swa,
    'wsm': lambda x: check_choice('decay', x, WSM),
}


@dataclass(frozen=True)
class Fit:
    """Coefficients, and what they are worth.

    Attributes:
        coefficients: One a basis; they sum up to 1.
        error: Of their profile, relative to the one that was asked for (in
            the L2 norm). It is not an error of a metric.
    """

    coefficients: Tuple[float, ...]
    error: float

    @property
    def absolute_sum(self) -> float:
        """Sum of the absolute coefficients, 1 where none is negative."""
        return math.fsum(map(abs, self.coefficients))

    @property
    def problem(self) -> str:
        """Why they should not be used, or nothing."""
        said = f'error of the profile {self.error:.1%}'
        if self.error > LARGEST_ERROR:
            return f'{said}, above {LARGEST_ERROR:.0%}'
        if self.absolute_sum > LARGEST_SUM + 1e-6:
            return (
                f'{said}, but the absolute coefficients sum up to '
                f'{self.absolute_sum:.3g}, above {LARGEST_SUM:g}'
            )
        return ''


def fit(
    bases: Sequence[Tensor],
    target: Tensor,
    largest_sum: float = LARGEST_SUM,
) -> Fit:
    """Return the coefficients whose profile is nearest to a target.

    Least squares, under the conditions that the coefficients sum up to 1 and
    their absolute values to no more than ``largest_sum``.

    No coefficient is negative where that is 1.
    """
    triangle = target.new_zeros(0, len(bases) + 1)
    # R of a QR has the lengths and angles of the columns: a few rows of it
    # stand for a million steps
    for first in range(0, len(target), _ROWS):
        rows = slice(first, first + _ROWS)
        block = torch.stack([*(x[rows] for x in bases), target[rows]], 1)
        triangle = torch.linalg.qr(torch.cat([triangle, block]), mode='r').R
    length = triangle[:, -1].norm()
    points = (triangle[:, :-1] - triangle[:, -1:]) / length
    found = _nearest_in_plane(points)
    if float(found.abs().sum()) > largest_sum + 1e-9:
        found = _nearest_in_hull(points, largest_sum)
    # what rounding leaves is no reason to read a file
    found = torch.where(found.abs() > 1e-12, found, torch.zeros_like(found))
    error = float((points @ found).norm())
    return Fit(tuple(found.tolist()), error)


def _nearest_in_plane(points: Tensor) -> Tensor:
    """Return c with sum 1 for which ``points @ c`` is nearest to 0.

    Of several, the one whose coefficients are the most equal.
    """
    count = points.shape[1]
    equal = points.new_full((count,), 1 / count)
    # directions that leave the sum as it is
    all_ones = points.new_ones(count, 1)
    free: Tensor = torch.linalg.qr(all_ones, mode='complete').Q[:, 1:]
    if not free.shape[1]:
        return equal
    found: Tensor = torch.linalg.lstsq(
        points @ free, -(points @ equal)[:, None], _RCOND, driver='gelsd'
    ).solution[:, 0]
    return equal + free @ found


def _nearest_in_hull(points: Tensor, largest_sum: float) -> Tensor:
    """Return c with sum 1 and bounded ``|c|``, ``points @ c`` nearest to 0.

    Such c are the mixtures of corners ``(1 + s) e_i - s e_j``, with s half of
    what the sum may be above 1. Wolfe 1976, "Finding the nearest point in a
    polytope", goes from corner to corner.
    """
    above = (largest_sum - 1) / 2
    one = torch.eye(points.shape[1], dtype=points.dtype)
    corners = one[:, points.norm(dim=0).argmin()][:, None]
    weights = corners.new_ones(1)
    for _ in range(20 * len(one)):
        here = points @ (corners @ weights)
        slopes = here @ points
        best, worst = slopes.argmin(), slopes.argmax()
        corner = (1 + above) * one[:, best] - above * one[:, worst]
        if slopes @ corner >= here @ here - 1e-13:
            break
        corners = torch.cat([corners, corner[:, None]], 1)
        weights = torch.cat([weights, weights.new_zeros(1)])
        while True:
            wanted = _nearest_in_plane(points @ corners)
            leaving = wanted <= 0
            if not leaving.any():
                break
            # go towards it, until the first one has become 0
            away = weights[leaving] / (weights[leaving] - wanted[leaving])
            weights = weights + away.min() * (wanted - weights)
            kept = torch.ones_like(leaving)
            kept[leaving.nonzero()[:, 0][away.argmin()]] = False
            corners, weights = corners[:, kept], weights[kept]
        weights = wanted
    return corners @ (weights / weights.sum())
