"""Two real ranks agree on what is a bad step."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.core.ranks_program import BAD_STEP, STEPS, weights_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize('overlap', [0, 1])
@pytest.mark.parametrize('decay', [0.9, 0.9999])
def test_bad_step_of_one_rank_is_skipped_by_all(tmp_path, decay, overlap):
    """NaN on one rank keeps the step out of the averages of both."""
    command = [sys.executable, '-m', 'tests.core.ranks_program']
    options = [str(tmp_path), str(decay), str(overlap)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), *options],
            cwd=ROOT,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
        )
        for rank in (0, 1)
    ]
    try:
        assert [0, 0] == [rank.wait(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    expected = weights_of(0, 280).double().numpy()
    for step in range(1, STEPS + 1):
        if step != BAD_STEP:
            raw = weights_of(step, 280).double().numpy()
            expected = decay * expected + (1 - decay) * raw
    for rank in (0, 1):
        found = torch.load(tmp_path / f'rank{rank}.pt')
        assert (STEPS - 1, 1) == (found['steps'], found['skipped'])
        average = found['average'].double().numpy().reshape(-1)
        # three roundings a step of values below 8
        bound = STEPS * 3 * 2.0**-24 * 8
        assert np.abs(average - expected).max() <= bound
