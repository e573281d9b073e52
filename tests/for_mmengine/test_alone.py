"""Two real ranks: nobody is asked but at a validation of all."""

import numpy as np
import pytest
import torch

from tests import oracle
from tests.needs import SAFELY
from tests.ranks import run_ranks

LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Where the files of all scenarios are."""
    return tmp_path_factory.mktemp('alone')


@pytest.fixture(scope='module')
def seen(folder):
    """What the two ranks saw, by scenario."""
    dumps = run_ranks('tests.for_mmengine.alone_program', 2, folder)
    return {name: [dump[name] for dump in dumps] for name in dumps[0]}


def averages_of(ranks, key, steps, agreed):
    """Averages of both ranks, in float64; at some steps they become equal."""
    values = [np.full(4, 1.0 if 'var' in key else 0.0)] * 2
    for n in range(1, steps + 1):
        values = [
            0.9 * value + 0.1 * rank['states'][n - 1][key].double().numpy()
            for value, rank in zip(values, ranks)
        ]
        if n in agreed:
            values = [sum(values) / 2] * 2
    return values


@pytest.mark.parametrize('name', ['epochs', 'large', 'copied', 'unused'])
def test_validation_makes_three_collectives(seen, name):
    """However large the model; steps and files make none."""
    for rank in seen[name]:
        steps = len(rank['calls']) // 2
        assert [0] * steps + [3] * steps == rank['calls']
        assert 6 == len(rank['total'])


def test_iterations(seen):
    """A loop that counts iterations asks where it validates, no more."""
    for rank in seen['iterations']:
        assert [0, 0, 3, 3, 3, 6, 6, 9] == rank['calls']
        assert 9 == len(rank['total'])


@pytest.mark.parametrize('name', ['no validation', 'joined', 'rescue'])
def test_nobody_is_asked_elsewhere(seen, name):
    """Without a validation of mmengine's own loop there is no collective."""
    for rank in seen[name]:
        asked = 3 if name == 'rescue' else 0  # of the epoch before
        assert asked == len(rank['total'])


@pytest.mark.parametrize(
    ('name', 'agreed'),
    [
        ('epochs', {4, 8}),
        ('iterations', {3, 6, 8}),
        ('no validation', set()),
        ('rank 0 validates', {4, 8}),
        ('save and wait', {4, 8}),
    ],
)
@pytest.mark.parametrize('key', ['norm.running_mean', 'norm.running_var'])
def test_files_follow_the_formula(folder, seen, name, agreed, key):
    """Statistics are the mean at validations, and rank 0's in between."""
    files = list((folder / name).glob('*.pth'))
    assert len(files) >= 2
    for path in files:
        loaded = torch.load(path, weights_only=SAFELY)
        saved, steps = loaded['state_dict'][key], 0
        steps = loaded['ema_state_dict']['steps']
        wanted = averages_of(seen[name], key, steps, agreed)[0]
        # float32 rounds each of 8 updates to 6e-8 of the magnitude
        assert oracle.relative_error(saved, wanted) < 1e-6, path.name


@pytest.mark.parametrize('name', ['epochs', 'large', 'copied', 'iterations'])
def test_both_ranks_validate_the_same(seen, name):
    """What is evaluated is equal on both, bit for bit; masks keep theirs."""
    left, right = seen[name]
    assert len(left['shown']) == len(right['shown']) >= 2
    for one, other in zip(left['shown'], right['shown']):
        assert [] == [k for k in one if not torch.equal(one[k], other[k])]
        assert [0, LOWEST, LOWEST] == one['mask'].tolist()
        assert [0, -np.inf] == one['hidden'].tolist()
        assert [60000] == one['narrow'].tolist()


def test_copied_statistics_become_the_mean(seen):
    """With ``update_buffers=False`` it is that of the raw statistics."""
    left, right = seen['copied']
    for i, step in enumerate((3, 7)):
        for key in ('norm.running_mean', 'norm.running_var'):
            raws = [r['states'][step][key].double() for r in (left, right)]
            error = oracle.relative_error(
                left['shown'][i][key], sum(raws).numpy() / 2
            )
            assert error < 1e-6


@pytest.mark.parametrize(
    'name', ['rank 0 validates', 'hook validates', 'rank 0 saves']
)
def test_rank_0_alone(seen, name):
    """A validation or a file of rank 0 alone does not stop the others."""
    left, right = seen[name]
    assert len(left['states']) == len(right['states'])
    if name == 'rank 0 validates':
        assert (2, 0) == (len(left['shown']), len(right['shown']))
    if name == 'hook validates':
        assert (3, 2) == (len(left['shown']), len(right['shown']))


def test_last_file_after_an_exception(folder, seen):
    """A file written after an exception has the step before it."""
    errors = [rank['error'] for rank in seen['rescue']]
    assert ['the loss is not finite'] * 2 == errors
    path = folder / 'rescue' / 'rescue.pth'
    saved = torch.load(path, weights_only=SAFELY)
    assert 5 == saved['ema_state_dict']['steps']


def test_uneven_data(seen):
    """Ranks with data of other lengths train to the end under ``Join``."""
    left, right = seen['joined']
    assert (8, 12) == (len(left['states']), len(right['states']))


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('epochs', 'they become the mean where the training loop validates'),
        ('no validation', 'are never made equal'),
        ('joined', 'are never made equal'),
    ],
)
def test_what_is_not_made_equal_is_said(seen, name, words):
    """One line at the start says what becomes of buffers."""
    log = seen[name][0]['log']
    assert 1 == log.count('differ between the ranks')
    assert words in ' '.join(log.split())
