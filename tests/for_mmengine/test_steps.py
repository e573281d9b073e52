"""Every change of the weights is averaged once an iteration."""

import copy
import itertools

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn

from tests import needs, oracle
from tests.for_mmengine.toy import Run, ToyModel, loader, same, state_of

EMA = dict(type='EMAHook', decay=0.9, tau=3)
# float32 rounds each of up to 16 updates to 6e-8 of the magnitude
TOLERANCE = 1e-6
KEYS = ('first.weight', 'tied.bias', 'head.weight', 'norm.running_mean')
ITERATIONS = dict(
    train_dataloader=loader(64),
    train_cfg=dict(by_epoch=False, max_iters=12, val_interval=12),
    hooks=dict(
        checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=12)
    ),
)


class Trace(Hook):
    """Keeps the raw weights before and after every iteration."""

    priority = 'LOWEST'

    def __init__(self):
        self.before, self.after = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.before.append(state_of(runner.model))

    def after_train_iter(self, runner, batch_idx, **more):
        self.after.append(state_of(runner.model))

    def wrong(self, weights, chosen=None, keys=KEYS):
        """Names of the tensors that are not the average of some iterations."""
        after = self.after if chosen is None else chosen(self.after)
        found = []
        for key in keys:
            start = self.before[0][key].double().numpy()
            values = [state[key].double().numpy() for state in after]
            expected = oracle.average(
                start, values, lambda n: oracle.ramp(n, 0.9, 3)
            )
            moved = oracle.relative_error(values[-1], start) > 1e-4
            error = oracle.relative_error(weights[key], expected)
            found += [] if moved and error < TOLERANCE else [(key, error)]
        return found


def train(folder, *hooks, ema=EMA, **options):
    trace = Trace()
    run = Run(folder, ema, *hooks, trace, **options).train()
    run.trace = trace
    return run


def log_of(run):
    return max(run.work_dir.glob('*/*.log')).read_text()


class Stepping(ToyModel):
    """Changes its weights itself, as ``change`` says."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def train_step(self, data, optim_wrapper):
        data = self.data_preprocessor(data, True)

        def backward():
            self.zero_grad()
            self._run_forward(data, mode='loss')['loss'].backward()

        backward()
        self.change(self, backward)
        return dict(loss=torch.zeros(()))


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


@pytest.mark.parametrize('change', [by_data, in_place, two_steps])
@pytest.mark.parametrize('options', [{}, ITERATIONS], ids=['epochs', 'iters'])
def test_weights_that_no_optimizer_changes(tmp_path, change, options):
    """They are averaged where no optimizer of torch's ever steps."""
    run = train(tmp_path, model=Stepping(change), **options)
    name = 'iter_12.pth' if options else 'epoch_2.pth'
    saved = run.load(name)
    steps = len(run.trace.after)
    assert steps == int(saved['ema_state_dict']['steps'])
    assert run.trace.wrong(saved['state_dict']) == []
    assert f'{steps} steps averaged, 0 skipped' in log_of(run)
    assert 'did not change the weights' not in log_of(run)


@pytest.mark.parametrize('change', [by_data, in_place, two_steps])
def test_accumulation_of_ones_own(tmp_path, change):
    """Iterations that change nothing do not count, also if nobody says so."""
    calls = itertools.count(1)

    def every_third(model, backward):
        if next(calls) % 3 == 0:
            change(model, backward)

    run = train(tmp_path, model=Stepping(every_third), **ITERATIONS)
    saved = run.load('iter_12.pth')
    assert int(saved['ema_state_dict']['steps']) == 4
    keys = ('first.weight', 'tied.bias', 'head.weight')
    wrong = run.trace.wrong(
        saved['state_dict'], lambda after: after[2::3], keys
    )
    assert wrong == []
    assert '4 steps averaged, 0 skipped (NaN or Inf), in 12' in log_of(run)


class Swap(Hook):
    """Puts another optimizer in at an epoch, and thaws a layer."""

    def __init__(self, early):
        self.priority = 'VERY_HIGH' if early else 'VERY_LOW'

    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            runner.model.frozen.requires_grad_(True)
            sgd = torch.optim.SGD(runner.model.parameters(), lr=0.003)
            if self.priority == 'VERY_LOW':
                runner.optim_wrapper.optimizer = sgd
            else:
                runner.optim_wrapper = OptimWrapper(sgd)


@pytest.mark.parametrize('early', [True, False])
def test_optimizer_that_is_replaced(tmp_path, early):
    """The steps of the new one count, and what it thaws is averaged."""
    run = train(tmp_path, Swap(early), max_epochs=3)
    saved = run.load('epoch_3.pth')
    assert int(saved['ema_state_dict']['steps']) == 12
    keys = (*KEYS, 'frozen.weight')
    assert run.trace.wrong(saved['state_dict'], keys=keys) == []


class NewHead(Hook):
    """Puts another head in, in the middle of the training."""

    def __init__(self, size, priority, at=5):
        self.size, self.priority, self.at = size, priority, at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            torch.manual_seed(3)
            runner.model.head = nn.Linear(4, self.size)
            optimizer = runner.optim_wrapper.optimizer
            group = dict(params=list(runner.model.head.parameters()))
            optimizer.add_param_group(group)


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'VERY_LOW'])
def test_module_that_is_replaced(tmp_path, priority):
    """By iterations, too, its average goes on with the new one at once."""
    run = train(tmp_path, NewHead(2, priority), **ITERATIONS)
    saved = run.load('iter_12.pth')
    assert run.trace.wrong(saved['state_dict']) == []
    assert same(run.trace.after[-1], state_of(run.model)) == []
    text = log_of(run)
    assert text.count('head.weight and 1 more replaced in the model') == 1


