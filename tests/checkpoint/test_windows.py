"""Windows that the files of a run allow, and what to record for others."""

import numpy as np
import pytest

from mmdet_ema import OptionError
from mmdet_ema.checkpoint import windows
from mmdet_ema.checkpoint.combination import read_files
from mmdet_ema.checkpoint.profiles import decays_of, profile_of
from mmdet_ema.checkpoint.runs import Run
from mmdet_ema.errors import CheckpointError
from tests import oracle
from tests.checkpoint.walk import STEPS, Walk

MAIN = dict(decay=0.99, tau=50)
LENGTHS = [1, 4, 10, 20, 50, 100, 200, 400]


@pytest.fixture(scope='module')
def walk(tmp_path_factory):
    return Walk(tmp_path_factory.mktemp('walk'), posthoc=True, **MAIN)


def run_of(walk):
    return Run(read_files(windows.files_of(str(walk.folder))))


def tracked(length):
    """The average as a run would have tracked it, in float64."""
    decay, tau = 1 - 1 / length, min(length / 2, STEPS / 10)

    def average(values):
        found = values[0]
        for n, value in enumerate(values[1:], 1):
            d = oracle.ramp(n, decay, tau)
            found = d * found + (1 - d) * value
        return found

    return average


def test_windows(walk):
    """What is made is what a run would have tracked, within the error."""
    made, refused = windows.make_windows(run_of(walk), LENGTHS)
    assert {10, 100} <= {x.steps for x in made}
    assert len(LENGTHS) == len(made) + len(refused)
    for window in made:
        target = profile_of(decays_of(window.schedule, STEPS))
        walk.check(
            window.combination,
            tracked(window.steps),
            window.combination.fit.error,
            target,
        )
        state = window.combination.state_dict()
        assert (state['norm.running_var'] > 0).all()
    for window in refused:
        assert 'error of the profile' in window.problem


def test_interval(tmp_path):
    """The windows of a run that averages every fifth step are not refused."""
    walk = Walk(tmp_path, posthoc=True, interval=5, **MAIN)
    made, _ = windows.make_windows(run_of(walk), [50, 100])
    (expected,) = [x for x in made if x.steps == 100]
    decays = [oracle.ramp(n, 0.99, 50) for n in range(1, STEPS + 1)]

    def average(values):
        found = values[0]
        for n in range(5, STEPS + 1, 5):
            d = np.prod(decays[n - 5 : n])
            found = d * found + (1 - d) * values[n]
        return found

    # it is the main average: decay 0.99, tau 50
    assert expected.combination.fit.error < 1e-9
    walk.check(expected.combination, average)


def test_running_statistics(walk):
    """They have the coefficients of the weights, but for no variance."""
    made, _ = windows.make_windows(run_of(walk), LENGTHS)
    signed = [
        x
        for x in made
        if any(term.statistics < 0 for term in x.combination.terms)
    ]
    # the variance of this walk is near 0 now and then
    assert 0 < len(signed) < len(made)
    for window in signed:
        values = walk.values('norm.running_mean')
        expected = tracked(window.steps)(values)
        found = window.combination.state_dict()['norm.running_mean']
        away = np.abs(found.double().numpy() - expected).max()
        room = np.sqrt(((values - expected) ** 2).sum(0)).max()
        target = profile_of(decays_of(window.schedule, STEPS))
        # Cauchy-Schwarz, and what float32 rounds in 500 updates
        error = window.combination.fit.error * float(target.norm())
        assert away < error * room + 2e-6 * np.abs(values).max()


def test_next_time(walk):
    """A run that records what is said reaches the windows refused."""
    made, refused = windows.make_windows(run_of(walk), [4, 10, 100])
    assert [4] == [x.steps for x in refused]
    (said,) = windows.how_to_reach(run_of(walk), made, refused)
    assert 'averages=dict(short=dict(decay=0.75, tau=2))' in said
    averages = dict(short=dict(decay=0.75, tau=2))
    folder = walk.folder / 'next'
    again = Walk(folder, posthoc=True, averages=averages, **MAIN)
    made, refused = windows.make_windows(run_of(again), [4, 10, 100])
    assert ([4, 10, 100], []) == ([x.steps for x in made], refused)


def test_without_posthoc(tmp_path):
    """Raw weights and one average allow little: it is said what adds most."""
    walk = Walk(tmp_path, every=250, **MAIN)
    made, refused = windows.make_windows(run_of(walk), [20, 100, 400])
    assert [100] == [x.steps for x in made]
    said = windows.how_to_reach(run_of(walk), made, refused)
    assert 'EMAHook(posthoc=True)' in said[0]
    assert 'max_keep_ckpts=-1' in said[-1]
    assert [] == windows.how_to_reach(run_of(walk), made, [])


def test_spread():
    """Windows are spread over factors, from 0.1 % of the run to a half."""
    found = windows.spread(5, 100_000)
    assert [100, 50_000] == [found[0], found[-1]]
    ratios = np.divide(found[1:], found[:-1])
    np.testing.assert_allclose(ratios, 500**0.25, rtol=0.01)
    assert [2] == windows.spread(1, 10)


def test_refusals(walk, tmp_path):
    """A window that no run of this length has, and a folder without files."""
    for length in (0.5, STEPS + 1):
        with pytest.raises(OptionError, match=f'use 1 to {STEPS}'):
            windows.make_windows(run_of(walk), [length])
    for folder in (tmp_path, tmp_path / 'none'):
        with pytest.raises(CheckpointError, match='work_dir of the training'):
            windows.files_of(str(folder))
