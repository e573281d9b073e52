"""Values of the schedules, against other arithmetic and peers' formulas."""

import copy
import decimal
import math
import pickle
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmdet_ema import schedules as module
from mmdet_ema.averaging import OptionError, Schedule, WeightAverager

UPDATES = (1, 2, 3, 10, 100, 999, 1000, 2000, 5000, 10_000, 123_456)
# Two roundings of a number near 1, in float64.
ULPS = 2 * 2.0**-52


@pytest.fixture(autouse=True)
def _fifty_digits():
    with decimal.localcontext() as context:
        context.prec = 50
        yield


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def id_of(value):
    return str(value) if isinstance(value, Schedule) else 'formula'


def ramp(n, decay, tau):
    return Decimal(decay) * (1 - (-Decimal(n) / Decimal(tau)).exp())


def decimal_power(n, power, inv_gamma, low, high, after):
    s = n - after - 1
    if s <= 0:
        return Decimal(0)
    base = 1 + Decimal(s) / Decimal(inv_gamma)
    value = 1 - base ** -Decimal(power)
    return min(max(value, Decimal(low)), Decimal(high))


def fraction(value):
    return Decimal(value.numerator) / Decimal(value.denominator)


def annealed(n, decay, gamma):
    momentum = Fraction(gamma) / (Fraction(gamma) + n - 1)
    return fraction(1 - max(1 - Fraction(decay), momentum))


TABLE = [
    (module.exponential(), lambda n: ramp(n, 0.9999, 2000)),
    (module.exponential(0.9998, 1000), lambda n: ramp(n, 0.9998, 1000)),
    (module.exponential(0, 1), lambda n: Decimal(0)),
    (module.exponential(0.5, 1e-9), lambda n: Decimal('0.5')),
    (
        module.exponential(0.999, 2000, init_updates=10_560),
        lambda n: ramp(10_560 + n, 0.999, 2000),
    ),
    (
        module.exponential(init_updates=1),
        lambda n: ramp(1 + n, 0.9999, 2000),
    ),
    (module.constant(), lambda n: Decimal('0.9999')),
    (module.constant(0.25), lambda n: Decimal('0.25')),
    (
        module.inverse(),
        lambda n: min(Decimal('0.9999'), fraction(Fraction(1 + n, 10 + n))),
    ),
    (
        module.inverse(0.5),
        lambda n: min(Decimal('0.5'), fraction(Fraction(1 + n, 10 + n))),
    ),
    (module.annealing(), lambda n: annealed(n, 0.9999, 100)),
    (module.annealing(0.99, 2.5), lambda n: annealed(n, 0.99, 2.5)),
    (module.power(), lambda n: decimal_power(n, 2 / 3, 1, 0, 0.9999, 0)),
    (
        module.power(0.999, 0.75, 2.0, 0.25, 7),
        lambda n: decimal_power(n, 0.75, 2, 0.25, 0.999, 7),
    ),
    (module.mean(), lambda n: fraction(Fraction(n - 1, n))),
    (module.half_life(), lambda n: Decimal(2) ** (Decimal(-1) / 1000)),
    (module.half_life(0.5), lambda n: Decimal('0.25')),
]


@pytest.mark.parametrize('copied', [copy.deepcopy, pickled], ids=['deep', ''])
@pytest.mark.parametrize('schedule', [row[0] for row in TABLE], ids=id_of)
def test_copies(schedule, copied):
    """A copy of a schedule, scaled or not, is the same function."""
    for original in (schedule, module.to_the_power(schedule, 2.5)):
        copy = copied(original)
        assert str(original) == str(copy)
        assert original.limit == copy.limit
        assert all(original(n) == copy(n) for n in UPDATES)


def test_copies_of_a_function():
    """A schedule that is a function of a user's is copied as that is."""
    schedule = module.build_schedule(math.tanh)
    assert math.tanh is pickled(schedule).function
    scaled = copy.deepcopy(module.to_the_power(schedule, 2))
    assert math.tanh(1) ** 2 == scaled(1)


@pytest.mark.parametrize(('schedule', 'exact'), TABLE, ids=id_of)
def test_values(schedule, exact):
    """Every schedule is its formula, computed to 50 digits."""
    expected = [float(exact(n)) for n in UPDATES]
    found = [schedule(n) for n in UPDATES]
    assert expected == pytest.approx(found, rel=ULPS, abs=ULPS)


@pytest.mark.parametrize('total', [1, 2, 7, 1000])
@pytest.mark.parametrize('ends', [(0.996, 1.0), (0.5, 0.9), (0.9, 0.1)])
def test_cosine(total, ends):
    """The cosine ramp is its formula and stays at its end afterwards."""
    start, end = ends
    n = np.arange(1, 3 * total + 2)
    t = np.minimum(n - 1, total).astype(np.longdouble) / total
    half = (np.cos(np.pi * t) + 1) / 2
    expected = end - (end - start) * half
    schedule = module.cosine(total, start, end)
    found = [schedule(int(i)) for i in n]
    assert expected.astype(float) == pytest.approx(found, rel=0, abs=ULPS)
    assert start == pytest.approx(found[0], abs=ULPS)
    assert end == found[-1]


