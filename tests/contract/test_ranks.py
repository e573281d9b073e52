"""Two real processes: the same averages on both, whatever the order."""

import numpy as np
import pytest
import torch

from tests import oracle
from tests.conftest import MMCV1
from tests.contract.toy import (
    EMA,
    STATISTICS,
    Run,
    Saved,
    assert_estimated,
    ramp,
    same,
    toy,
)
from tests.ranks import run_ranks

# float32 rounds each of 8 updates to 6e-8 of the magnitude
TOLERANCE = 1e-6
SPECS = ['epochs', 'flexible']
if MMCV1:
    SPECS = [
        'epochs',
        'epochs,VERY_HIGH,both',
        'epochs,VERY_LOW',
        'iters,VERY_HIGH',
        'iters,VERY_LOW',
        'iters,runner,VERY_LOW',
    ]


POSTHOC = ['epochs,posthoc', 'epochs,posthoc,resumed']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Where the files of all runs are."""
    return tmp_path_factory.mktemp('ranks')


@pytest.fixture(scope='module')
def seen(folder):
    """Train with every spec on two ranks; return what both saw in each."""
    without = sorted({plain(spec) for spec in SPECS})
    specs = [*SPECS, *without, 'epochs,recalibrate', *POSTHOC]
    specs += ['epochs,verify', *([] if MMCV1 else ['epochs,sync'])]
    ranks = run_ranks('tests.contract.ranks_program', 2, folder, *specs)
    return {spec: [rank[spec] for rank in ranks] for spec in specs}


def plain(spec):
    """Return the spec of the same run without an EMA hook."""
    kept = [w for w in spec.split(',') if w.islower() and w != 'both']
    return ','.join([*kept, 'plain'])


def average_of(ranks, key, steps, every):
    """The average of rank 0; both become the mean at every evaluation."""
    averages = [rank['start'][key].double().numpy() for rank in ranks]
    for n in range(1, steps + 1):
        averages = [
            ramp(n) * a
            + (1 - ramp(n)) * r['records'][n - 1][key].double().numpy()
            for a, r in zip(averages, ranks)
        ]
        if n % every == 0:
            averages = [sum(averages) / 2] * 2
    return averages[0]


def wrong(ranks, weights, steps, every):
    """Names of the tensors that are not the average that they should be."""
    found = []
    for key, value in weights.items():
        expected = average_of(ranks, key, steps, every)
        if 'tracked' in key:
            expected = ranks[0]['records'][steps - 1][key].numpy()
        error = oracle.relative_error(value.double(), expected)
        found += [f'{key} {error}'] if error > TOLERANCE else []
    return found


def steps_in(path):
    number = int(path.stem.rpartition('_')[2])
    return number if 'iter_' in path.stem else 4 * number


@pytest.mark.parametrize('spec', SPECS)
def test_two_ranks(spec, folder, seen):
    """Evaluations have the averages of both ranks, and so have their files.

    Statistics in a file that is written without an evaluation are averages
    of rank 0. Raw weights, and each rank's own statistics, are those of a run
    without an EMA hook, bit for bit.
    """
    every = 3 if 'iters' in spec else 4
    ranks = seen[spec]
    for rank, without in zip(ranks, seen[plain(spec)]):
        assert 8 == len(rank['records'])
        assert [] == [
            step
            for step, state in enumerate(rank['records'])
            if same(state, without['records'][step])
        ]
    means = [rank['records'][0]['norm.running_mean'] for rank in ranks]
    assert not torch.equal(*means)
    states = [rank['seen'] for rank in ranks]
    assert [step for step, _ in states[0]] == [step for step, _ in states[1]]
    assert len(states[0]) >= 2
    for (step, left), (_, right) in list(zip(*states))['both' in spec :: 2]:
        assert [] == same(left, right)
        assert [] == wrong(ranks, left, step, every)
    files = [p for p in (folder / spec).glob('*.pth') if not p.is_symlink()]
    assert len(files) >= 2
    # as often as all ranks evaluate, and never else
    evaluations = 8 // every
    assert [3 * evaluations] * 2 == [rank['calls'] for rank in ranks]
    for path in files:
        saved, steps = Saved(path), steps_in(path)
        assert [] == wrong(ranks, saved.averages, steps, every), path.name
        raw = ranks[0]['records'][steps - 1]
        assert [] == same(saved.raws, raw), path.name


def test_recalibrated_on_two_ranks(folder, seen):
    """Both have the statistics of all data, as one process would have."""
    spec = 'epochs,recalibrate'
    weights = Saved(folder / spec / 'epoch_2.pth').averages
    states = [rank['seen'][-1][1] for rank in seen[spec]]
    assert [] == same(*states)
    assert [] == same({k: states[0][k] for k in weights}, dict(weights))
    shards = [toy.ToyData(16, rank).inputs for rank in range(2)]
    inputs = np.concatenate(shards) if MMCV1 else toy.ToyData(32, 0).inputs
    assert_estimated(weights, inputs)


@pytest.mark.skipif(MMCV1, reason='test_own_moments.py has one of mmcv')
def test_sync_buffers_hook(folder, seen):
    """It means the raw buffers, we those of the averages."""
    ranks = seen['epochs,sync']
    saved = Saved(folder / 'epochs,sync' / 'epoch_2.pth')
    assert [] == wrong(ranks, saved.averages, 8, 4)
    for key in STATISTICS:
        left, right = (rank['records'][-1][key] for rank in ranks)
        assert not torch.equal(left, right)
        torch.testing.assert_close(saved.raws[key], (left + right) / 2)


def test_starting_weights_are_kept_by_one_rank(folder, seen):
    """Rank 0 writes them once, finds them on resume, and the sum goes on."""
    first, resumed = (seen[spec] for spec in POSTHOC)
    assert [['written'], []] == [rank['starts'] for rank in first]
    assert [['found'], []] == [rank['starts'] for rank in resumed]
    work_dir = folder / POSTHOC[0]
    kept = torch.load(work_dir / 'ema_start.pt')['state_dict']
    assert [] == same(first[0]['start'], kept)
    second, third = (Saved(work_dir / f'epoch_{n}.pth') for n in (2, 3))
    assert second.meta['start'] == third.meta['start']
    state = third.part['ema_averages']['posthoc']
    assert 12 == state['num_steps']
    key = 'head.weight'
    records = [*first[0]['records'], *resumed[0]['records']]
    expected = oracle.average(
        kept[key].double().numpy(),
        [record[key].double().numpy() for record in records],
        # a tenth of the window of 100 steps
        lambda n: oracle.ramp(n, 0.9, 2),
    )
    error = oracle.relative_error(state['state_dict'][key].double(), expected)
    assert error < TOLERANCE


def test_verify_ranks_names_a_planted_difference(seen):
    """Before the first evaluation both ranks stop, and neither hangs."""
    for said in seen['epochs,verify']:
        assert 'head.bias is not the same on all ranks after 4 steps' in said


def test_file_of_two_ranks_resumes_in_one_process(folder, seen, tmp_path):
    """It has the names of one process's; the world size is reported."""
    file = folder / 'epochs' / 'epoch_2.pth'
    run = Run(tmp_path, EMA, epochs=3, resume=file).train()
    assert 'world_size 2 -> 1' in run.log
    before, saved = Saved(file), run.load()
    assert (8, 12) == (before.steps, saved.steps)
    assert before.raws.keys() == saved.raws.keys()
    assert before.averages.keys() == saved.averages.keys()
    assert before.meta.keys() == saved.meta.keys()
