"""Sharded models on two and three real ranks: shards are averaged."""

import numpy as np
import pytest
import torch

from mmdet_ema.averaging import WeightAverager
from tests import needs, oracle
from tests.ranks import run_ranks

pytestmark = needs.torch(2, 6, why='fully_shard')
WAYS = [
    *('default', 'kept', 'bfloat16', 'deferred', 'hybrid', 'fsdp1', 'flat'),
    *('fsdp1 kept', 'flat kept', 'fsdp1 whole', 'flat whole'),
    'fsdp1 bfloat16',
]
SEVERAL = ['default', 'fsdp1', 'flat', 'fsdp1 kept', 'flat kept']
# float32 rounds each of 6 updates to 6e-8 of the magnitude
TOLERANCE = 1e-6


@pytest.fixture(scope='module', params=[2, 3])
def ranks(request, tmp_path_factory):
    """What each of the ranks saw."""
    folder = tmp_path_factory.mktemp('shards')
    program = 'tests.averaging.shards_program'
    found = run_ranks(program, request.param, folder)
    found[0]['file'] = torch.load(folder / 'dcp.pth', weights_only=True)
    return found


@pytest.fixture
def plain():
    """The averager of the model without shards."""
    from tests.averaging.shards_program import OPTIONS, plain

    return WeightAverager(plain(), 'constant', **OPTIONS)


def averages_of(state):
    """The averages of a state, by the name of their set."""
    return {'ema': state, **state['more']}


@pytest.mark.parametrize('way', WAYS)
def test_gathered_averages_equal_the_formula(ranks, way):
    """Also where one rank alone has NaN in its part: all skip that step."""
    from tests.averaging.shards_program import BAD_STEP, DECAYS

    found = ranks[0][way]
    raws = found['raws'][1:]
    del raws[BAD_STEP - 1]
    assert [1] * len(ranks) == [rank[way]['skipped'] for rank in ranks]
    assert {False} == {rank[way]['bad answer'] for rank in ranks}
    for name, state in averages_of(found['state']).items():
        for key, average in state['averages'].items():
            assert average.dtype == raws[0][key].dtype
            if not average.is_floating_point():
                assert torch.equal(raws[-1][key], average)
                continue
            expected = oracle.average_every(
                found['raws'][0][key].double().numpy(),
                [raw[key].double().numpy() for raw in raws],
                lambda n, name=name: DECAYS[name],
                2 if 'bfloat16' in way else 1,
            )
            error = oracle.relative_error(average, expected)
            assert error < TOLERANCE, (name, key)


@pytest.mark.parametrize('way', WAYS)
def test_evaluations_in_turn_equal_those_without_shards(ranks, way):
    """Raw, averages, raw: no backward pass lets the model forget between."""
    for rank in ranks:
        pairs = rank[way]['pairs']
        assert {'raw': 3, 'ema': 2, 'slow': 1} == {
            name: len(seen) for name, seen in pairs.items()
        }
        # bfloat16 rounds sums in another order
        bound = 0.02 if 'bfloat16' in way else 1e-6
        for seen in pairs.values():
            for output, expected in seen:
                assert torch.allclose(
                    output.float(), expected.float(), rtol=bound, atol=bound
                )
        assert not torch.equal(pairs['raw'][0][0], pairs['ema'][0][0])
        assert [] == rank[way]['back'] == rank[way]['raws inside']


@pytest.mark.parametrize('way', WAYS)
def test_each_rank_holds_its_own_part_alone(ranks, way, plain):
    """Bytes of all ranks together are those of one process; one flag a step.

    Buffers are whole on each rank. Three ranks have nothing of some weights.
    """
    entries = [e for e in plain.entries if e.role.value != 'shared']
    buffers = [e.raw for e in entries if not e.parameters]
    size = sum(x.numel() * x.element_size() for x in buffers) * 2
    total = plain.counts()['bytes'] + size * (len(ranks) - 1)
    found = sum(rank[way]['bytes'] for rank in ranks)
    if 'whole' in way:
        total = plain.counts()['bytes'] * len(ranks)
    # all pieces of a flat tensor are of one size
    padding = (len(ranks) - 1) * 4 * 2 * 2 if 'flat' in way else 0
    assert total <= found <= total + padding
    apart = 'flat' not in way and 'whole' not in way
    assert (ranks[-1][way]['empty'] >= 1) == apart
    names = [rank[way]['names'] for rank in ranks]
    assert [names[0]] * len(ranks) == names
    calls = 0 if 'whole' in way else 1
    assert {calls} == {rank[way]['calls'] for rank in ranks}


