"""The numbers of the page on decays are computed."""

import re

import pytest

from mmdet_ema import build_schedule
from tests.docs.pages import DOCS, prose

PAGE = prose(DOCS / 'en' / 'which_decay.md')


def _rows(pattern):
    found = re.findall(rf'^\| {pattern} \|', PAGE, re.M)
    assert found
    return [[x.replace(',', '') for x in row] for row in found]


@pytest.mark.parametrize(
    'row', _rows(r'([\w ,]+) \| ([\d,]+) \| ([\d.]+) \| (\d+) \| ([\d,]+)')
)
def test_decay_for_a_schedule_of_coco(row):
    """Steps are epochs of 7,330; the ramp reaches the window in the run."""
    name, steps, decay, tau, window = row
    epochs = {'1x': 12, '2x': 24, '3x': 36, '24e': 24, '100e': 100}
    assert int(steps) == 7330 * epochs.get(name.split()[0], 300)
    assert round(1 / (1 - float(decay))) == int(window)
    assert int(tau) in (int(window) // 2, 2000)
    schedule = build_schedule(
        'exponential', decay=float(decay), tau=float(tau)
    )
    assert 1 / (1 - schedule(int(steps))) > 0.99 * int(window)


def test_share_of_the_stage_before_with_the_default():
    """1x with a decay of 0.9999: what is older than the last epoch."""
    assert f'{0.9999**7330:.0%}' == '48%'
    assert '48 % of that average' in PAGE


@pytest.mark.parametrize(
    'row', _rows(r'`(\w+)` \| ([\d,]+) \| ([\d,]+) \| ([\d,]+)')
)
def test_first_n_that_reaches_a_decay(row):
    """With the default options of the schedule."""
    schedule = build_schedule(row[0])
    for decay, n in zip((0.9, 0.99, 0.999), map(int, row[1:])):
        assert schedule(n - 1) < decay - 1e-12
        assert schedule(n) >= decay - 1e-12
