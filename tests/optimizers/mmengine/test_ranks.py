"""Two real ranks: samples of both count, sharded weights stay weights."""

import pytest

from tests.ranks import run_ranks

ROWS = {
    '0.weight': ('weight', 0.01, 0.064 * (4 * 2 * 2) / 64),
    '0.bias': ('bias', 0.01, 0.0),
    '1.weight': ('norm', 0.01, 0.0),
    '1.bias': ('bias', 0.01, 0.0),
    '3.weight': ('weight', 0.01, 0.064 * (4 * 2 * 2) / 64),
    '3.bias': ('bias', 0.01, 0.0),
}


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    """Build on two gloo ranks; return what they printed and had."""
    folder = tmp_path_factory.mktemp('ranks')
    found = run_ranks('tests.optimizers.mmengine.ranks_program', 2, folder)
    logs = (folder / f'rank{rank}.log' for rank in (0, 1))
    return ''.join(log.read_text() for log in logs), found


@pytest.mark.parametrize('wrapper', ['ddp', 'fsdp'])
def test_groups_on_each_rank(ranks, wrapper):
    """Both ranks have the groups of the model, for the samples of both."""
    for found in ranks[1]:
        assert ROWS == found[wrapper]


def test_only_rank_0_speaks(ranks):
    """Each table is logged once, by one of the ranks."""
    assert 6 == ranks[0].count('BUILT')
    assert 3 == ranks[0].count('EMAOptimizerConstructor: SGD')


def test_flattened_weights_are_warned_of(ranks):
    """FSDP that hides the weights in one vector is warned of."""
    printed, (left, _) = ranks
    assert {'other'} == {row[0] for row in left['flat'].values()}
    assert 1 == printed.count('reaches no parameter')
    assert 'use_orig_params=True' in printed
