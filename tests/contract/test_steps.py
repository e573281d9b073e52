"""Every change of the weights is averaged once an iteration."""

import pytest
import torch
from torch import nn

from tests import needs, oracle
from tests.conftest import MMCV1
from tests.contract.toy import EMA, Hook, Run, ToyModel, ramp, same, state_of

KEYS = ['first.weight', 'tied.bias', 'head.weight']
ALL_KEYS = [*KEYS, 'norm.running_mean']
PRIORITIES = ['VERY_HIGH', 'NORMAL', 'VERY_LOW']


class Trace(Hook):
    """Keeps the raw weights before and after every iteration."""

    if not MMCV1:
        priority = 'LOWEST'

    def __init__(self):
        self.before, self.after = [], []

    def before_train_iter(self, runner, *args, **kwargs):
        self.before.append(state_of(runner.model))

    def after_train_iter(self, runner, *args, **kwargs):
        self.after.append(state_of(runner.model))


def train(folder, *hooks, ema=EMA, **options):
    """Train; the records are of iterations, whoever changes the weights."""
    trace = Trace()
    run = Run(folder, ema, *hooks, trace, **options).train()
    run.toy.optimizer.records = trace.after
    run.before = trace.before
    return run


def check(run, steps, keys=ALL_KEYS, chosen=None):
    """The last file has the average of what moved."""
    saved = run.load()
    assert steps == saved.steps
    for key in keys:
        assert not torch.equal(run.start[key], run.records[-1][key])
    assert {} == run.wrong(saved, ramp, keys, chosen)


class Stepping(ToyModel):
    """Changes its weights itself, as ``change`` says."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def train_step(self, data, optimizer=None, **kwargs):
        def backward():
            self.zero_grad()
            loss = self(**data) if MMCV1 else self(**data, mode='loss')['loss']
            loss.backward()

        if not MMCV1:
            data = self.data_preprocessor(data, True)
        backward()
        self.change(self, backward)
        if MMCV1:
            return dict(log_vars={}, num_samples=4)
        return dict(loss=torch.zeros(()))


def stepping(change, **options):
    """Options of a run whose model changes its weights itself."""
    if MMCV1:
        options['optimizer_config'] = None
    return dict(model=Stepping(change), **options)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def descend(model, lr=0.002):
    for parameter in trained(model):
        parameter.data.sub_(lr * parameter.grad)


def by_data(model, backward):
    descend(model)


@torch.no_grad()
def in_place(model, backward):
    for parameter in trained(model):
        parameter.sub_(0.002 * parameter.grad)


def two_steps(model, backward):
    """Climb, look at the gradient there, step from the old place: SAM."""
    old = [p.detach().clone() for p in trained(model)]
    descend(model, -0.0001)
    backward()
    for parameter, kept in zip(trained(model), old):
        parameter.data = kept
    descend(model)


def nothing(model, backward):
    pass


@pytest.mark.parametrize('change', [by_data, in_place, two_steps])
@pytest.mark.parametrize('length', [{}, dict(iters=12)], ids=str)
def test_weights_that_no_optimizer_changes(tmp_path, change, length):
    """They are averaged where no optimizer of torch's ever steps."""
    run = train(tmp_path, **stepping(change, **length))
    steps = 12 if length else 8
    check(run, steps)
    assert f'{steps} steps averaged, 0 skipped' in run.log
    assert 'did not change the weights' not in run.log


@pytest.mark.parametrize('change', [by_data, in_place, two_steps])
def test_accumulation_of_ones_own(tmp_path, change):
    """Iterations that change nothing do not count, also if nobody says so."""
    calls = []

    def every_third(model, backward):
        calls.append(0)
        if len(calls) % 3 == 0:
            change(model, backward)

    run = train(tmp_path, **stepping(every_third, iters=12))
    check(run, 4, KEYS, [2, 5, 8, 11])
    assert '4 steps averaged, 0 skipped (NaN or Inf), in 12' in run.log


class NewOptimizer(Hook):
    """Puts another optimizer in at an epoch, and thaws a layer."""

    def __init__(self, whole):
        self.whole = whole

    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            runner.model.frozen.requires_grad_(True)
            sgd = torch.optim.SGD(runner.model.parameters(), lr=0.002)
            if MMCV1:
                runner.optimizer = sgd
            elif self.whole:
                runner.optim_wrapper = type(runner.optim_wrapper)(sgd)
            else:
                runner.optim_wrapper.optimizer = sgd


@pytest.mark.parametrize('whole', [True] if MMCV1 else [True, False])
@pytest.mark.parametrize('priority', PRIORITIES)
def test_optimizer_that_is_replaced(tmp_path, priority, whole):
    """The steps of the new one count, and what it thaws is averaged."""
    ema = dict(EMA, priority=priority)
    run = train(tmp_path, NewOptimizer(whole), ema=ema, epochs=3)
    check(run, 12, [*ALL_KEYS, 'frozen.weight'])


