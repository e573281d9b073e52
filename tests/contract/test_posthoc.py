"""``posthoc=True`` and ``decay='auto'``: what is kept, and for which run."""

import pytest
import torch

from mmdet_ema import OptionError
from tests import oracle
from tests.conftest import MMCV1
from tests.contract.test_several import more_of
from tests.contract.toy import EMA, Run, Saved, same

KEEPS = dict(type='EMAHook', decay=0.99, tau=8, posthoc=True)
AUTO = dict(type='EMAHook', decay='auto')
START = 'ema_start.pt'


def fast(n):
    """A tenth of the window of 100 steps, a quarter of the ramp."""
    return oracle.ramp(n, 0.9, 2)


def kept(folder, name=START):
    """The weights in the file, read without running what is in it."""
    return torch.load(folder / name, weights_only=True)['state_dict']


def error_of(state, start, values, decay_of, key='head.weight'):
    found = state['state_dict'][key].double()
    return oracle.relative_error(
        found, oracle.average(start, values, decay_of)
    )


def test_kept_once_a_run(tmp_path):
    """The weights before the first step, and a fast average of all steps."""
    run = Run(tmp_path, KEEPS, epochs=2).train()
    assert [] == same(run.start, kept(tmp_path))
    assert f'{START}: what the averages start from' in run.log
    before = (tmp_path / START).stat()
    resumed = Run(tmp_path, KEEPS, epochs=3, resume=tmp_path / 'epoch_2.pth')
    last = resumed.train().load()
    whole = Run(tmp_path / 'whole', KEEPS, epochs=3).train()
    expected = whole.load()
    after = (tmp_path / START).stat()
    assert before.st_ino == after.st_ino
    assert before.st_mtime_ns == after.st_mtime_ns
    assert run.load().meta['start'] == last.meta['start']
    assert expected.meta['start'] == last.meta['start']
    assert 'starting weights' not in run.log + resumed.log
    left, right = (more_of(x)['posthoc'] for x in (last, expected))
    assert [] == same(left.pop('state_dict'), right['state_dict'])
    assert left.items() <= right.items()
    assert left['schedule'] == 'exponential(decay=0.9, tau=2.0)'
    start, values = whole.trace('head.weight')
    assert error_of(right, start, values, fast) < 1e-6


def test_not_of_this_run(tmp_path):
    """A file of other weights is replaced, with a line; of the same, not."""
    Run(tmp_path, KEEPS, epochs=1).train()
    again = Run(tmp_path, KEEPS, epochs=1).train()
    assert 'starting weights' not in again.log
    file = tmp_path / 'epoch_1.pth'
    other = Run(tmp_path, KEEPS, epochs=1, load=file).train()
    assert 1 == other.log.count('has the starting weights of another run')
    assert [] == same(other.start, kept(tmp_path))
    (tmp_path / START).write_bytes(b'damaged')
    third = Run(tmp_path, KEEPS, epochs=1).train()
    assert 'has the starting weights of another run' in third.log
    assert [] == same(third.start, kept(tmp_path))


@pytest.mark.parametrize('there', ['nothing', 'other', 'copy'])
def test_resumed_in_another_folder(tmp_path, there):
    """It is said once that the start is lost, until the file is copied."""
    Run(tmp_path / 'first', KEEPS, epochs=1).train()
    content = (tmp_path / 'first' / START).read_bytes()
    file = tmp_path / 'first' / 'epoch_1.pth'
    folder = tmp_path / 'second'
    if there == 'other':
        Run(folder, KEEPS, epochs=1, load=file).train()
    elif there == 'copy':
        folder.mkdir()
        (folder / START).write_bytes(content)
    run = Run(folder, KEEPS, epochs=2, resume=file).train()
    warned = run.log.count('windows that reach back to its start cannot')
    assert warned == (there != 'copy')
    assert (folder / START).exists() == (there != 'nothing')
    # it can still be copied there later
    first = Saved(file).meta['start']
    assert first == run.load().meta['start']


def test_added_on_resume(tmp_path):
    """The fast average begins; the start of the main one is not known."""
    Run(tmp_path, EMA, epochs=1).train()
    run = Run(tmp_path, KEEPS, epochs=2, resume=tmp_path / 'epoch_1.pth')
    saved = run.train().load()
    assert 'posthoc starts from the raw weights, n = 0' in run.log
    assert 'windows that reach back to its start cannot' in run.log
    assert not (tmp_path / START).exists()
    assert 4 == more_of(saved)['posthoc']['num_steps']


def test_restart(tmp_path):
    """What the averages start again from is kept in a file of its own."""
    spec = dict(KEEPS, restart_epochs=[2])
    run = Run(tmp_path, spec, epochs=2).train()
    assert [] == same(run.start, kept(tmp_path))
    again = kept(tmp_path, 'ema_start_epoch_2.pt')
    assert [] == same(run.records[3], again)
    first, second = run.load(1).meta['start'], run.load(2).meta['start']
    assert first != second
    path = tmp_path / 'epoch_2.pth'
    rest = Run(tmp_path, spec, epochs=3, resume=path).train()
    assert second == rest.load().meta['start']
    assert 'starting weights' not in rest.log


