"""Profiles: exact, and what can be made of those that a run leaves.

The oracle is the recurrence itself: averaged over unit vectors, one a step,
it gives the profile.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from mmdet_ema import OptionError
from mmdet_ema.checkpoint import profiles
from mmdet_ema.schedules import (
    annealing,
    build_schedule,
    constant,
    exponential,
    mean,
    parse_schedule,
    power,
    to_the_power,
)
from tests import oracle

SCHEDULES = [
    exponential(0.99, 30),
    constant(0.98),
    annealing(0.99, 5),  # the first update copies
    mean(),
    power(0.99, update_after_step=7),
    constant(0.0),
]


def by_recurrence(decay_of, steps, interval=1):
    start, *weights = np.eye(steps + 1)
    if interval == 1:
        return oracle.average(start, weights, decay_of)
    return oracle.average_every(start, weights, decay_of, interval)


def found(schedule, steps, **options):
    decays = profiles.decays_of(schedule, steps)
    return profiles.profile_of(decays, **options).numpy()


@pytest.mark.parametrize('schedule', SCHEDULES, ids=str)
def test_profile(schedule):
    """What the recurrence makes of unit vectors, and 1 in all."""
    profile = found(schedule, 200)
    # a product of 200 decays is rounded 200 times
    np.testing.assert_allclose(
        profile, by_recurrence(schedule, 200), rtol=1e-13, atol=0
    )
    assert profile.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize('interval', [1, 3, 7])
def test_interval(interval):
    """An update has the product of the decays of its steps."""
    ramp = exponential(0.95, 10)
    averaged = 100 - 100 % interval
    profile = found(ramp, 100, interval=interval, averaged=averaged)
    expected = by_recurrence(ramp, 100, interval)
    np.testing.assert_allclose(profile, expected, rtol=1e-13, atol=0)
    none = found(ramp, 2, interval=3, averaged=0)
    np.testing.assert_array_equal([1, 0, 0], none)


def test_phase():
    """The first update may come after fewer steps than an interval."""
    profile = found(constant(0.9), 9, interval=4, averaged=7)
    start, expected = np.eye(10)[0], np.zeros(10)
    expected = 0.9**3 * start + (1 - 0.9**3) * np.eye(10)[3]
    expected = 0.9**4 * expected + (1 - 0.9**4) * np.eye(10)[7]
    np.testing.assert_allclose(profile, expected, rtol=1e-13, atol=0)


def test_placed():
    """An average that was added later starts from the weights of then."""
    profile = profiles.placed(torch.tensor([0.25, 0.25, 0.5]), 5, 7)
    assert [0, 0, 0, 0.25, 0.25, 0.5, 0, 0] == profile.tolist()


def power_profile(sigma, steps):
    return profiles.profile_of(profiles.power_decays(sigma, steps))


@pytest.mark.parametrize('sigma', [0.01, 0.05, 0.1, 0.25])
def test_power(sigma):
    """The standard deviation of t is its share of the run."""
    profile = power_profile(sigma, 20_000).numpy()
    t = np.arange(20_001)
    middle = (profile * t).sum()
    deviation = ((profile * (t - middle) ** 2).sum()) ** 0.5
    # steps are discrete: their spacing is 5e-5 of the run
    assert deviation / 20_000 == pytest.approx(sigma, rel=1e-3)
    gamma = profiles.power_exponent(sigma)
    rule = by_recurrence(lambda n: (1 - 1 / n) ** (gamma + 1), 100)
    np.testing.assert_allclose(power_profile(sigma, 100), rule, rtol=1e-11)


FILES = range(1_000, 12_001, 1_000)


def of_files(schedule):
    decays = profiles.decays_of(schedule, 12_000)
    return [
        profiles.placed(profiles.profile_of(decays[:n]), n, 12_000)
        for n in FILES
    ]


def powers(*sigmas):
    return [
        profiles.placed(power_profile(sigma, n), n, 12_000)
        for sigma, n in itertools.product(sigmas, FILES)
    ]


START = profiles.raw(0, 12_000)
MAIN = of_files(exponential(0.9999, 2_000))
BASES = {
    'today': MAIN + [profiles.raw(n, 12_000) for n in FILES],
    'fast': [*MAIN, *of_files(exponential(0.999, 500)), START],
    'two powers': [*powers(0.05, 0.1), START],
    'three powers': [*powers(0.01, 0.05, 0.1), START],
}


@pytest.mark.parametrize(
    ('bases', 'profile', 'error'),
    [
        ('today', 'ema:0.999', 0.51),
        ('today', 'ema:0.9998', 1.0),
        ('today', 'ema:0.9999/2000', 0),
        ('today', 'swa:25%', 1.0),
        ('fast', 'ema:0.999', 0),
        ('fast', 'ema:0.9998', 0.020),
        ('fast', 'ema:0.9995/1000', 0.051),
        ('fast', 'swa:25%', 0.13),
        ('two powers', 'ema:0.9995/1000', 0.010),
        ('two powers', 'swa:3000', 0.039),
        ('three powers', 'ema:0.9999/2000', 0.019),
    ],
)
def test_what_a_run_allows(bases, profile, error):
    """The errors of a run of 12,000 steps that leaves 12 files."""
    target = profiles.parse_profile(profile).target(12_000)
    fit = profiles.fit(BASES[bases], target, math.inf)
    # the digits that are known
    assert fit.error == pytest.approx(error, abs=5e-4, rel=0.03)
    assert sum(fit.coefficients) == pytest.approx(1, abs=1e-12)
    sums = sum(c * p for c, p in zip(fit.coefficients, BASES[bases]))
    checked = float((sums - target).norm() / target.norm())
    assert fit.error == pytest.approx(checked, abs=1e-12)
    refused = error > 0.1 or fit.absolute_sum > 3
    assert bool(fit.problem) == refused
    bounded = profiles.fit(BASES[bases], target)
    assert bounded.absolute_sum <= 3 + 1e-9
    assert (bounded == fit) == (fit.absolute_sum <= 3)


def test_refused_by_the_sum():
    """A window far above those of the bases takes large differences."""
    steps = 12_000
    target = profiles.parse_profile('ema:0.9999/2000').target(steps)
    fit = profiles.fit(BASES['two powers'], target, math.inf)
    assert fit.error < 0.1
    assert fit.absolute_sum > 5
    assert 'absolute coefficients sum up to 6.7, above 3' in fit.problem


@pytest.mark.parametrize('largest', [1, 1.2, 3])
@pytest.mark.parametrize('bases', BASES)
def test_bounded(bases, largest):
    """Nothing that the bound allows is nearer."""
    target = profiles.parse_profile('ema:0.9999/3000').target(12_000)
    columns = BASES[bases]
    fit = profiles.fit(columns, target, largest)
    found = torch.tensor(fit.coefficients, dtype=torch.float64)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert found.abs().sum() <= largest + 1e-9
    if largest == 1:
        assert found.min() >= 0
    # the distance falls towards no corner of what is allowed, so, as both
    # are convex, towards nothing in it
    matrix = torch.stack(columns, 1)
    slopes = matrix.T @ (matrix @ found - target) / target.norm() ** 2
    above = (largest - 1) / 2
    corner = (1 + above) * slopes.min() - above * slopes.max()
    assert corner - slopes @ found > -1e-9


def test_of_one_basis():
    """It counts 1, whatever the target."""
    for largest in (1, 3):
        fit = profiles.fit([START], MAIN[3], largest)
        assert (1.0,) == fit.coefficients


@pytest.mark.parametrize('decay', profiles.WSM)
def test_wsm(decay):
    """A merge is a run whose changes count what the learning rate would."""
    steps = [100, 250, 300, 600]
    draw = np.random.RandomState(0)
    weights = draw.randn(601).cumsum()
    merged = np.dot(profiles.wsm_coefficients(decay, steps), weights[steps])
    rate = {
        '1-sqrt': lambda u: 1 - u**0.5,
        'cosine': lambda u: np.cos(np.pi * u) / 2 + 0.5,
        'linear': lambda u: 1 - u,
    }[decay]
    expected = weights[100]
    for before, after in zip(steps, steps[1:]):
        change = weights[after] - weights[before]
        expected += rate((after - 100) / (500 * 4 / 3)) * change
    assert merged == pytest.approx(expected, abs=1e-12)


def test_wsm_linear():
    """Evenly spaced, it is the mean; of one file, that file."""
    found = profiles.wsm_coefficients('linear', [3, 5, 7, 9])
    assert found == pytest.approx([0.25] * 4, abs=1e-15)
    assert (1.0,) == profiles.wsm_coefficients('cosine', [7])


def test_swa():
    """The mean of the last steps, by share or by number."""
    for text in ('swa:25%', 'swa:2'):
        profile = profiles.parse_profile(text).target(8)
        assert [0] * 7 + [0.5, 0.5] == profile.tolist()
    last = profiles.parse_profile('swa:1%').target(8)
    assert 1 == last[-1]
    # steps 2, 5 and 8 were averaged
    every_third = profiles.parse_profile('swa:5').target(9, 3, 8)
    assert [0] * 5 + [0.5, 0, 0, 0.5, 0] == every_third.tolist()
    last = profiles.parse_profile('swa:1').target(9, 3, 8)
    assert 1 == last[8]


@pytest.mark.parametrize(
    ('text', 'match'),
    [
        ('emaa:0.9', "profile='emaa:0.9' is not known; use 'mean', 'ema:0"),
        ('ema', "profile='ema' is not known"),
        ('mean:3', "profile='mean:3' is not known"),
        ('ema:1', 'decay=1.0 is out of range'),
        ('ema:0.9/0', 'tau=0.0 is out of range'),
        ('ema:x', "profile='ema:x' cannot be read"),
        ('swa:0%', 'swa=0.0 is out of range'),
        ('swa:101%', 'swa=101.0 is out of range'),
        ('swa:2.5', "profile='swa:2.5' cannot be read"),
        ('lawa:0', "profile='lawa:0' cannot be read"),
        ('wsm:sine', "decay='sine' is not known; choose one of '1-sqrt'"),
        ('bema:0', 'eta=0.0 is out of range'),
        ('power:0.3', 'sigma_rel=0.3 is out of range'),
        ('soup', "profile='soup' is not known"),
        ('my.schedule()', 'not the text of a schedule with a name'),
        ('mean(', 'not the text of a schedule with a name'),
        ('constant(decay=2)', 'decay=2 is out of range'),
        ('constant(tau=2)', "schedule 'constant' has no option 'tau'"),
    ],
)
def test_refused(text, match):
    """One line that says what can be asked for."""
    with pytest.raises(OptionError, match=match) as error:
        profiles.parse_profile(text)
    assert '\n' not in str(error.value)


def test_more_steps_than_there_are():
    """A mean of more steps than the files have seen is refused."""
    with pytest.raises(OptionError, match='swa:9: the files end at step 8'):
        profiles.parse_profile('swa:9').target(8)


@pytest.mark.parametrize(
    'schedule',
    [
        *SCHEDULES,
        exponential(0.9, 3, init_updates=5),
        build_schedule('half_life', half_life=7),
        build_schedule('cosine', total_steps=9),
        to_the_power(exponential(0.9, 3), 2.5),
    ],
    ids=str,
)
def test_text_of_a_schedule(schedule):
    """It is read again as what it was."""
    again = parse_schedule(str(schedule))
    assert str(again) == str(schedule)
    assert [*map(again, range(1, 20))] == [*map(schedule, range(1, 20))]


def test_wrong_decay():
    """A callable that returns no decay is refused, with the n."""
    schedule = build_schedule(lambda n: 0.5 if n < 4 else 1.5)
    with pytest.raises(OptionError, match=r'returned 1\.5 for n = 4'):
        profiles.decays_of(schedule, 9)
