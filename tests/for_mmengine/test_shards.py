"""Strategies that shard on two and three real ranks, against one process."""

from types import SimpleNamespace

import pytest
import torch

from mmdet_ema.errors import OptionError
from mmdet_ema.for_mmengine.fsdp2_strategy import FSDP2Strategy
from mmdet_ema.for_mmengine.runner import refuse_strategy
from tests import needs, oracle
from tests.for_mmengine.toy import same
from tests.ranks import run_ranks

pytestmark = needs.torch(2, 6, why='fully_shard')
PROGRAM = 'tests.for_mmengine.shards_program'
DECAYS = dict(
    ema=lambda n: oracle.ramp(n, 0.9, 3), fast=lambda n: oracle.ramp(n, 0.5, 1)
)
# gradients are summed in another order, and AdamW divides by their size
CLOSE = dict(rtol=1e-5, atol=1e-6)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The folder of all runs, and what was recorded in each by each rank."""
    from tests.for_mmengine.shards_program import train

    folder = tmp_path_factory.mktemp('shards')
    specs = ['whole:3', 'part:2', 'again:3:part/epoch_2.pth']
    specs += ['accumulated:2', 'low:3', 'offloaded:3', 'hybrid:3']
    ranks = run_ranks(PROGRAM, 2, folder, *specs)
    three = run_ranks(PROGRAM, 3, folder, 'three:3:part/epoch_2.pth')
    found = {name: [rank[name] for rank in ranks] for name in ranks[0]}
    found['three'] = [rank['three'] for rank in three]
    found['one'] = [train(folder / 'one', 4)]
    path = str(folder / 'three' / 'epoch_3.pth')
    found['last'] = [train(folder / 'last', 4, path)]
    specs = ['fsdp1:3', 'fsdp1_part:2', 'flat:3']
    specs += ['fsdp1_again:3:fsdp1_part/epoch_2.pth']
    local = ['local:3', 'local_part:2', 'local_flat:3']
    local += ['local_part:3:local_part/epoch_2.pth']
    for names in (specs, local):
        ranks = run_ranks(PROGRAM, 2, folder, *names)
        found.update({x: [rank[x] for rank in ranks] for x in ranks[0]})
    specs = ['fsdp1_three:3:fsdp1_part/epoch_2.pth']
    three = run_ranks(PROGRAM, 3, folder, *specs)
    found['fsdp1_three'] = [rank['fsdp1_three'] for rank in three]
    found['unclipped'] = [train(folder / 'unclipped', 4)]
    path = str(folder / 'fsdp1_three' / 'epoch_3.pth')
    found['fsdp1_last'] = [train(folder / 'unclipped_last', 4, path)]
    return folder, found


def read(runs, name):
    """Read a file of a run."""
    return torch.load(runs[0] / name, weights_only=False)


def unlike(left, right):
    """Names of what is not nearly the same."""
    # a tied weight is the last of its layer under FSDP1
    orders = [
        [name for name in names if not name.endswith('tied.weight')]
        for names in (left, right)
    ]
    assert orders[0] == orders[1]
    assert left.keys() == right.keys()
    return [k for k in left if not torch.allclose(left[k], right[k], **CLOSE)]


def weights_of(file):
    """Each set of weights in a file by its name."""
    fast = file['ema_averages']['fast']['state_dict']
    return [file['state_dict'], file['ema_state_dict'], fast]


@pytest.mark.parametrize(
    'run', ['whole', 'low', 'offloaded', 'hybrid', 'fsdp1', 'flat']
)
def test_file_holds_the_averages_of_the_gathered_weights(runs, run):
    """In float64 from the formula, all 12 steps; in float32 in any case."""
    _, found = runs
    file = read(runs, f'{run}/epoch_3.pth')
    for name, sets in (('ema', 0), ('fast', 2)):
        for key, average in weights_of(file)[sets].items():
            start, *raws = (
                raw[key].double().numpy() for raw in found[run][0]['raws']
            )
            assert 12 == len(raws)
            assert average.dtype in (torch.float32, torch.int64)
            if average.is_floating_point() and 'frozen' not in key:
                expected = oracle.average(start, raws, DECAYS[name])
                # float32 rounds each update to 6e-8
                assert oracle.relative_error(average, expected) < 1e-6, key


@pytest.mark.parametrize(
    'pair',
    [
        *(('whole', 'one'), ('offloaded', 'one'), ('hybrid', 'one')),
        *(('fsdp1', 'unclipped'), ('flat', 'unclipped')),
    ],
)
def test_file_is_that_of_one_process(runs, pair):
    """Keys in their order, kinds, shapes and, nearly, values."""
    sharded, one = (read(runs, f'{x}/epoch_3.pth') for x in pair)
    assert [*sharded] == [*one]
    for left, right in zip(weights_of(sharded), weights_of(one)):
        assert [] == unlike(left, right)
    assert sharded['state_dict']._metadata == one['state_dict']._metadata
    data = (runs[0] / pair[0] / 'epoch_3.pth').read_bytes()
    assert not [x for x in (b'_wrapped_module', b'_flat_param') if x in data]
    assert [*sharded['ema_meta']] == [*one['ema_meta']]
    assert [*sharded['meta']] == [*one['meta']]
    left, right = (x['optimizer'] for x in (sharded, one))
    assert left['param_groups'] == right['param_groups']
    assert [*left['state']] == [*right['state']]
    for i, values in left['state'].items():
        pair_of = (
            dict(sorted(x.items())) for x in (values, right['state'][i])
        )
        assert [] == unlike(*pair_of)
    tied = ('first.weight', 'tied.weight')
    left, right = (sharded['state_dict'][name] for name in tied)
    assert torch.equal(left, right)
    assert (left.data_ptr() == right.data_ptr()) == (pair[0] != 'flat')


@pytest.mark.parametrize(
    'names', [('whole', 'again'), ('fsdp1', 'fsdp1_again')]
)
def test_resume_on_as_many_ranks_is_exact(runs, names):
    """Three epochs at once equal two and, resumed, one more: bit for bit."""
    pair = (read(runs, f'{x}/epoch_3.pth') for x in names)
    for left, right in zip(*map(weights_of, pair)):
        assert [] == same(left, right)


def test_resume_on_other_ranks(runs):
    """Two ranks, then three, then one process without the strategy."""
    for left, right in (
        ('three/epoch_3.pth', 'whole/epoch_3.pth'),
        ('last/epoch_4.pth', 'one/epoch_4.pth'),
        ('fsdp1_three/epoch_3.pth', 'fsdp1/epoch_3.pth'),
        ('unclipped_last/epoch_4.pth', 'unclipped/epoch_4.pth'),
    ):
        pair = (read(runs, name) for name in (left, right))
        for one, other in zip(*map(weights_of, pair)):
            assert [] == unlike(one, other)


def test_validations_equal_those_of_one_process(runs):
    """All sets in turn, on two and on three ranks; what is logged, too."""
    _, found = runs
    one = found['one'][0]
    several = ('whole', 'three', 'offloaded', 'hybrid')
    for rank in (rank for name in several for rank in found[name]):
        metrics = rank['metrics'][-1]
        assert {'score', 'score_raw', 'score_fast'} == metrics.keys()
        assert len({round(x, 2) for x in metrics.values()}) == 3
        # it sums what is rounded to 1e-6
        assert pytest.approx(one['metrics'][2], rel=1e-4) == metrics
    two = found['unclipped'][0]
    for name in ('fsdp1', 'flat', 'local', 'local_flat', 'fsdp1_three'):
        for rank in found[name]:
            metrics = rank['metrics'][-1]
            assert pytest.approx(two['metrics'][2], rel=1e-4) == metrics
            distances = rank['ema_distance']
            assert (
                pytest.approx(two['ema_distance'][:12], rel=1e-4) == distances
            )
    for rank in found['low']:
        # bfloat16 has 8 bits
        assert (
            pytest.approx(one['metrics'][2], rel=0.05) == (rank['metrics'][-1])
        )
    assert [3] * 2 == [len(rank['metrics']) for rank in found['whole']]
    for name in ('ema_distance', 'grad_norm'):
        for rank in found['whole']:
            assert pytest.approx(one[name][:12], rel=1e-4) == rank[name]


def test_micro_batches_are_no_steps(runs):
    """Of eight iterations two belong to each step."""
    file = read(runs, 'accumulated/epoch_2.pth')
    assert 4 == file['ema_meta']['num_steps']


def files_of(runs, name):
    """The files of the ranks of a run."""
    return [read(runs, f'{name}/epoch_3.pth/rank{i}.pth') for i in range(2)]


def test_files_of_ranks_hold_the_pieces_of_the_whole(runs):
    """A file each, of plain tensors, one after the other in every weight."""
    whole = weights_of(read(runs, 'fsdp1/epoch_3.pth'))
    parts = [weights_of(file) for file in files_of(runs, 'local')]
    for weights, *cut in zip(whole, *parts):
        assert {*weights} == {*cut[0]} == {*cut[1]}
        for name, value in weights.items():
            pieces = [rank[name] for rank in cut]
            if value.dim() and '.running_' not in name:
                pieces = [torch.cat(pieces).view(value.shape)]
            for piece in pieces:
                assert torch.equal(value, piece), name
    for name in ('local', 'local_flat'):
        path = runs[0] / name
        kept = sorted(x.name for x in path.glob('*.pth'))
        assert 2 == len(kept)
        assert 'epoch_3.pth' == kept[1]
        assert (
            str(path / 'epoch_3.pth') == (path / 'last_checkpoint').read_text()
        )


def test_files_of_ranks_resume_exactly(runs):
    """Three epochs at once equal two and, resumed, one more: bit for bit."""
    for left, right in zip(
        files_of(runs, 'local'), files_of(runs, 'local_part')
    ):
        for one, other in zip(weights_of(left), weights_of(right)):
            assert [] == same(one, other)
        left, right = (x['optimizer']['state'] for x in (left, right))
        for i, values in left.items():
            assert [] == same(values, right[i])


def test_files_of_ranks_that_are_no_set_are_refused(runs):
    """In one line, on every rank."""
    words = dict(
        killed='not written together',
        missing='rank1.pth',
        damaged='rank1.pth',
        foreign='the file of rank',
    )
    for said in runs[1]['sets']:
        assert words.keys() == said.keys()
        for name, word in words.items():
            assert word in said[name]
            assert '\n' not in said[name]


def test_parts_of_tensors_are_refused_at_the_start(runs):
    """On every rank, with what to use instead."""
    for said in runs[1]['refused']:
        assert "use 'local' for files of ranks" in said


def test_exception_on_one_rank_hangs_nobody(runs):
    """The other one stops when the first has gone; raw weights are back."""
    (other, left), (planted, right) = runs[1]['failed']
    assert 'planted' == planted
    assert 'planted' not in other
    assert [] == left == right


def test_shards_of_ones_own_need_the_strategy():
    """Others call no hook on most ranks when they write a file."""
    kind = type('FSDPModule', (torch.nn.Module,), {})
    runner = SimpleNamespace(model=kind())
    with pytest.raises(OptionError, match='FSDP2Strategy'):
        refuse_strategy(runner)


def test_colossalai_is_refused_at_the_start():
    """Its strategy does not ask hooks when it writes a file."""
    kind = type('ColossalAIStrategy', (), {})
    runner = SimpleNamespace(strategy=kind(), model=None)
    with pytest.raises(OptionError, match='FSDP2Strategy'):
        refuse_strategy(runner)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(param_dtype='half'), "param_dtype='half': use one of"),
        (dict(shard='backbone'), 'shard'),
        (dict(shard=['nothing.*']), "shard=['nothing.*']"),
        (dict(float32=['head']), "float32=['head']"),
    ],
)
def test_option_out_of_range_is_named(tmp_path, monkeypatch, options, words):
    """Before anything is sharded."""

    def choose():
        strategy = FSDP2Strategy(work_dir=str(tmp_path), **options)
        model = torch.nn.Linear(1, 1)
        strategy._chosen(model, 'shard', strategy._shard)
        strategy._chosen(model, 'float32', strategy._float32)

    with pytest.raises(OptionError) as error:
        choose()
    assert words in str(error.value)