@pytest.mark.parametrize(
    'priority',
    ['VERY_HIGH', pytest.param('VERY_LOW', marks=needs.told_of_steps)],
)
def test_module_of_another_shape(tmp_path, priority):
    """Its average starts from its weights before their first step."""
    run = train(tmp_path, NewHead(3, priority), **ITERATIONS)
    weights = run.load('iter_12.pth')['state_dict']['head.weight']
    expected = run.trace.before[5]['head.weight'].double().numpy()
    for n, state in enumerate(run.trace.after[5:], 6):
        value = state['head.weight'].double().numpy()
        decay = oracle.ramp(n, 0.9, 3)
        expected = decay * expected + (1 - decay) * value
    assert oracle.relative_error(weights, expected) < TOLERANCE


class Late(Hook):
    """Steps after the average's turn, with an optimizer of its own."""

    priority = 'VERY_LOW'

    def after_train_iter(self, runner, batch_idx, **more):
        descend(runner.model)


def test_hook_that_steps_after_ours(tmp_path):
    """Its changes are averaged in the iteration that they belong to."""
    model = Stepping(lambda model, backward: None)
    run = train(tmp_path, Late(), model=model, **ITERATIONS)
    saved = run.load('iter_12.pth')
    # the file is written before the hook's last turn
    assert int(saved['ema_state_dict']['steps']) == 11
    averager = run.hook._life.averager
    assert averager.num_steps == 12
    averages = {k: v.clone() for k, v in averager.named_averages()}
    keys = ('first.weight', 'tied.bias', 'head.weight')
    assert run.trace.wrong(averages, keys=keys) == []


class Adversaries(BaseModel):
    """Two parts that are trained in turn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.maker, self.critic = nn.Linear(4, 4), nn.Linear(4, 1)
        self.calls = 0

    def forward(self, inputs, mode='tensor'):
        out = self.critic(self.maker(inputs))
        return [dict(out=row) for row in out]

    def train_step(self, data, optim_wrapper):
        inputs = self.data_preprocessor(data, True)['inputs']
        self.calls += 1
        for name in ('critic', 'maker')[: 1 + (self.calls % 2)]:
            loss = self.critic(self.maker(inputs)).square().mean()
            optim_wrapper[name].update_params(loss)
        return dict(loss=loss.detach())


def test_several_optimizers(tmp_path):
    """One or several that step in an iteration are one update."""
    model = Adversaries()
    wrappers = {
        name: OptimWrapper(
            torch.optim.SGD(getattr(model, name).parameters(), lr=0.05)
        )
        for name in ('maker', 'critic')
    }
    wrapper = OptimWrapperDict(**wrappers)
    run = train(tmp_path, model=model, optim_wrapper=wrapper)
    saved = run.load('epoch_2.pth')
    assert int(saved['ema_state_dict']['steps']) == 8
    keys = ('maker.weight', 'critic.weight')
    assert run.trace.wrong(saved['state_dict'], keys=keys) == []


@pytest.mark.parametrize('change', [by_data, two_steps])
def test_overlap_ends_where_nobody_tells_of_steps(tmp_path, change):
    """The numbers are those without it, and one line says so."""
    runs = [
        train(
            tmp_path / str(overlap),
            ema=dict(EMA, overlap=overlap),
            model=Stepping(change),
        )
        for overlap in (True, False)
    ]
    left, right = (run.load('epoch_2.pth') for run in runs)
    assert same(left['state_dict'], right['state_dict']) == []
    assert runs[0].trace.wrong(left['state_dict']) == []
    assert log_of(runs[0]).count('overlap=True has no effect') == 1


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

    model = Stepping(change)
    model.__dict__['sgd'] = torch.optim.SGD(trained(model), lr=0.002)
    run = train(tmp_path, ema=dict(EMA, overlap=overlap), model=model)
    saved = run.load('epoch_2.pth')
    assert int(saved['ema_state_dict']['steps']) == 8
    assert run.trace.wrong(saved['state_dict']) == []
    assert log_of(run).count('overlap=True has no effect') == int(overlap)


def test_weights_that_stand_still_are_reported(tmp_path):
    """After 50 iterations, and at the end, with what to look at."""
    model = Stepping(lambda model, backward: None)
    settings = copy.deepcopy(ITERATIONS)
    settings['train_cfg'].update(max_iters=60, val_interval=60)
    run = train(tmp_path, model=model, **settings)
    text = log_of(run)
    assert text.count('50 iterations in a row did not change') == 1
    assert text.count('60 iterations in a row did not change') == 1
    assert 'look at the learning rate' in text
    assert '0 steps averaged, 0 skipped (NaN or Inf), in 60' in text


def test_steps_are_told_after_the_first_epoch_and_at_the_end(tmp_path):
    """One line each: steps averaged, steps skipped, iterations."""
    run = train(tmp_path, max_epochs=3, accumulative_counts=2)
    text = log_of(run)
    assert text.count('steps averaged') == 2
    assert '2 steps averaged, 0 skipped (NaN or Inf), in 4 iter' in text
    assert '6 steps averaged, 0 skipped (NaN or Inf), in 12 iter' in text
    assert 'did not change the weights' not in text


def test_resumed_run_of_weights_that_no_optimizer_changes(tmp_path):
    """It equals the run that was not stopped, bit for bit."""
    whole = train(tmp_path / 'a', model=Stepping(by_data), max_epochs=3)
    train(tmp_path / 'b', model=Stepping(by_data), max_epochs=1)
    rest = train(
        tmp_path / 'b', model=Stepping(by_data), max_epochs=3, resume=True
    )
    left, right = (run.load('epoch_3.pth') for run in (whole, rest))
    for part in ('state_dict', 'ema_state_dict'):
        assert same(left[part], right[part]) == []
