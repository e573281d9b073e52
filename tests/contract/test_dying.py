"""Runs that are killed: nothing is lost, and a resume is exact."""

import signal

import pytest

from mmdet_ema import CheckpointError
from mmdet_ema.checkpoint.files import TEMPORARY
from tests.contract import dying


def test_killed_at_random_and_resumed(tmp_path):
    """Each resumed run ends as the one that was not killed, bit for bit."""
    found = dying.kill_often(tmp_path, kills=5, seed=0)
    assert 5 == found['kills']


@pytest.mark.slow
def test_killed_a_hundred_times(tmp_path):
    """The same, often enough to meet the short moments."""
    found = dying.kill_often(tmp_path, kills=100, seed=1)
    print(found)
    assert 100 == found['kills']


@pytest.mark.parametrize('safe', [True, False])
def test_killed_in_the_middle_of_a_save(tmp_path, safe):
    """The file before is there; ``safe_save=False`` is as the framework."""
    process = dying.start(tmp_path / 'run', pause=1, safe_save=safe)
    pattern = f'.epoch_2.pth.*{TEMPORARY}' if safe else 'epoch_2.pth'
    dying.wait_for(tmp_path / 'run', pattern)
    assert dying.kill(process, signal.SIGKILL)
    if safe:
        assert dying.check_whole(tmp_path / 'run')
        assert dying.newest(tmp_path / 'run').endswith(('h_1.pth', 't.pth'))
    else:
        with pytest.raises(CheckpointError, match='cut off'):
            dying.check_whole(tmp_path / 'run')