def test_one_rank_writes(tmp_path):
    """Other ranks have the average, and leave the file to the first."""
    run = Run(tmp_path, KEEPS, epochs=1)
    run.toy.runner._rank = 1
    run.train()
    assert not (tmp_path / START).exists()


@pytest.mark.skipif(not MMCV1, reason='mmdet 3 looks into last_checkpoint')
def test_not_taken_for_a_checkpoint(tmp_path):
    """The tools of mmdet 2 resume from the latest file in a folder."""
    utils = pytest.importorskip('mmdet.utils')
    run = Run(tmp_path, KEEPS, epochs=2).train()
    (tmp_path / 'latest.pth').unlink()
    found = utils.find_latest_checkpoint(str(tmp_path))
    assert found == str(run.load().path)


def test_late_start(tmp_path):
    """The weights are those that the average starts from."""
    run = Run(tmp_path, dict(KEEPS, begin_epoch=2), epochs=2).train()
    assert [] == same(run.records[3], kept(tmp_path))


def test_scaled_with_the_batch(tmp_path):
    """The decays of both keep their windows in samples."""
    spec = dict(type='EMAHook', decay=0.92, tau=4, posthoc=True)
    spec['scale_decay'] = True
    Run(tmp_path, spec, epochs=1, batch=2).train()
    path = tmp_path / 'epoch_1.pth'
    run = Run(tmp_path, spec, epochs=2, batch=4, resume=path).train()
    state = more_of(run.load())['posthoc']
    name = 'exponential(decay=0.2, tau=1.0, kappa=2.0)'
    assert (12, name) == (state['num_steps'], state['schedule'])


def test_evaluated_and_deployed(tmp_path):
    """The fast average is one like any other."""
    spec = dict(KEEPS, evaluate=['posthoc', 'raw'], deploy='posthoc')
    run = Run(tmp_path, spec).train()
    saved = run.load()
    assert {'ema'} == set(more_of(saved))
    seen = run.seen[-1][1]['head.weight']
    assert torch.equal(seen, saved.averages['head.weight'])
    assert {} == run.wrong(saved, fast)


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        (dict(posthoc=1), 'posthoc=1 is not allowed; use True or False'),
        (
            dict(decay='auto', schedule='cosine'),
            "'auto' has no meaning for schedule 'cosine'",
        ),
        (dict(decay='autom'), "decay='autom' is not a number"),
        (dict(decay=torch.ones(2)), 'decay=tensor.* is not a number'),
        (
            dict(decay='auto', scale_decay=True),
            "scale_decay=True and decay='auto' both choose the window",
        ),
        (
            dict(
                averages=dict(a=dict(schedule=dict(AUTO, type='power'))),
                scale_decay=True,
            ),
            "scale_decay=True and decay='auto' both choose the window",
        ),
    ],
    ids=str,
)
def test_refused(tmp_path, options, match):
    """One line, before there is a run."""
    with pytest.raises(OptionError, match=match) as error:
        Run(tmp_path, dict(type='EMAHook', **{'posthoc': True, **options}))
    assert '\n' not in str(error.value)


def test_run_too_short_for_both(tmp_path):
    """A tenth of the window of a tenth of a few steps is refused."""
    run = Run(tmp_path, dict(AUTO, posthoc=True))
    with pytest.raises(OptionError, match=r'has the limit 0\.5; use one of'):
        run.train()
    assert not run.records


def test_auto(tmp_path):
    """A window of a tenth of the planned steps, half of it the ramp.

    A resume takes the steps that are planned then, and says so.
    """
    flat = dict(schedule='inverse', decay='auto')
    spec = dict(AUTO, averages=dict(flat=flat))
    file = Run(tmp_path, spec, epochs=10)
    assert {} == file.train().wrong(
        file.load(), lambda n: oracle.ramp(n, 0.75, 2)
    )
    saved = file.load()
    assert saved.meta['schedule'] == 'exponential(decay=0.75, tau=2.0)'
    assert more_of(saved)['flat']['schedule'] == 'inverse(decay=0.75)'

    path = tmp_path / 'epoch_10.pth'
    longer = Run(tmp_path, spec, epochs=20, resume=path).train()
    log = longer.log
    assert 'changed since the checkpoint: schedule exponential(decay=0' in log
    assert (
        'flat goes on with inverse(decay=0.875), not inverse(decay=0.75)'
        in log
    )
    _, values = longer.trace('head.weight')
    expected = oracle.average(
        saved.averages['head.weight'].double().numpy(),
        values,
        lambda n: oracle.ramp(n + 40, 0.875, 4),
    )
    found = longer.load().averages['head.weight'].double()
    assert oracle.relative_error(found, expected) < 1e-6