EXACT = {
    'exponential': lambda n: ramp(n, 0.9999, 2000),
    'inverse': lambda n: fraction(Fraction(1 + n, 10 + n)),
    'annealing': lambda n: fraction(1 - Fraction(100, 99 + n)),
    'power': lambda n: 1 - Decimal(n) ** (Decimal(-2) / 3),
    'mean': lambda n: fraction(Fraction(n - 1, n)),
}


def test_operating_points():
    """The documented n are the first at which the decays are reached."""
    row = r'^``(\w+)``\s+([\d,]+)\s+([\d,]+)\s+([\d,]+)$'
    found = re.findall(row, module.__doc__, re.MULTILINE)
    assert sorted(EXACT) == sorted(name for name, *_ in found)
    for name, *numbers in found:
        for n, level in zip(numbers, map(Decimal, ('0.9', '0.99', '0.999'))):
            first = int(n.replace(',', ''))
            # 1 - 1000^(-2/3) is 0.99, but for the fiftieth digit
            assert EXACT[name](first) >= level - Decimal('1e-40')
            assert level > EXACT[name](first - 1)


def test_quoted_start_of_the_ramp_leaves_none():
    """From 10,560 updates on, a ramp is within 1 % of its end."""
    assert module.exponential(init_updates=10_560)(1) > 0.99 * 0.9999


def test_other_quoted_numbers():
    """The shares and half-lives that the docstrings quote are right."""
    assert '37' == f'{Decimal("0.9999") ** 10_000:.0%}'[:-1]
    for life, decay in ((693, '0.999'), (6931, '0.9999')):
        found = Decimal(2) ** (Decimal(-1) / life)
        # Quoted to the last digit that is written.
        assert abs(found - Decimal(decay)) < Decimal('1e-6')


def yolov5(n, decay=0.9999, tau=2000):
    return decay * (1 - math.exp(-n / tau))


def mmdet2_exp_momentum(n, momentum=0.0002, total=2000):
    iteration = n - 1
    rate = (1 - momentum) * math.exp(-(1 + iteration) / total) + momentum
    return 1 - rate


def timm_v3(n, decay=0.9999, power=2 / 3, gamma=1.0, low=0.0, after=0):
    step = max(0, n - after - 1)
    if step <= 0:
        return 0.0
    value = 1 - (1 + step / gamma) ** -power
    return max(min(value, decay), low)


def mmpretrain_cosine(n, total, momentum=0.004, end=0.0):
    steps = n - 1
    rate = end - (end - momentum) * (math.cos(math.pi * steps / total) + 1) / 2
    return 1 - rate


PEERS = [
    (module.exponential(), yolov5),
    (module.exponential(0.9998, 1000), lambda n: yolov5(n, 0.9998, 1000)),
    (module.exponential(0.9998), mmdet2_exp_momentum),
    # TensorFlow, mmengine's MomentumAnnealingEMA
    (module.inverse(), lambda n: min(0.9999, (1.0 + n) / (10.0 + n))),
    (module.annealing(), lambda n: 1 - max(0.0001, 100 / (100 + n - 1))),
    (module.power(), timm_v3),
    (
        module.power(0.999, 0.75, 2.0, 0.1, 100),
        lambda n: timm_v3(n, 0.999, 0.75, 2.0, 0.1, 100),
    ),
    (module.cosine(20_000), lambda n: mmpretrain_cosine(n, 20_000)),
    # torch's SWA, Composer
    (module.mean(), lambda n: 1 - 1 / n),
    (module.half_life(), lambda n: 0.5 ** (1 / 1000)),
]


@pytest.mark.parametrize(('schedule', 'peer'), PEERS, ids=id_of)
def test_peers(schedule, peer):
    """Each schedule has the numbers of the peer that its docstring names."""
    # Peers subtract two numbers near 1: absolute error of their rounding.
    for n in (*range(1, 50), 100, 101, 102, 103, 1000, 9999, 20_000):
        assert peer(n) == pytest.approx(schedule(n), rel=0, abs=2 * ULPS)