class NewHead(Hook):
    """Puts another head in, in the middle of the training."""

    def __init__(self, size):
        self.size = size

    def before_train_iter(self, runner, *args, **kwargs):
        if runner.iter == 5:
            torch.manual_seed(3)
            runner.model.head = nn.Linear(4, self.size)
            group = dict(params=list(runner.model.head.parameters()))
            optimizer = (
                runner.optimizer if MMCV1 else runner.optim_wrapper.optimizer
            )
            optimizer.add_param_group(group)


@pytest.mark.parametrize('priority', PRIORITIES)
def test_module_that_is_replaced(tmp_path, priority):
    """By iterations, too, its average goes on with the new one at once."""
    ema = dict(EMA, priority=priority)
    run = train(tmp_path, NewHead(2), ema=ema, iters=12)
    check(run, 12)
    assert [] == same(run.records[-1], state_of(run.model))
    assert [] == same(run.load().raws, run.records[-1])
    line = 'head.weight and 1 more replaced in the model'
    assert 1 == run.log.count(line)


@pytest.mark.parametrize(
    'priority',
    [
        pytest.param('VERY_HIGH', marks=needs.told_of_steps),
        'VERY_LOW',
    ],
)
def test_module_of_another_shape(tmp_path, priority):
    """Its average starts from its weights before their first step."""
    ema = dict(EMA, priority=priority)
    run = train(tmp_path, NewHead(3), ema=ema, iters=12)
    weights = run.load().averages['head.weight']
    expected = run.before[5]['head.weight'].double().numpy()
    for n, state in enumerate(run.records[5:], 6):
        value = state['head.weight'].double().numpy()
        expected = ramp(n) * expected + (1 - ramp(n)) * value
    # float32 rounds each update to 6e-8 of the magnitude
    assert oracle.relative_error(weights, expected) < 1e-6


@pytest.mark.parametrize('change', [by_data, two_steps])
def test_overlap_ends_where_nobody_tells_of_steps(tmp_path, change):
    """The numbers are those without it, and one line says so."""
    runs = [
        train(
            tmp_path / str(overlap),
            ema=dict(EMA, overlap=overlap),
            **stepping(change),
        )
        for overlap in (True, False)
    ]
    left, right = (run.load().averages for run in runs)
    assert [] == same(left, right)
    check(runs[0], 8)
    assert 1 == runs[0].log.count('overlap=True has no effect')


@pytest.mark.parametrize('overlap', [True, False])
def test_two_step_optimizer_that_ends_in_a_step(tmp_path, overlap):
    """What it climbs before its step never enters an average."""

    def change(model, backward):
        old = [p.detach().clone() for p in trained(model)]
        with torch.no_grad():
            for parameter in trained(model):
                parameter.add_(parameter.grad, alpha=0.0001)
        backward()
        with torch.no_grad():
            for parameter, kept in zip(trained(model), old):
                parameter.copy_(kept)
        model.sgd.step()

    options = stepping(change)
    model = options['model']
    model.__dict__['sgd'] = torch.optim.SGD(trained(model), lr=0.002)
    run = train(tmp_path, ema=dict(EMA, overlap=overlap), **options)
    check(run, 8)
    assert int(overlap) == run.log.count('overlap=True has no effect')


def test_weights_that_stand_still_are_reported(tmp_path):
    """After 50 iterations, and at the end, with what to look at."""
    run = train(tmp_path, **stepping(nothing, iters=60))
    assert 1 == run.log.count('50 iterations in a row did not change')
    assert 1 == run.log.count('60 iterations in a row did not change')
    assert 'look at the learning rate' in run.log
    assert '0 steps averaged, 0 skipped (NaN or Inf), in 60' in run.log


def test_steps_are_told_after_the_first_epoch_and_at_the_end(tmp_path):
    """One line each: steps averaged, steps skipped, iterations."""
    run = train(tmp_path, epochs=3, accumulation=2)
    assert 2 == run.log.count('steps averaged')
    assert '2 steps averaged, 0 skipped (NaN or Inf), in 4 iter' in run.log
    assert '6 steps averaged, 0 skipped (NaN or Inf), in 12 iter' in run.log
    assert 'did not change the weights' not in run.log


def test_resumed_run_of_weights_that_no_optimizer_changes(tmp_path):
    """It equals the run that was not stopped, bit for bit."""
    whole = train(tmp_path / 'a', **stepping(by_data, epochs=3))
    train(tmp_path / 'b', **stepping(by_data, epochs=1))
    file = tmp_path / 'b' / 'epoch_1.pth'
    rest = train(tmp_path / 'b', **stepping(by_data, epochs=3, resume=file))
    left, right = whole.load(), rest.load()
    assert [] == same(left.averages, right.averages)
    assert [] == same(left.raws, right.raws)


class Scheduler(Hook):
    """Makes one of torch's own schedulers in the middle of the training."""

    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            optimizer = (
                runner.optimizer if MMCV1 else runner.optim_wrapper.optimizer
            )
            make = torch.optim.lr_scheduler.CosineAnnealingLR
            self.scheduler = make(optimizer, 5)

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.epoch == 1:
            self.scheduler.step()


def test_schedulers_of_torch(tmp_path):
    """They can be made at any time: ``optimizer.step`` is left as it is."""
    check(train(tmp_path, Scheduler()), 8)
