"""What the hook says: every line, every warning, and that advice helps."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdet_ema.averaging import OptionError, build_schedule
from mmdet_ema.training.options import parse_options
from mmdet_ema.training.plan import Plan, RunFacts
from mmdet_ema.training.report import changes, describe, warnings
from tests import oracle

COUNTS = dict(averaged=12, copied=3, shared=4, bytes=5 * 2**20 + 2**19)


def test_lines():
    """The text says schedule, steps, window, share, tensors, memory."""
    schedule = build_schedule('exponential')
    decay = oracle.ramp(5000)
    share = np.prod(oracle.ramp(np.arange(1, 5001)))
    assert share < 1e-12
    assert describe(schedule, 1, 0, 5000, COUNTS).splitlines() == [
        'EMA: exponential(decay=0.9999, tau=2000.0), every step',
        '  steps: 5000 planned',
        f'  at the last step: decay {decay:.6g}, effective window '
        f'{1 / (1 - decay):.3g} steps',
        '  share of the initial weights left then: 0',
        '  tensors: 12 averaged, 3 copied, 4 frozen',
        '  memory of the averages: 5.5 MiB',
    ]


def test_share():
    """The share of the initial weights is that of the formula."""
    text = describe(build_schedule('constant'), 1, 0, 10_000, COUNTS)
    assert 'initial weights left then: 0.368' in text
    assert 'effective window 10,000 steps' in text


def test_interval():
    """An interval is said, and does not change window or share."""
    schedule = build_schedule('constant', decay=0.999)
    once = describe(schedule, 1, 0, 100, COUNTS).splitlines()
    text = describe(schedule, 4, 0, 100, COUNTS).splitlines()
    assert text[0].endswith('every 4 steps')
    assert once[1:] == text[1:]


def test_resumed():
    """On resume the steps that are done are said."""
    text = describe(build_schedule('mean'), 1, 60, 100, COUNTS)
    assert '  steps: 100 planned, 60 of them done' in text
    assert 'decay 0.99, effective window 100 steps' in text


def test_endless_window():
    """A decay of 1 averages all steps."""
    text = describe(build_schedule('cosine', total_steps=9), 1, 0, 10, COUNTS)
    assert 'decay 1, effective window all steps' in text


def test_no_steps():
    """A run without steps is described all the same."""
    text = describe(build_schedule('exponential'), 1, 0, 0, COUNTS)
    assert '  steps: 0 planned' in text


def test_bad_callable():
    """A schedule that is bad at the last step is found at the start."""
    schedule = build_schedule(lambda n: 0.5 if n < 100 else 3.0)
    with pytest.raises(OptionError, match='n = 100'):
        describe(schedule, 1, 0, 100, COUNTS)


@pytest.mark.parametrize(
    ('schedule', 'planned'),
    [
        (build_schedule('exponential'), 30_000),
        (build_schedule('constant', decay=0.999), 10_000),
        (build_schedule('mean'), 5),
        (build_schedule('cosine', total_steps=50_000), 50_000),
        (build_schedule(lambda n: 0.5), 10),
        (build_schedule('inverse'), 200_000),
    ],
    ids=str,
)
def test_no_warnings(schedule, planned):
    """Where all is well nothing is said."""
    assert [] == warnings(schedule, 1, planned)


def test_unsaturated():
    """A ramp that cannot saturate is named, with numbers and advice."""
    (text,) = warnings(build_schedule('exponential'), 1, 2000)
    window = 1 / (1 - oracle.ramp(2000))
    assert (
        'EMA: the ramp of exponential(decay=0.9999, tau=2000.0) cannot '
        f'saturate in 2000 steps: the window at the last step is '
        f'{window:.3g} steps, not 10,000 steps.'
    ) in text
    assert 'For 2000 steps take decay=0.995, tau=100' in text


@pytest.mark.parametrize('name', ['inverse', 'annealing', 'power'])
def test_unsaturated_ramps(name):
    """Every ramp with a limit is looked at."""
    found = warnings(build_schedule(name), 1, 2000)
    assert any('cannot saturate in 2000 steps' in text for text in found)
    assert any('faster ramp' in text for text in found)


@settings(deadline=None)
@given(
    planned=st.integers(10, 100_000),
    decay=st.sampled_from([0.9, 0.99, 0.999, 0.9998, 0.9999]),
    tau=st.sampled_from([1, 100, 2000, 1e6]),
)
def test_advice_helps(planned, decay, tau):
    """Whoever takes the pair that is advised is not warned again."""
    schedule = build_schedule('exponential', decay=decay, tau=tau)
    for text in warnings(schedule, 1, planned):
        found = re.search(r'take decay=([\d.]+), tau=(\d+) \(', text)
        if found is None:
            continue
        advised = build_schedule(
            'exponential', decay=float(found[1]), tau=float(found[2])
        )
        assert [] == warnings(advised, 1, planned)


@settings(deadline=None)
@given(
    planned=st.integers(10, 100_000),
    momentum=st.sampled_from([0.1, 0.01, 0.001, 0.0002, 0.0001]),
    gamma=st.sampled_from([1, 100, 2000, 1e6]),
    name=st.sampled_from(['ExpMomentumEMA', 'MomentumAnnealingEMA']),
)
def test_advice_under_openmmlab_words_helps(planned, momentum, gamma, name):
    """It is given in the words of the config, and helps there."""

    def found_with(momentum, gamma):
        words = dict(ema_type=name, momentum=momentum, gamma=gamma)
        schedule = parse_options(**words).schedule_for(planned)
        return warnings(schedule, 1, planned, phase=1)

    for text in found_with(momentum, gamma):
        found = re.search(r'take momentum=([\d.e-]+), gamma=(\d+) \(', text)
        if found is not None:
            assert [] == found_with(float(found[1]), float(found[2]))
        assert found is not None or 'cannot saturate' not in text


def test_advice_with_the_defaults():
    """For 1,000 steps the advice is what the guide says."""
    (text,) = warnings(build_schedule('exponential'), 1, 1000)
    assert 'For 1000 steps take decay=0.99, tau=50 (a window of 100' in text


def test_window_longer_than_the_run():
    """A fast ramp to a decay for longer runs is named, with advice."""
    schedule = build_schedule('exponential', tau=50)
    (text,) = warnings(schedule, 1, 1000)
    assert '10,000 steps, is longer than the run' in text
    assert 'take decay=0.99, tau=50' in text


@pytest.mark.parametrize(
    'options',
    [dict(decay=0.0002), dict(momentum=0.9998), dict(decay=0.0001, tau=1)],
)
def test_decay_and_momentum_mixed_up(options):
    """A decay that keeps nothing is asked about, both words named."""
    schedule = parse_options(**options).schedule_for(1000)
    text = ' '.join(warnings(schedule, 1, 1000))
    assert 'did you mean decay=0.999' in text
    assert 'Decay weighs the OLD average' in text


def test_decay_of_zero():
    """It is not asked whether a decay of 1 was meant, which is refused."""
    text = ' '.join(warnings(build_schedule('constant', decay=0), 1, 1000))
    assert 'keeps nothing of the old average' in text
    assert 'did you mean' not in text


def test_first_step_that_stays():
    """A constant decay whose first update is a copy starts cold as well."""
    schedule = parse_options(momentum=0.0002).schedule_for(24)
    (text,) = warnings(schedule, 1, 24, phase=1)
    share = 0.9998**23
    assert f'{share:.0%} of the average will still be the weights' in text
    assert 'of the first step' in text
    assert "ema_type='ExpMomentumEMA'" in text
    assert [] == warnings(schedule, 1, 20_000, phase=1)


def test_saturated_from_half_the_window():
    """The line is half of the final window."""
    schedule = build_schedule('exponential', decay=0.99, tau=100)
    half = next(
        n
        for n in range(1, 10_000)
        if 1 / (1 - oracle.ramp(n, 0.99, 100)) >= 50
    )
    assert [] == warnings(schedule, 1, half)
    (text,) = warnings(schedule, 1, half - 1)
    assert 'cannot saturate' in text


def test_cold():
    """Initial weights that would stay are named with their share."""
    (text,) = warnings(build_schedule('constant'), 1, 10_000)
    assert (
        'EMA: 37% of the average will still be the initial weights after '
        '10000 steps of constant(decay=0.9999).'
    ) in text
    assert "schedule='exponential'" in text


def test_cold_behind_the_ramp():
    """A ramp that starts at its end is no remedy for initial weights."""
    schedule = build_schedule('exponential', decay=0.99, init_updates=20_000)
    (text,) = warnings(schedule, 1, 200)
    assert '13% of the average will still be the initial weights' in text
    assert text.endswith('Lower decay or init_updates.')


@pytest.mark.parametrize(('steps', 'expected'), [(298, 1), (299, 0)])
def test_cold_from_five_percent(steps, expected):
    """More than 5 % of initial weights is worth a word."""
    schedule = build_schedule('constant', decay=0.99)
    assert (0.99**steps > 0.05) is bool(expected)
    assert expected == len(warnings(schedule, 1, steps))


def test_rare():
    """An interval longer than the run is named."""
    found = warnings(build_schedule('mean'), 101, 100)
    (text,) = found
    assert 'interval=101 is more than the 100 steps planned' in text
    assert 'takes in none of them' in text
    assert 'Lower it.' in text
    assert [] == warnings(build_schedule('mean'), 100, 100)


def test_rare_under_openmmlab_words():
    """Under OpenMMLab's words the first step does update."""
    options = parse_options(ema_type='StochasticWeightAverage', interval=101)
    schedule, interval = options.schedule_for(100), options.interval
    (text,) = warnings(schedule, interval, 100, options.choice.phase)
    assert 'takes in one of them' in text


