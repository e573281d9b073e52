"""The table of what a run allows is what the fit finds."""

import re

import pytest

from mmdet_ema.averaging.averages import POSTHOC
from mmdet_ema.checkpoint import profiles
from mmdet_ema.schedules import a_tenth, exponential
from tests.docs.pages import DOCS, prose

STEPS = 12_000
FILES = range(1_000, STEPS + 1, 1_000)


def averages(schedule):
    decays = profiles.decays_of(schedule, STEPS)
    return [
        profiles.placed(profiles.profile_of(decays[:n]), n, STEPS)
        for n in FILES
    ]


@pytest.mark.parametrize('row', [0, 1])
def test_what_a_run_allows(row):
    """Each cell is the error of that profile, rounded."""
    text = prose(DOCS / 'en' / 'average.md')
    lines = re.search(r'^\| files hold .*\n\|-.*\n(.*\n.*)\n', text, re.M)
    wanted = re.findall(r'`([^`]+)`', lines[0].splitlines()[0])
    cells = lines[1].splitlines()[row].strip('| ').split(' | ')
    assert len(wanted) == len(cells) - 1 == 5
    assert (f'{POSTHOC}=True' in cells[0]) == (row == 1)
    bases = averages(exponential()) + [profiles.raw(n, STEPS) for n in FILES]
    if row:
        fast = averages(a_tenth(exponential()))
        bases += [*fast, profiles.raw(0, STEPS)]
    for profile, cell in zip(wanted, cells[1:]):
        target = profiles.parse_profile(profile).target(STEPS)
        error = 100 * profiles.fit(bases, target).error
        shown = float(cell.rstrip(' %'))
        digits = len(cell.partition('.')[2].rstrip(' %'))
        assert round(error, digits) == shown, profile
