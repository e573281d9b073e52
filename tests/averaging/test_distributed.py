"""Three real ranks: each averages by itself; buffers are made equal."""

import numpy as np
import pytest
import torch

from tests.averaging.ranks_program import (
    BAD_STEP,
    RANKS,
    STEPS,
    WAYS,
    tensors_of,
    weights_of,
)
from tests.ranks import run_ranks


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    """What each of the ranks saw."""
    folder = tmp_path_factory.mktemp('ranks')
    return run_ranks('tests.averaging.ranks_program', RANKS, folder)


@pytest.mark.parametrize('way', range(len(WAYS)), ids=map(str, WAYS))
def test_bad_step_is_skipped_by_all_without_asking(ranks, way):
    """Parameters are equal, and so is what each rank makes of them."""
    decay, _ = WAYS[way]
    expected = weights_of(0, 280).double().numpy()
    for step in range(1, STEPS + 1):
        if step != BAD_STEP:
            raw = weights_of(step, 280).double().numpy()
            expected = decay * expected + (1 - decay) * raw
    for rank in ranks:
        assert 0 == rank['calls of steps']
        found = rank['averages'][way]
        assert (STEPS - 1, 1) == (found['steps'], found['skipped'])
        average = found['average'].double().numpy().reshape(-1)
        # three roundings a step of values below 8
        bound = STEPS * 3 * 2.0**-24 * 8
        assert np.abs(average - expected).max() <= bound


def numpy_of(tensor):
    """A tensor in double precision."""
    kind = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.to(kind).numpy()


def test_mean_over_the_ranks(ranks):
    """Floats of any kind become the mean, the same bits on each rank."""
    given = [tensors_of(rank)[0] for rank in range(RANKS)]
    for name in given[0]:
        first = ranks[0]['means'][name]
        assert all(torch.equal(first, r['means'][name]) for r in ranks), name
        if name != 'infinite':
            mean = sum(numpy_of(tensors[name]) for tensors in given) / RANKS
            error = 2.0 ** (-10 if first.dtype == torch.half else -22)
            np.testing.assert_allclose(
                numpy_of(first), mean, rtol=error, atol=1e-7, err_msg=name
            )


@pytest.mark.parametrize('name', ['third', 'lowest', 'halves', 'infinite'])
def test_equal_values_keep_their_bits(ranks, name):
    """Also the lowest number, whose sum would overflow, and infinity."""
    for rank in ranks:
        assert torch.equal(tensors_of(0)[0][name], rank['means'][name])


def test_others_are_those_of_rank_0(ranks):
    """Integers, flags and what has no mean are copied exactly."""
    for rank in ranks:
        for name, value in tensors_of(0)[1].items():
            assert torch.equal(value, rank['copies'][name]), name


def test_number_of_collectives(ranks):
    """It is three, for 16 tensors of seven dtypes."""
    for rank in ranks:
        assert rank['equal']
        assert 3 == rank['calls']


def test_tensors_of_other_shapes_are_left_alone(ranks):
    """Where one rank has another shape nothing changes anywhere."""
    for i, rank in enumerate(ranks):
        equal, tensor = rank['odd']
        assert not equal
        assert {float(i)} == set(tensor.tolist())
        assert rank['nothing']


def test_planted_difference_is_named(ranks):
    """One bit of one element, on one of three ranks: all of them say so."""
    for rank in ranks:
        (nothing, raw, average), calls = rank['verified']
        assert nothing is None
        assert '2.bias is not the same on all ranks after 1 steps' in raw
        assert "1.running_mean of the averages 'ema' is not the" in average
        assert 2 * 3 == calls