def test_nothing_planned():
    """A run without steps gives no warning about its steps."""
    assert [] == warnings(build_schedule('exponential'), 1, 0)
    assert [] == warnings(build_schedule('constant'), 5, 0)


def test_changes():
    """What changed since the checkpoint is one line, old -> new."""
    before = dict(schedule='a', interval=1, batch_size=16, steps=99)
    now = dict(schedule='b', interval=1, batch_size=32, world_size=2)
    expected = (
        'EMA: changed since the checkpoint: schedule a -> b; '
        'batch_size 16 -> 32.'
    )
    assert expected == changes(before, now)


def test_nothing_changed():
    """Nothing is said where nothing changed, or nothing is known."""
    facts = RunFacts(0, 100, 1, accumulation=2, batch_size=8, world_size=4)
    spec = dict(type='constant', decay=0.5)
    now = Plan(parse_options(schedule=spec, interval=2), facts).meta
    assert now == dict(
        schedule='constant(decay=0.5)',
        interval=2,
        batch_size=16,
        world_size=4,
        reference_samples=64,
    )
    assert '' == changes(now, dict(now))
    assert '' == changes({}, now)
    assert '' == changes(dict(writer='x'), now)


def test_numbers_are_readable():
    """Large windows have separators, small ones four digits."""
    for decay, expected in ((0.5, '2 steps'), (1 - 1 / 123456, '123,456')):
        schedule = build_schedule('constant', decay=decay)
        text = describe(schedule, 1, 0, 10, COUNTS)
        assert f'effective window {expected}' in text
        assert math.isfinite(1 / (1 - decay))