@pytest.mark.parametrize('way', WAYS)
def test_state_is_that_of_one_process(ranks, way, plain):
    """Names without prefixes, tied ones share memory; rank 0 alone has it."""
    found, expected = ranks[0][way]['state'], plain.state_dict()
    assert found.keys() == expected.keys()
    assert found['averages'].keys() == expected['averages'].keys()
    for key, value in expected['averages'].items():
        assert value.shape == found['averages'][key].shape
    tied = ('block.narrow.weight', 'block.tied.weight')
    left, right = (found['averages'][name] for name in tied)
    assert torch.equal(left, right)
    assert (left.data_ptr() == right.data_ptr()) == ('flat' not in way)
    for rank in ranks[1:]:
        assert {} == rank[way]['state']['averages']
        assert found['num_steps'] == rank[way]['state']['num_steps']


@pytest.mark.parametrize('way', SEVERAL)
def test_state_loads_on_shards_and_in_one_process(ranks, plain, way):
    """What rank 0 got is what every rank, or one process, goes on from.

    Also of a layer that was frozen after it was trained. Raw weights stay.
    """
    state, loaded = ranks[0]['given'], ranks[0][way]['loaded']
    assert [[]] * len(ranks) == [rank[way]['same'] for rank in ranks]
    plain.load_state_dict(state)
    for other in (loaded, plain.state_dict()):
        for name, given in averages_of(state).items():
            there = averages_of(other)[name]
            assert given['num_steps'] == there['num_steps']
            for key, value in given['averages'].items():
                assert torch.equal(value, there['averages'][key]), key


def test_folder_of_ranks_loads_and_becomes_a_file(ranks):
    """Checkpoints of torch's own take averages as they lie on the ranks."""
    given, found = ranks[0]['given'], ranks[0]['dcp']
    assert given['num_steps'] == found['num_steps']
    for key, value in given['averages'].items():
        assert torch.equal(value, found['averages'][key]), key
        assert torch.equal(value, ranks[0]['file']['ema'][key]), key


def test_rank_that_holds_nothing_agrees_too(ranks):
    """It has no verdict of its own, and is asked all the same."""
    for rank in ranks:
        answers, _ = rank['little']
        assert [0, 1, 1] == [int(answer) for answer in answers]
    averages = ranks[0]['little'][1]
    start = averages['0.weight'].item()
    assert {'0.weight', '0.bias'} <= averages.keys()
    assert 1.0 < start < 2.0


def test_distance_is_that_of_whole_tensors(ranks):
    """Every rank gets the same number."""
    for rank in ranks:
        assert ranks[0]['default']['distance'] == rank['default']['distance']
    found = ranks[0]['default']
    raw, names = found['raws'][-1], found['names']
    own = [x[0] for x in names if 'norm' not in x[0] and 'frozen' not in x[0]]
    for name, seen in zip(('ema', 'slow'), found['distance']):
        averages = averages_of(found['state'])[name]['averages']
        gap = sum(
            ((averages[k].double() - raw[k].double()) ** 2).sum() for k in own
        )
        size = sum((raw[k].double() ** 2).sum() for k in own)
        assert pytest.approx(float(np.sqrt(gap / size)), rel=1e-5) == seen


@pytest.mark.parametrize('way', SEVERAL)
def test_failed_evaluation_leaves_the_raw_weights(ranks, way):
    """A forward pass that fails half-way is over: training goes on."""
    for rank in ranks:
        found = rank[way]['fail']
        assert 'planted' == found['said']
        assert [] == found['back']
        assert torch.allclose(*found['pair'], atol=1e-6)
        assert found['answer']


@pytest.mark.parametrize('way', SEVERAL)
def test_frozen_layer_that_thaws_is_averaged_from_then_on(ranks, way):
    """Also where a rank has nothing of it."""
    frozen = 1 if 'flat' in way else 2
    for rank in ranks:
        found = rank[way]['thaw']
        before, after = found['before'], found['after']
        assert (frozen, 0) == (before['shared'], after['shared'])
    found = ranks[0][way]['thaw']
    for key in ('frozen.weight', 'frozen.bias'):
        old, new = (raw[key].double().numpy() for raw in found['raws'])
        expected = oracle.average(old, [new], lambda n: 0.5)
        average = found['averages'][key]
        assert oracle.relative_error(average, expected) < TOLERANCE


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('copied', 'use_orig_params=True'),
        ('half', 'MixedPrecision(param_dtype=torch.bfloat16)'),
        ('posthoc', 'averages=dict('),
        ('posthoc_fsdp1', 'averages=dict('),
    ],
)
def test_refused_with_what_to_use_instead(ranks, name, words):
    """One line, on every rank, before anything is averaged."""
    for rank in ranks:
        assert words in rank['refused'][name]
        assert '\n' not in rank['refused'][name]
