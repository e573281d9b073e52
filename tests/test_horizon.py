"""Products of decays, windows and shares, against exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdet_ema.averaging import OptionError, build_schedule
from mmdet_ema.schedules import decay_over, initial_share, window
from tests.oracle import ramp


@settings(deadline=None)
@given(
    decays=st.lists(
        st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=12
    ),
    data=st.data(),
)
def test_decay_over_is_the_product(decays, data):
    """One update over several steps has the product of their decays."""
    first = data.draw(st.integers(1, len(decays)))
    last = data.draw(st.integers(first, len(decays)))
    schedule = build_schedule(lambda n: decays[n - 1])
    exact = Fraction(1)
    for decay in decays[first - 1 : last]:
        exact *= Fraction(decay)
    # Twelve roundings; products below the normal numbers lose digits.
    expected = pytest.approx(float(exact), rel=12 * 2**-52, abs=1e-300)
    assert expected == decay_over(schedule, first, last)


def test_an_interval():
    """A constant decay over k steps is its k-th power, a ramp the product."""
    schedule = build_schedule('constant', decay=0.999)
    # Four roundings in float64.
    assert pytest.approx(0.999**4, rel=1e-15) == decay_over(schedule, 5, 8)
    found = decay_over(build_schedule('exponential'), 997, 1000)
    # exp and expm1 differ in the last digits for small n / tau.
    expected = np.prod([ramp(n) for n in range(997, 1001)])
    assert pytest.approx(expected, rel=1e-14) == found


def test_one_step_is_exact():
    """Over one step the decay is the schedule's, bit for bit."""
    schedule = build_schedule('exponential')
    assert schedule(7) == decay_over(schedule, 7, 7)


def test_bad_decay_is_found():
    """A schedule that returns no decay is refused wherever it is used."""
    schedule = build_schedule(lambda n: 0.5 if n < 3 else -1)
    for call in (
        lambda: decay_over(schedule, 1, 3),
        lambda: decay_over(schedule, 3, 3),
        lambda: initial_share(schedule, 3),
    ):
        with pytest.raises(OptionError, match='n = 3'):
            call()
    assert 0.25 == initial_share(schedule, 2)


@pytest.mark.parametrize(
    ('decay', 'expected'),
    [(0, 1), (0.5, 2), (0.75, 4), (1 - 2**-20, 2**20), (1, math.inf)],
)
def test_window(decay, expected):
    """The window of a decay is 1 / (1 - decay)."""
    assert expected == window(decay)


def test_window_is_the_mean_age():
    """The window is one more than the mean age of what is averaged."""
    decay, ages = 0.99, np.arange(20_000)
    weights = (1 - decay) * decay**ages
    # The sum over all ages is cut off at 20,000.
    expected = (weights * ages).sum() + 1
    assert pytest.approx(expected, rel=1e-9) == window(decay)


@pytest.mark.parametrize(
    ('name', 'options', 'steps', 'expected'),
    [
        ('constant', dict(decay=0.9999), 10_000, 0.9999**10_000),
        ('constant', dict(decay=0.9998), 1000, 0.9998**1000),
        ('exponential', {}, 2, 0.9999**2 * 5.0e-4 * 1e-3),
        (
            'exponential',
            dict(decay=0.9, tau=10, init_updates=20),
            3,
            np.prod([0.9 * (1 - np.exp(-n / 10)) for n in (21, 22, 23)]),
        ),
        ('mean', {}, 5, 0.0),
        ('annealing', {}, 5, 0.0),
        ('constant', dict(decay=0.0), 1, 0.0),
        ('constant', {}, 0, 1.0),
    ],
)
def test_initial_share(name, options, steps, expected):
    """The share of the initial weights is the product of all decays."""
    found = initial_share(build_schedule(name, **options), steps)
    # The ramp's first decays are quoted to three digits.
    tolerance = 1e-3 if name == 'exponential' else 1e-10
    assert pytest.approx(expected, rel=tolerance) == found


def test_initial_share_is_what_is_left():
    """The share is the weight that 1 has after averaging zeros."""
    schedule = build_schedule('inverse', decay=0.99)
    average = np.float64(1.0)
    for n in range(1, 9):
        decay = min(0.99, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * 0.0
    assert pytest.approx(average, rel=1e-12) == initial_share(schedule, 8)


def test_nothing_left():
    """A share below 1e-12 is nothing, found without a long loop."""
    seen = []
    schedule = build_schedule(lambda n: seen.append(n) or 0.5)
    assert 0.0 == initial_share(schedule, 10**9)
    assert len(seen) < 50
