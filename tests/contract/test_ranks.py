"""Two real processes: the same averages on both, whatever the order."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import oracle
from tests.conftest import MMCV1
from tests.contract.toy import (
    EMA,
    Run,
    Saved,
    assert_estimated,
    ramp,
    same,
    toy,
)

# float32 rounds each of 8 updates to 6e-8 of the magnitude
TOLERANCE = 1e-6
ROOT = Path(__file__).parents[2]
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
    """Train with every spec on two ranks; return the folder of all."""
    path = tmp_path_factory.mktemp('ranks')
    without = sorted({plain(spec) for spec in SPECS})
    specs = [*SPECS, *without, 'epochs,recalibrate', *POSTHOC]
    program = ['-m', 'tests.contract.ranks_program', str(path), *specs]
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = dict(
        OMP_NUM_THREADS='1',
        WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    # torchrun of torch 1.13 does not run under Python 3.11
    ranks = [
        subprocess.Popen(
            [sys.executable, '-W', 'ignore', *program],
            cwd=ROOT,
            env={
                **os.environ,
                **environment,
                'RANK': str(rank),
                'LOCAL_RANK': str(rank),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    codes = [rank.returncode for rank in ranks]
    assert [0, 0] == codes, '\n'.join(o[-4000:] for o in outputs)
    return path


def plain(spec):
    """Return the spec of the same run without an EMA hook."""
    kept = [w for w in spec.split(',') if w.islower() and w != 'both']
    return ','.join([*kept, 'plain'])


def dumped(folder):
    """Read what the two ranks dumped."""
    return [torch.load(folder / f'rank{rank}.pt') for rank in range(2)]


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
def test_two_ranks(spec, folder):
    """Evaluations have the averages of both ranks, and so have their files.

    Statistics in a file that is written without an evaluation are averages
    of rank 0. Raw weights, and each rank's own statistics, are those of a run
    without an EMA hook, bit for bit.
    """
    every = 3 if 'iters' in spec else 4
    ranks = dumped(folder / spec)
    for rank, without in zip(ranks, dumped(folder / plain(spec))):
        assert 8 == len(rank['records'])
        assert [] == [
            step
            for step, state in enumerate(rank['records'])
            if same(state, without['records'][step])
        ]
    means = [rank['records'][0]['norm.running_mean'] for rank in ranks]
    assert not torch.equal(*means)
    seen = [rank['seen'] for rank in ranks]
    assert [step for step, _ in seen[0]] == [step for step, _ in seen[1]]
    assert len(seen[0]) >= 2
    for (step, left), (_, right) in list(zip(*seen))['both' in spec :: 2]:
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


def test_recalibrated_on_two_ranks(folder):
    """Both have the statistics of all data, as one process would have."""
    spec = folder / 'epochs,recalibrate'
    weights = Saved(spec / 'epoch_2.pth').averages
    seen = [rank['seen'][-1][1] for rank in dumped(spec)]
    assert [] == same(*seen)
    assert [] == same({k: seen[0][k] for k in weights}, dict(weights))
    shards = [toy.ToyData(16, rank).inputs for rank in range(2)]
    inputs = np.concatenate(shards) if MMCV1 else toy.ToyData(32, 0).inputs
    assert_estimated(weights, inputs)


def test_starting_weights_are_kept_by_one_rank(folder):
    """Rank 0 writes them once, finds them on resume, and the sum goes on."""
    first, resumed = (dumped(folder / spec) for spec in POSTHOC)
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


def test_file_of_two_ranks_resumes_in_one_process(folder, tmp_path):
    """It has the names of one process's; the world size is reported."""
    file = folder / 'epochs' / 'epoch_2.pth'
    run = Run(tmp_path, EMA, epochs=3, resume=file).train()
    assert 'world_size 2 -> 1' in run.log
    before, saved = Saved(file), run.load()
    assert (8, 12) == (before.steps, saved.steps)
    assert before.raws.keys() == saved.raws.keys()
    assert before.averages.keys() == saved.averages.keys()
    assert before.meta.keys() == saved.meta.keys()
