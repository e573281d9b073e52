"""Rounds take every competitor once, in an order of their own."""

import gc
import time

import pytest

from benchmarks.caches import flush_bytes, prepare_for
from benchmarks.clocks import HostClock
from benchmarks.rounds import Limits, run_rounds

# as many rounds as are asked for, and no more
NO_TIME = Limits(seconds=60, least=4, most=4)


class Recorder:
    """Samplers that write down when they were called."""

    def __init__(self, *names):
        self.calls = []
        self.samplers = {name: self._sampler(name) for name in names}

    def _sampler(self, name):
        def sample():
            self.calls.append(name)
            return {'wall': float(len(self.calls))}

        return sample


def test_every_round_takes_every_competitor_once():
    """Any three calls in a row that begin a round are of all three."""
    recorder = Recorder('a', 'b', 'c')

    run_rounds(recorder.samplers, NO_TIME)

    rounds = [recorder.calls[i : i + 3] for i in range(0, 12, 3)]
    assert [['a', 'b', 'c']] * 4 == [sorted(names) for names in rounds]


def test_order_changes():
    """No competitor always comes after the same other one."""
    recorder = Recorder('a', 'b', 'c')

    run_rounds(recorder.samplers, Limits(seconds=60, least=20, most=20))

    rounds = [tuple(recorder.calls[i : i + 3]) for i in range(0, 60, 3)]
    assert len(set(rounds)) > 2


def test_samples_of_a_round_are_at_the_same_place():
    """Ratios can be taken round by round."""
    recorder = Recorder('a', 'b')

    figures = run_rounds(recorder.samplers, NO_TIME)

    for k in range(4):
        found = {figures[n].samples['wall'][k] for n in 'ab'}
        assert {2 * k + 1, 2 * k + 2} == found


def test_who_raises_drops_out():
    """The others go on; the figure says why there is none."""

    def broken():
        raise ValueError('out of order')

    figures = run_rounds({'a': broken, **Recorder('b').samplers}, NO_TIME)

    assert figures['a'].failed == 'ValueError: out of order'
    assert {} == figures['a'].samples
    assert len(figures['b'].samples['wall']) == 4


def test_rounds_end_with_the_time():
    """After the least number of rounds no new one starts too late."""

    def slow():
        time.sleep(0.02)
        return {'wall': 0.02}

    limits = Limits(seconds=0.1, least=2)

    figures = run_rounds({'a': slow}, limits)

    assert 2 <= len(figures['a'].samples['wall']) <= 6


@pytest.mark.parametrize(
    ('rounds', 'seconds', 'expected'),
    [
        (6, 5.1, False),
        (7, 4.9, False),
        (7, 5.1, True),
        (3, 19.9, False),
        (3, 20.1, True),
        (2, 20.1, False),
    ],
)
def test_slow_machine_takes_fewer_rounds(rounds, seconds, expected):
    """Seven in five seconds, or three in four times as long."""
    limits = Limits(seconds=5, least=7)

    assert expected == limits.are_reached(rounds, seconds)


def test_rounds_have_a_largest_number():
    """A call of no time at all is not repeated for seconds."""
    limits = Limits(seconds=60, least=2, most=5)

    figures = run_rounds(Recorder('a').samplers, limits)

    assert len(figures['a'].samples['wall']) == 5


def test_garbage_is_not_collected_in_a_timed_call():
    """Python's collector rests during the rounds and works after them."""
    during = run_rounds({'a': lambda: {'on': float(gc.isenabled())}}, NO_TIME)

    assert [0.0] * 4 == during['a'].samples['on']
    assert gc.isenabled()


def test_clock_measures_the_call():
    """A call that sleeps 20 ms takes at least that, and not ten times."""
    found = HostClock().measure(lambda: time.sleep(0.02))['wall']

    assert 0.02 <= found < 0.2


def test_hot_calls_what_is_timed_and_cold_does_not():
    """Only the hot setting makes the same call before."""
    hot, cold = [], []

    prepare_for('hot', 'cpu')(lambda: hot.append(1))
    prepare_for('cold', 'cpu')(lambda: cold.append(1))

    assert (1, 0) == (len(hot), len(cold))


def test_cold_reads_more_than_any_cache():
    """At least 64 MB, at most 512 MB."""
    assert 64 * 2**20 <= flush_bytes('cpu') <= 512 * 2**20


def test_unknown_setting_is_ours_to_mend():
    """The state of the caches is 'cold' or 'hot'."""
    with pytest.raises(AssertionError):
        prepare_for('warm', 'cpu')
