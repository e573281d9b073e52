"""The averages in the files, against the formula in NumPy float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mmdet_ema import OptionError
from mmdet_ema.training.steps import TELLS_OF_STEPS
from tests import oracle
from tests.contract.toy import (
    EMA,
    Hook,
    RecordingSGD,
    Run,
    ToyModel,
    ramp,
    same,
)

NAN = float('nan')
CONSTANT = dict(type='EMAHook', schedule='constant', decay=0.9)


@pytest.mark.parametrize(
    ('options', 'decay_of'),
    [
        ({}, oracle.ramp),
        (dict(decay=0.99, tau=30), lambda n: oracle.ramp(n, 0.99, 30)),
    ],
    ids=str,
)
def test_200_steps(tmp_path, options, decay_of):
    """Every average is that of the formula, BatchNorm included.

    That of a bfloat16 parameter, which stays one, in float32.
    """
    run = Run(tmp_path, dict(type='EMAHook', **options), epochs=50).train()
    saved = run.load(50)
    assert 200 == len(run.records) == saved.steps
    assert {} == run.wrong(saved, decay_of)
    assert [] == same(saved.raws, run.records[-1])
    assert torch.float32 == saved.averages['low'].dtype
    assert torch.bfloat16 == saved.raws['low'].dtype == run.model.low.dtype
    first, tied = (saved.averages[f'{x}.weight'] for x in ('first', 'tied'))
    assert torch.equal(first, tied)
    assert 200 == saved.averages['norm.num_batches_tracked']


def test_interval_keeps_the_window(tmp_path):
    """Every fourth step takes the product of four decays."""
    hook = dict(type='EMAHook', decay=0.99, tau=9, interval=4)
    run = Run(tmp_path, hook, epochs=10).train()
    weights = run.load(10).averages
    for key in ('head.weight', 'norm.running_var'):
        expected = oracle.average_every(
            *run.trace(key), lambda n: oracle.ramp(n, 0.99, 9), 4
        )
        error = oracle.relative_error(weights[key].double(), expected)
        assert error < 1e-6  # float32 rounding


@pytest.mark.parametrize(
    ('accumulation', 'epochs', 'steps'), [(4, 20, 20), (3, 1, 2)]
)
def test_accumulated_micro_batches_are_one_step(
    tmp_path, accumulation, epochs, steps
):
    """So is what is left over at the end; both are planned."""
    run = Run(tmp_path, EMA, epochs=epochs, accumulation=accumulation).train()
    saved = run.load(epochs)
    assert steps == len(run.records) == saved.steps
    keys = ['head.weight', 'tied.bias', 'low']  # buffers move in between
    assert {} == run.wrong(saved, ramp, keys)
    assert f'steps: {steps} planned' in run.log


@pytest.mark.parametrize(
    ('begin', 'first'),
    [
        (dict(begin_iter=5), 5),
        (dict(begin_iter=3), 3),
        ({'begin_epoch': 2}, 5),
    ],
    ids=str,
)
def test_average_begins_where_it_is_told(tmp_path, begin, first):
    """From then on it is averaged; a file from before holds raw weights."""
    run = Run(tmp_path, dict(EMA, **begin), epochs=4).train()
    _, values = run.trace('head.weight')
    expected = oracle.average(values[first - 2], values[first - 1 :], ramp)
    saved, before = run.load(4), run.load(1)
    assert 17 - first == saved.steps
    error = oracle.relative_error(saved.averages['head.weight'], expected)
    assert error < 1e-6  # float32 rounding
    if first > 4:
        assert 0 == before.steps
        assert [] == same(before.averages, before.raws)


class Thaw(Hook):
    """Thaws the frozen layer in the third iteration."""

    def before_train_iter(self, runner, *args, **kwargs):
        if runner.iter == 2:
            runner.model.frozen.requires_grad_(True)


@pytest.mark.skipif(
    not TELLS_OF_STEPS,
    reason='torch before 2.0 does not tell before a step: what thaws within '
    'an iteration is averaged from after it',
)
def test_thawed_parameter_is_averaged_from_then_on(tmp_path):
    """A parameter frozen for two steps averages as if it never had been."""
    run = Run(tmp_path, EMA, Thaw()).train()
    start, values = run.trace('frozen.weight')
    assert not np.array_equal(start, values[-1])
    assert {} == run.wrong(run.load(), ramp, ['frozen.weight'])


class Uncopyable(nn.Module):
    """Like a sparse convolution or a process group."""

    def __deepcopy__(self, memo):
        raise RuntimeError('cannot be copied')


def test_module_that_cannot_be_copied_works(tmp_path):
    """The hook never deep-copies the model."""
    model = ToyModel()
    model.alien = Uncopyable()
    assert 8 == Run(tmp_path, EMA, model=model).train().load().steps


class OfAGraph(ToyModel):
    """Has buffers that nothing is written into: sparse, and repeated."""

    def __init__(self, persistent):
        super().__init__()
        self.given = dict(coo=torch.eye(3).to_sparse())
        self.given['csr'] = torch.eye(3).to_sparse_csr()
        if not persistent:  # else not even torch could load it
            self.given['row'] = torch.ones(1, 3).expand(2, 3)
        for name, value in self.given.items():
            self.register_buffer(name, value, persistent=persistent)


@pytest.mark.parametrize('posthoc', [False, True])
@pytest.mark.parametrize('persistent', [False, True])
@pytest.mark.filterwarnings('ignore:Sparse CSR:UserWarning')
def test_sparse_and_repeated_buffers(tmp_path, persistent, posthoc):
    """They are left as they are, by evaluations, in files and on a resume."""
    hook = dict(EMA, evaluate='both', posthoc=posthoc)
    run = Run(tmp_path, hook, model=OfAGraph(persistent)).train()
    given = run.model.given
    assert all(getattr(run.model, name) is given[name] for name in given)
    plain = run.load().averages.keys() - given.keys()
    assert {} == run.wrong(run.load(), ramp, plain)
    model = OfAGraph(persistent)
    rest = Run(tmp_path, hook, model=model, epochs=3, resume=True).train()
    assert 12 == rest.load().steps


class Converting(ToyModel):
    """Saves something made of its parameters."""

    def __init__(self, convert):
        super().__init__()
        self.convert = convert
        self._register_state_dict_hook(self._convert)

    @staticmethod
    def _convert(module, state, prefix, metadata):
        state.update({k: module.convert(x) for k, x in state.items()})


def test_state_dict_of_copies(tmp_path):
    """Files hold the averages all the same."""
    run = Run(tmp_path, EMA, model=Converting(torch.clone)).train()
    assert {} == run.wrong(run.load(), ramp)
    assert 'values of its own' not in run.log


def test_state_dict_of_other_values(tmp_path):
    """A warning says that no average can take their place."""
    model = Converting(lambda x: x * 2)
    run = Run(tmp_path, EMA, model=model).train()
    assert 'values of its own for low and ' in run.log
    assert [] == same(run.load().averages, run.load().raws)


class NewModel(Hook):
    """Trains a copy of the model from the second epoch on."""

    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            optimizer = getattr(runner, 'optimizer', None)
            optimizer = optimizer or runner.optim_wrapper.optimizer
            runner.model = optimizer.model = copy.deepcopy(runner.model)
            (group,) = optimizer.param_groups
            trained = [p for p in runner.model.parameters() if p.requires_grad]
            group['params'] = trained
            optimizer.state.clear()


def test_another_model_in_the_place_of_the_last(tmp_path):
    """Its tensors go on with the averages of their names."""
    run = Run(tmp_path, EMA, NewModel(), epochs=3).train()
    saved = run.load()
    assert {} == run.wrong(saved, ramp)
    assert [] == same(saved.raws, run.records[-1])
    _, seen = run.seen[-1]
    low = ['low']  # a model holds its average rounded
    assert low == same(seen, saved.averages)


class OtherForEvaluation(Hook):
    """Has a model with less in it evaluated, and the first one trained."""

    def after_train_epoch(self, runner):
        self.trained, runner.model = runner.model, copy.deepcopy(runner.model)
        runner.model.low = torch.nn.Parameter(runner.model.low[:1].detach())

    def before_train_epoch(self, runner):
        runner.model = getattr(self, 'trained', runner.model)


def test_another_model_for_evaluations(tmp_path):
    """The averages of what it has not are not lost."""
    run = Run(tmp_path, EMA, OtherForEvaluation(), epochs=3).train()
    assert {} == run.wrong(run.load(), ramp)


class Replace(Hook):
    """Replaces a buffer and the data of a parameter between epochs."""

    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            norm, head = runner.model.norm, runner.model.head
            norm.running_mean = norm.running_mean.clone()
            head.bias.data = head.bias.data.clone()


def test_replaced_tensors_are_followed(tmp_path):
    """A buffer that became another object, and moved data, are averaged."""
    run = Run(tmp_path, Replace(), EMA).train()
    keys = ['norm.running_mean', 'head.bias']
    assert {} == run.wrong(run.load(), ramp, keys)


@pytest.mark.parametrize('overlap', [True, False])
@pytest.mark.parametrize('evaluate', ['ema', 'raw', 'both'])
def test_training_is_that_without_the_hook(tmp_path, evaluate, overlap):
    """Validation changes no raw weight, whatever it evaluates."""
    hook = dict(EMA, evaluate=evaluate, overlap=overlap)
    run = Run(tmp_path / 'a', hook).train()
    plain = Run(tmp_path / 'b').train()
    pairs = zip(run.records, plain.records)
    assert [[]] * 8 == [same(left, right) for left, right in pairs]
    assert {} == run.wrong(run.load(), ramp)


# NaN and Inf


class Poisoned(RecordingSGD):
    """Leaves NaN in a weight at the third step, until the fourth."""

    def step(self, closure=None):
        bias = self.model.head.bias.data
        if len(self.records) == 3:
            for parameter in self.model.parameters():
                parameter.grad = None
            bias.copy_(self.healthy)
        super().step(closure)
        if len(self.records) == 3:
            self.healthy = bias.clone()
            bias[1] = NAN


def poisoned(folder, **options):
    run = Run(folder, dict(EMA, **options))
    run.toy.optimizer.__class__ = Poisoned
    return run


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'NORMAL', 'VERY_LOW'])
def test_step_with_nan_is_skipped_and_said(tmp_path, priority):
    """A NaN never enters: n does not count the step, the log names it."""
    run = poisoned(tmp_path, priority=priority).train()
    saved = run.load()
    assert (7, 1) == (saved.steps, saved.meta['num_skipped'])
    keys = ['head.weight', 'norm.running_mean']
    taken = [0, 1, 3, 4, 5, 6, 7]
    assert {} == run.wrong(saved, ramp, keys, taken)
    assert all(
        torch.isfinite(x.float()).all() for x in saved.averages.values()
    )
    assert 1 == run.log.count('iteration 3 left NaN or Inf in head.bias')
    assert '7 steps averaged, 1 skipped' in run.log


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'NORMAL', 'VERY_LOW'])
def test_step_with_nan_stops_the_run_if_told(tmp_path, priority):
    """Under 'raise' the message names the iteration and the tensor."""
    message = r'iteration 3: head\.bias holds NaN or Inf'
    with pytest.raises(FloatingPointError, match=message):
        poisoned(tmp_path, nonfinite='raise', priority=priority).train()


def test_nan_enters_if_told(tmp_path):
    """Under 'ignore' the average takes in what there is."""
    bias = poisoned(tmp_path, nonfinite='ignore').train().load().averages
    assert [False, True] == torch.isnan(bias['head.bias']).tolist()


class Spoil(Hook):
    """Makes one tensor NaN from an iteration on."""

    def __init__(self, name, iteration):
        self.name, self.iteration = name, iteration

    def before_train_iter(self, runner, *args, **kwargs):
        if runner.iter >= self.iteration:
            runner.model.state_dict()[self.name][0] = NAN


def test_statistics_with_nan_are_named(tmp_path):
    """No step is skipped; the average stays, and the log says which."""
    run = Run(tmp_path, Spoil('norm.running_mean', 3), EMA).train()
    saved = run.load()
    assert 8 == saved.steps
    keys = ['norm.running_mean']
    assert {} == run.wrong(saved, ramp, keys, [0, 1, 2])
    assert 1 == run.log.count('the buffer norm.running_mean holds NaN or Inf')
    assert "copied=['norm.running_mean'] copies it" in run.log


def test_steps_that_are_skipped_on_and_on(tmp_path):
    """At the tenth the log says what to do."""
    run = Run(tmp_path, Spoil('first.weight', 2), EMA, epochs=4).train()
    assert 2 == run.log.count('left NaN or Inf in low;')
    assert 1 == run.log.count('resume from a file from before it')
    assert "copied=['low']" in run.log


# Copied tensors


def test_named_tensors_are_copied(tmp_path):
    """``copied`` names tensors."""
    hook = dict(CONSTANT, copied=['norm.run*'])
    run = Run(tmp_path, hook).train()
    saved = run.load()
    for key in ('norm.running_mean', 'norm.running_var'):
        assert torch.equal(run.records[-1][key], saved.averages[key])
    assert {} == run.wrong(saved, lambda n: 0.9, ['head.weight', 'low'])


def test_pattern_that_matches_nothing(tmp_path):
    """It is refused before a step is done."""
    run = Run(tmp_path, dict(CONSTANT, copied=['norm.run*', 'neck.*']))
    with pytest.raises(OptionError, match=r"copied=\['neck\.\*'\]: no para"):
        run.train()
    assert not run.records
