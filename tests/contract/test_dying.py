"""Runs that are killed: nothing is lost, and a resume is exact."""

import functools
import signal
import time
from pathlib import Path

import pytest

from mmdet_ema import CheckpointError
from mmdet_ema.checkpoint.files import TEMPORARY
from mmdet_ema.checkpoint.folder import newest_readable
from tests.conftest import MMCV1
from tests.contract import dying
from tests.contract.toy import Saved, same

# mmcv's runner begins the data again
needs_mmengine = pytest.mark.skipif(MMCV1, reason='needs mmengine')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run that is not killed: its folder, and how long it took."""
    folder = tmp_path_factory.mktemp('dying') / 'whole'
    process = dying.start(folder)
    begun = time.time()
    assert 0 == dying.finish(process)
    return folder, time.time() - begun


def test_killed_at_random_and_resumed(tmp_path, whole):
    """Each resumed run ends as the one that was not killed, bit for bit."""
    found = dying.kill_often(tmp_path, kills=5, seed=0, whole=whole)
    assert 5 == found['kills']


@pytest.mark.slow
def test_killed_a_hundred_times(tmp_path, whole):
    """The same, often enough to meet the short moments."""
    found = dying.kill_often(tmp_path, kills=100, seed=1, whole=whole)
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
        # mmengine has removed the first file by now
        left = newest_readable(str(tmp_path / 'run'))
        assert (left is not None) is MMCV1


# in an epoch, at the end of one, before a step of two iterations is done, and
# where no epochs are counted
@pytest.mark.parametrize(
    ('at', 'last', 'more'),
    [
        (6, 6, {}),
        (8, 8, {}),
        (5, 6, dict(accumulation=2)),
        pytest.param(6, 6, dict(iters=16), marks=needs_mmengine),
    ],
)
def test_sigterm_writes_a_file_and_stops(tmp_path, whole, at, last, more):
    """The run that goes on from it equals one that was not stopped."""
    part, other = tmp_path / 'part', whole[0]
    if more:
        other = tmp_path / 'whole'
        assert 0 == dying.finish(dying.start(other, **more))
    options = dict(more, save_on_sigterm=True)
    signal_at = functools.partial(dying.Signal, at)
    process = dying.start(part, more=[signal_at], **options)
    assert 143 == dying.finish(process)
    path = dying.newest(part)
    assert f'sigterm_iter_{last}.pth' == Path(path).resolve().name
    assert 0 == dying.finish(dying.start(part, **options))
    log = part.with_suffix('.log').read_text()
    left_out = f'first {last % 4 or 4} batches of the epoch are left out'
    assert (left_out in log) is not (MMCV1 or 'iters' in more)
    dying.assert_equal(part, other, more.get('iters'))


@pytest.mark.parametrize('where', ['step', 'evaluation', 'save'])
def test_exception_on_one_rank_hangs_nobody(tmp_path, where):
    """The other one ends as well, and what was written can be resumed."""
    codes = dying.train_ranks(tmp_path / 'run', where)
    assert 0 not in codes
    assert dying.check_whole(tmp_path / 'run') is (where == 'evaluation')
    log = tmp_path / 'run' / f'rank{int(where != "save")}.log'
    assert 'planned' in log.read_text()


def test_sigterm_to_one_rank_stops_both(tmp_path):
    """They agree on the step; the resumed run equals one without it."""
    part, whole = tmp_path / 'part', tmp_path / 'whole'
    assert [0, 0] == dying.train_ranks(whole)
    more = [], [functools.partial(dying.Signal, 6)]
    options = dict(save_on_sigterm=True)
    assert [143, 143] == dying.train_ranks(part, more=more, **options)
    assert ['sigterm_iter_7.pth'] == [x.name for x in part.glob('sigterm*')]
    assert [0, 0] == dying.train_ranks(part, **options)
    left, right = (
        Saved(x / f'epoch_{dying.EPOCHS}.pth') for x in (part, whole)
    )
    assert left.steps == right.steps
    # each rank has statistics of its own, and a file those of rank 0
    differing = [
        *same(left.averages, right.averages),
        *same(left.raws, right.raws),
    ]
    assert [] == [name for name in differing if 'running' not in name]
    assert [] == list(part.glob('sigterm*'))
