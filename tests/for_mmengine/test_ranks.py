"""Two real ranks: the same averages on both, one file, buffers agreed on."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import needs, oracle
from tests.for_mmengine.toy import Run, same

ROOT = Path(__file__).resolve().parents[2]
pytestmark = needs.gloo_bfloat16


@pytest.fixture(scope='module', params=['Runner', 'FlexibleRunner'])
def ranks(request, tmp_path_factory):
    """Train on two gloo ranks; return what each saw, and the folder."""
    folder = tmp_path_factory.mktemp('ranks')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command += [
        '--nproc_per_node',
        '2',
        '-m',
        'tests.for_mmengine.ranks_program',
    ]
    done = subprocess.run(
        [*command, request.param, str(folder)],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    dumps = [
        torch.load(folder / f'rank{i}.pt', weights_only=needs.SAFELY)
        for i in (0, 1)
    ]
    return folder, *dumps


def mean_trace(key, *dumps):
    """Start and records of a tensor, averaged over the ranks, float64."""
    start = np.mean([d['start'][key].double().numpy() for d in dumps], axis=0)
    records = zip(*(d['records'] for d in dumps))
    return start, [
        np.mean([r[key].double().numpy() for r in pair], axis=0)
        for pair in records
    ]


def test_averages_equal_the_formula_on_the_gathered_weights(ranks):
    """Parameters, and buffers meaned over the ranks, follow the formula."""
    folder, left, right = ranks
    saved = torch.load(folder / 'epoch_2.pth', weights_only=needs.SAFELY)
    assert not np.array_equal(
        left['records'][-1]['norm.running_mean'],
        right['records'][-1]['norm.running_mean'],
    )
    for key in ('head.weight', 'low', 'norm.running_mean', 'norm.running_var'):
        start, values = mean_trace(key, left, right)
        expected = oracle.average(start, values, lambda n: 0.9)
        error = oracle.relative_error(saved['state_dict'][key], expected)
        assert error < 1e-6, key  # float32 rounding


def test_both_ranks_validate_the_same_weights(ranks):
    """In validation every tensor is equal on both ranks, bit for bit."""
    _, left, right = ranks
    assert len(left['seen']) == 2
    found = [same(a, b) for a, b in zip(left['seen'], right['seen'])]
    assert found == [[], []]


def test_file_is_the_one_that_a_single_process_writes(ranks, tmp_path):
    """The same names and parts, without a wrapper's prefix."""
    folder, *_ = ranks
    saved = torch.load(folder / 'epoch_2.pth', weights_only=needs.SAFELY)
    hook = dict(type='EMAHook', schedule='constant', decay=0.9)
    single = Run(tmp_path, hook, max_epochs=2).train().load('epoch_2.pth')
    for part in ('state_dict', 'ema_state_dict', 'ema_meta'):
        assert saved[part].keys() == single[part].keys()
    assert saved['ema_meta']['world_size'] == 2
    assert saved['ema_state_dict']['steps'] == 4
    assert len(list(folder.glob('*.pth'))) == 2


def test_file_of_two_ranks_resumes_in_one_process(ranks, tmp_path):
    """The file resumes elsewhere; the changed world size is reported."""
    folder, *_ = ranks
    hook = dict(type='EMAHook', schedule='constant', decay=0.9)
    run = Run(
        tmp_path,
        hook,
        max_epochs=3,
        resume=True,
        load_from=str(folder / 'epoch_2.pth'),
    ).train()
    log = max(tmp_path.glob('*/*.log')).read_text()
    assert 'world_size 2 -> 1' in log
    assert run.load('epoch_3.pth')['ema_state_dict']['steps'] == 8
