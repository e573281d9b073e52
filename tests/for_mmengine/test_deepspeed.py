"""mmengine's ``DeepSpeedStrategy`` on real ranks: ZeRO 1, 2 and 3."""

from types import SimpleNamespace

import pytest
import torch

from mmdet_ema.errors import OptionError
from mmdet_ema.for_mmengine.runner import refuse_strategy
from tests import oracle
from tests.for_mmengine.toy import same
from tests.ranks import run_ranks

PROGRAM = 'tests.for_mmengine.deepspeed_program'
DECAYS = dict(
    ema=lambda n: oracle.ramp(n, 0.9, 3), fast=lambda n: oracle.ramp(n, 0.5, 1)
)
# gradients are summed in another order, and AdamW divides by their size
CLOSE = dict(rtol=1e-5, atol=1e-6)
STAGES = ['one', 'two', 'three', 'small']
LOW = ['low_one', 'low_three']
ODD = ['accumulated', 'overflowed', 'overflowed_two', 'spoiled', 'alone']
ODD += ['deployed', 'late']


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The folder of all runs, and what each rank recorded in each of them."""
    pytest.importorskip('deepspeed')
    from tests.for_mmengine.shards_program import train

    folder = tmp_path_factory.mktemp('deepspeed')
    resumed = ['part_one', 'again_one', 'part_three', 'again_three']
    resumed += ['low_part', 'low_again', 'without', 'afterwards']
    refused = ['refused_posthoc', 'refused_strict', 'refused_moment']
    names = [*STAGES, *LOW, *resumed, *ODD, *refused, 'plain', 'failed']
    ranks = run_ranks(PROGRAM, 2, folder, *names)
    found = {name: [rank[name] for rank in ranks] for name in names}
    (folder / 'of3').mkdir()
    names = ['refused_ranks', 'three', 'small', 'low_three']
    ranks = run_ranks(PROGRAM, 3, folder / 'of3', *names)
    found['refused_ranks'] = [rank['refused_ranks'] for rank in ranks]
    for name in names[1:]:
        found[f'of3/{name}'] = [rank[name] for rank in ranks]
    found['process'] = [train(folder / 'process', 3)]
    return folder, found


def read(runs, name):
    """Read the whole file of a checkpoint of a run, as any process could."""
    return torch.load(runs[0] / name / 'ema.pth', weights_only=True)


def unlike(left, right):
    """Names of what is not nearly the same."""
    assert [*left] == [*right]
    return [k for k in left if not torch.allclose(left[k], right[k], **CLOSE)]


def weights_of(file):
    """Each set of weights in a file."""
    fast = file['ema_averages']['fast']['state_dict']
    return [file['state_dict'], file['ema_state_dict'], fast]


@pytest.mark.parametrize(
    'run',
    [*STAGES, *LOW, *(f'of3/{x}' for x in ('three', 'small', 'low_three'))],
)
def test_file_holds_the_averages_of_the_gathered_weights(runs, run):
    """In float64 from the formula, all 12 steps; never of rounded parts.

    Under stage 1 every rank has rounded weights, and these are averaged.
    """
    file = read(runs, f'{run}/epoch_3.pth')
    raws = runs[1][run][0]['raws']
    assert 13 == len(raws)
    for name, sets in (('ema', 0), ('fast', 2)):
        averages = weights_of(file)[sets]
        assert len(averages) >= 7
        for key, average in averages.items():
            if not average.is_floating_point() or 'frozen' in key:
                continue
            assert average.dtype == torch.float32
            start, *steps = (raw[key].double().numpy() for raw in raws)
            expected = oracle.average(start, steps, DECAYS[name])
            # float32 rounds each update to 6e-8
            assert oracle.relative_error(average, expected) < 1e-6, key


@pytest.mark.parametrize('run', [*STAGES, 'of3/three', 'of3/small'])
def test_file_is_that_of_one_process(runs, run):
    """Keys in their order, kinds, shapes and, nearly, values.

    The optimizer is in DeepSpeed's own files.
    """
    sharded = read(runs, f'{run}/epoch_3.pth')
    path = runs[0] / 'process' / 'epoch_3.pth'
    one = torch.load(path, weights_only=True)
    one.pop('optimizer')
    assert {*sharded} == {*one}
    for left, right in zip(weights_of(sharded), weights_of(one)):
        assert [] == unlike(left, right)
    meta = sharded['state_dict']._metadata
    assert meta == one['state_dict']._metadata
    assert [*sharded['ema_meta']] == [*one['ema_meta']]
    assert {*sharded['meta']} == {*one['meta']}
    tied = ('first.weight', 'tied.weight')
    left, right = (sharded['state_dict'][name].data_ptr() for name in tied)
    assert left == right


@pytest.mark.parametrize('run', [*STAGES, 'of3/three', 'of3/small'])
def test_validations_equal_those_of_one_process(runs, run):
    """All sets in turn, without a backward pass between; what is logged."""
    _, found = runs
    one = found['process'][0]
    for rank in found[run]:
        assert 3 == len(rank['metrics'])
        for metrics, expected in zip(rank['metrics'], one['metrics']):
            assert {'score', 'score_raw', 'score_fast'} == metrics.keys()
            assert len({round(x, 2) for x in metrics.values()}) == 3
            # it sums what is rounded to 1e-6
            assert pytest.approx(expected, rel=1e-4) == metrics
        distance = rank['ema_distance']
        assert pytest.approx(one['ema_distance'], rel=1e-4) == distance


def test_a_rank_holds_its_own_part_alone(runs):
    """Under stage 3; buffers are whole on each rank."""
    _, found = runs
    sizes = {
        name: [rank['bytes'] for rank in found[name]]
        for name in ('one', 'three', 'of3/three')
    }
    whole, buffers = sizes['one'][0], (2 * 4 * 4 + 8) * 2
    for name in ('three', 'of3/three'):
        parts = [x - buffers for x in sizes[name]]
        assert whole - buffers == sum(parts)
        # a bias of two has nothing left for the third rank
        assert max(parts) < (whole - buffers) * 0.6


@pytest.mark.parametrize('kind', ['one', 'three'])
def test_resume_on_as_many_ranks_is_exact(runs, kind):
    """Three epochs at once equal two and, resumed, one more: bit for bit."""
    pair = (read(runs, f'{x}/epoch_3.pth') for x in (kind, f'again_{kind}'))
    for left, right in zip(*map(weights_of, pair)):
        assert [] == same(left, right)


def test_resume_in_half_precision_is_exact(runs):
    """Also where what is stepped is more precise than what is loaded."""
    names = ('low_three/epoch_3.pth', 'low_again/epoch_3.pth')
    for left, right in zip(*(weights_of(read(runs, x)) for x in names)):
        assert [] == same(left, right)


def test_micro_batches_are_no_steps(runs):
    """Of eight iterations two belong to each step."""
    assert [4] * 2 == [
        rank['progress']['num_steps'] for rank in runs[1]['accumulated']
    ]


@pytest.mark.parametrize('run', ['overflowed', 'overflowed_two'])
def test_overflow_is_no_step(runs, run):
    """In float16, NaN in the gradient of one rank: weights stay."""
    for rank in runs[1][run]:
        assert [True, False, True, True] == rank['applied']
        assert 3 == rank['progress']['num_steps']
        assert 0 == rank['progress']['num_skipped']


def test_part_of_one_rank_is_not_finite(runs):
    """All ranks skip that step; the averages stay finite."""
    for rank in runs[1]['spoiled']:
        assert 1 == rank['progress']['num_skipped']
        assert 3 == rank['progress']['num_steps']
    file = read(runs, 'spoiled/epoch_1.pth')
    for key, average in file['state_dict'].items():
        assert torch.isfinite(average).all(), key


def test_without_the_optimizer_it_is_one_file(runs):
    """As DeepSpeed writes it; with averages where it has raw weights."""
    path = runs[0] / 'alone' / 'epoch_1.pth'
    if path.is_dir():  # ZeRO-3 leaves out nothing unless told to gather
        path = path / 'ema.pth'
    file = torch.load(path, weights_only=True)
    assert not torch.equal(
        file['state_dict']['first.weight'],
        file['ema_state_dict']['module.first.weight'],
    )


def test_deployed_averages_are_in_the_state_dict(runs):
    """The others stand beside them."""
    file = read(runs, 'deployed/epoch_1.pth')
    assert 'fast' == file['ema_meta']['deploy']
    raws = runs[1]['deployed'][0]['raws']
    start, *steps = (raw['first.weight'].double().numpy() for raw in raws)
    expected = oracle.average(start, steps, DECAYS['fast'])
    average = file['state_dict']['first.weight']
    assert oracle.relative_error(average, expected) < 1e-6


def test_average_that_begins_late(runs):
    """The file of the first epoch has raw weights alone."""
    file = read(runs, 'late/epoch_1.pth')
    raw = runs[1]['late'][0]['raws'][4]['first.weight']
    assert torch.equal(raw, file['state_dict']['first.weight'])
    assert 4 == read(runs, 'late/epoch_2.pth')['ema_meta']['num_steps']


def test_folder_without_averages(runs):
    """They start from the weights; under ``strict_load`` that is refused."""
    assert not (runs[0] / 'without' / 'epoch_1.pth' / 'ema.pth').exists()
    for rank in runs[1]['afterwards']:
        assert 4 == rank['progress']['num_steps']
    for said in runs[1]['refused_strict']:
        assert 'strict_load=True' in said
        assert 'ema.pth' in said


def test_file_of_another_moment_is_refused(runs):
    """It would go on from averages that belong to other weights."""
    for said in runs[1]['refused_moment']:
        assert 'is of iteration 4' in said
        assert 'are of iteration 8' in said


def test_other_number_of_ranks_is_refused_by_deepspeed(runs):
    """Before anything of ours is read."""
    for said in runs[1]['refused_ranks']:
        assert 'world size of 2 but the current world size is 3' in said


def test_starting_weights_are_refused(runs):
    """No rank holds them whole."""
    for said in runs[1]['refused_posthoc']:
        assert 'posthoc=True' in said
        assert '\n' not in said


def test_exception_on_one_rank_hangs_nobody(runs):
    """The other one stops when the first has gone; raw parts are back."""
    (other, left), (planted, right) = runs[1]['failed']
    assert 'planted' == planted
    assert 'planted' not in other
    assert [] == left == right


def test_one_process_tests_to_the_last_validation(runs, tmp_path):
    """The whole file, by a plain ``Runner`` without DeepSpeed."""
    from mmengine.runner import Runner

    from tests.for_mmengine.shards_program import EMA, Model
    from tests.for_mmengine.toy import Score, loader

    runner = Runner(
        model=Model(),
        work_dir=str(tmp_path),
        test_dataloader=loader(4, 2, seed=1),
        test_cfg=dict(),
        test_evaluator=[Score()],
        custom_hooks=[dict(EMA, type='EMAHook')],
        load_from=str(runs[0] / 'three' / 'epoch_3.pth' / 'ema.pth'),
    )
    expected = runs[1]['three'][0]['metrics'][-1]
    assert pytest.approx(expected, rel=1e-5) == runner.test()


def test_plain_loop(runs):
    """Formula, outputs, a state that loads; parts of 18 and 17, 3 and 2."""
    first, *others = runs[1]['plain']
    for rank in (first, *others):
        assert [] == rank['back']
        assert not torch.equal(*(pair[0] for pair in rank['outputs']))
        for expected, seen in rank['outputs']:
            assert torch.allclose(expected, seen, **CLOSE)
    assert [] == unlike(first['expected'], first['averages'])
    assert [] == same(first['averages'], first['again'])
    assert [{}] * len(others) == [rank['averages'] for rank in others]


def test_evaluation_by_deepspeed_is_refused():
    """What to do instead is in the line."""
    kind = type('DeepSpeedStrategy', (), {})
    runner = SimpleNamespace(strategy=kind(), model=None, _train_loop=None)
    with pytest.raises(OptionError, match="runner_type='Runner'"):
        refuse_strategy(runner)