def test_mean_is_torch_swa():
    """``mean`` gives the averages of torch's ``AveragedModel``."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    averager = WeightAverager(model, 'mean')
    peer = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        averager.update()
        peer.update_parameters(model)
    for name, average in averager.named_averages():
        expected = peer.module.state_dict()[name]
        # Thirty float32 roundings of numbers below 8, on both sides.
        torch.testing.assert_close(average, expected, rtol=0, atol=1e-5)


@settings(deadline=None)
@given(
    n=st.integers(1, 10**7),
    decay=st.floats(0, 1, exclude_max=True, allow_subnormal=False),
    constant=st.floats(1e-6, 1e9),
)
def test_ramps_stay_in_range(n, decay, constant):
    """No option makes a ramp fall, leave [0, 1] or pass its limit."""
    ramps = [
        module.exponential(decay, constant),
        module.inverse(decay),
        module.annealing(decay, constant),
        module.power(decay, 2 / 3, constant),
        module.half_life(constant),
        module.mean(),
    ]
    for schedule in ramps:
        limit = 1 if schedule.limit is None else schedule.limit
        now, later = schedule(n), schedule(n + 1)
        # 1 - (1 - decay) is not decay in float64, but next to it.
        assert 0 <= now <= limit + ULPS
        assert now <= later + ULPS


@settings(deadline=None)
@given(
    n=st.integers(1, 10**6),
    total=st.integers(1, 10**6),
    start=st.floats(0, 1, allow_subnormal=False),
    end=st.floats(0, 1, allow_subnormal=False),
)
def test_cosine_stays_between_its_ends(n, total, start, end):
    """The cosine ramp never returns what is no decay."""
    decay = module.cosine(total, start, end)(n)
    assert 0 <= decay <= 1
    assert min(start, end) - ULPS <= decay <= max(start, end) + ULPS


BAD = [
    (module.exponential, dict(decay=1), 'decay=1 ', '[0, 1)', 'never move'),
    (module.exponential, dict(decay=-0.1), 'decay=-0.1', '[0, 1)', ''),
    (module.exponential, dict(tau=0), 'tau=0', '(0, inf)', "'constant'"),
    (module.exponential, dict(tau=math.inf), 'tau=inf', '(0, inf)', ''),
    (module.exponential, dict(tau=10**400), 'tau=1000', '(0, inf)', ''),
    (module.exponential, dict(init_updates=-1), '=-1', 'at least 0', ''),
    (module.constant, dict(decay=1.0), 'decay=1.0', '[0, 1)', 'never move'),
    (module.inverse, dict(decay=1.5), 'decay=1.5', '[0, 1)', 'never move'),
    (module.annealing, dict(decay=1), 'decay=1 ', '[0, 1)', 'never move'),
    (module.annealing, dict(gamma=0), 'gamma=0', '(0, inf)', ''),
    (module.power, dict(power=0), 'power=0', '(0, inf)', ''),
    (module.power, dict(inv_gamma=-1), 'inv_gamma=-1', '(0, inf)', ''),
    (module.power, dict(min_decay=0.99999), '=0.99999', '[0, 0.9999]', ''),
    (module.power, dict(update_after_step=-1), '=-1', 'at least 0', ''),
    (module.cosine, dict(total_steps=0), '=0', 'at least 1', ''),
    (module.cosine, dict(total_steps=5, decay=2), 'decay=2', '[0, 1]', ''),
    (module.cosine, dict(total_steps=5, end_decay=-1), '=-1', '[0, 1]', ''),
    (module.half_life, dict(half_life=0), 'half_life=0', '(0, inf)', ''),
    (module.half_life, dict(half_life=1e20), '=1e+20', '1e15', 'never move'),
]


@pytest.mark.parametrize(('make', 'options', 'value', 'allowed', 'hint'), BAD)
def test_option_out_of_range(make, options, value, allowed, hint):
    """A bad option is named with its value, its range and what to do."""
    with pytest.raises(OptionError) as error:
        make(**options)
    message = str(error.value)
    assert [] == [w for w in (value, allowed, hint) if w not in message]
    assert '\n' not in message


@pytest.mark.parametrize('gamma', [1e-6, 0.1, 0.6, 0.7, 1, 2.5, 100])
def test_annealing_begins_with_a_copy(gamma):
    """The first annealed update copies, whatever gamma is."""
    assert 0.0 == module.annealing(gamma=gamma)(1)


@pytest.mark.parametrize(
    ('schedule', 'expected'),
    [
        (module.exponential(), 'exponential(decay=0.9999, tau=2000.0)'),
        (
            module.exponential(init_updates=5),
            'exponential(decay=0.9999, tau=2000.0, init_updates=5)',
        ),
        (module.mean(), 'mean()'),
        (
            module.cosine(9),
            'cosine(total_steps=9, decay=0.996, end_decay=1.0)',
        ),
    ],
)
def test_text(schedule, expected):
    """A schedule prints as the call that makes it."""
    assert expected == str(schedule)


@pytest.mark.parametrize(
    ('schedule', 'expected'),
    [
        (module.exponential(0.9), 0.9),
        (module.constant(0.9), 0.9),
        (module.inverse(0.9), 0.9),
        (module.annealing(0.9), 0.9),
        (module.power(0.9), 0.9),
        (module.half_life(1), 0.5),
        (module.mean(), None),
        (module.cosine(5), None),
    ],
)
def test_limit(schedule, expected):
    """The limit of a schedule is what it tends to, if it does."""
    assert expected == schedule.limit
    if expected is not None:
        # A million updates of a ramp to 0.9: far past its end.
        assert expected == pytest.approx(schedule(10**6), rel=1e-9)
