"""Steps, not iterations, whatever mmcv's hooks do with the optimizer."""

import math

import pytest
import torch
from mmcv.runner import (
    Fp16OptimizerHook,
    GradientCumulativeOptimizerHook,
    OptimizerHook,
)
from mmcv.runner.hooks.optimizer import GradientCumulativeFp16OptimizerHook

from tests.contract import test_steps as contract
from tests.contract.test_steps import by_data, in_place, two_steps
from tests.for_mmcv1.test_orders import wrong
from tests.for_mmcv1.toy import (
    EMA,
    RecordingSGD,
    Run,
    ToyModel,
    loader,
    raw_of,
    same,
)

STEPS = 'num_steps'


def meta_of(run, name):
    message = run.load(name)['meta']['hook_msgs']['EMAHook']
    return message['ema_meta']


def check(run, steps, name='epoch_2.pth', decay_of=None):
    """The file has the average of the steps that were taken."""
    saved = run.load(name)
    assert steps == len(run.records) == meta_of(run, name)[STEPS]
    if decay_of is None:
        assert [] == wrong(run, saved['state_dict'], steps)
    else:
        assert {} == run.wrong(saved['state_dict'], decay_of)
    assert [] == same(raw_of(saved), run.records[-1])


class DistOptimizerHook(OptimizerHook):
    """Accumulates as the hooks of that name in many projects."""

    def __init__(self, update_interval=1):
        super().__init__()
        self.update_interval = update_interval

    def after_train_iter(self, runner):
        (runner.outputs['loss'] / self.update_interval).backward()
        if self.every_n_iters(runner, self.update_interval):
            runner.optimizer.step()
            runner.optimizer.zero_grad()


OPTIMIZER_HOOKS = [
    (lambda: OptimizerHook(grad_clip=dict(max_norm=0.1)), 8),
    (lambda: OptimizerHook(detect_anomalous_params=True), 8),
    (lambda: GradientCumulativeOptimizerHook(cumulative_iters=2), 4),
    (lambda: GradientCumulativeOptimizerHook(cumulative_iters=3), 3),
    (lambda: DistOptimizerHook(update_interval=2), 4),
    (lambda: Fp16OptimizerHook(loss_scale='dynamic'), 8),
    (lambda: Fp16OptimizerHook(grad_clip=dict(max_norm=0.1)), 8),
    (lambda: GradientCumulativeFp16OptimizerHook(cumulative_iters=3), 3),
]


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'NORMAL', 'VERY_LOW'])
@pytest.mark.parametrize(('make', 'steps'), OPTIMIZER_HOOKS)
def test_optimizer_hooks(make, steps, priority, tmp_path):
    """Micro-batches of an accumulation are no steps; what is left over is."""
    hook = dict(EMA, priority=priority)
    run = Run(tmp_path, hook, optimizer_config=make()).train()
    check(run, steps)


class Overflowing:
    """A gradient scaler that finds Inf in some steps, as on a GPU."""

    def __init__(self, skipped):
        self.calls, self.skipped = 0, skipped

    def scale(self, loss):
        return loss

    def unscale_(self, optimizer):
        pass

    def step(self, optimizer):
        self.calls += 1
        if self.calls not in self.skipped:
            optimizer.step()

    def update(self, scale):
        pass

    def state_dict(self):
        return {}


def test_steps_that_the_scaler_skips_do_not_count(tmp_path):
    """A step without ``optimizer.step()`` is none."""
    hook = Fp16OptimizerHook()
    hook.loss_scaler = Overflowing({1, 4})
    run = Run(tmp_path, EMA, optimizer_config=hook).train()
    check(run, 6)


@pytest.mark.parametrize(
    'config',
    [
        dict(lr=dict(policy='step', step=[1])),
        dict(lr=dict(policy='poly', power=0.9)),
        dict(lr=dict(policy='CosineAnnealing', min_lr=0)),
        dict(lr=dict(policy='cyclic'), momentum=dict(policy='cyclic')),
    ],
)
def test_schedules_of_lr_and_momentum(config, tmp_path):
    """Schedules of mmcv change the optimizer only; the average follows."""
    run = Run(tmp_path, EMA, **config).train()
    check(run, 8)


class TwoOptimizers(OptimizerHook):
    """Steps one of two optimizers at odd iterations, both at even ones."""

    def after_train_iter(self, runner):
        for optimizer in runner.optimizer.values():
            optimizer.zero_grad()
        runner.outputs['loss'].backward()
        runner.optimizer['head'].step()
        if runner.iter % 2:
            runner.optimizer['rest'].step()


def test_several_optimizers_step_once_an_iteration(tmp_path):
    """An iteration in which any optimizer stepped counts once."""
    model = ToyModel()
    head = list(model.head.parameters())
    others = {id(p) for p in head}
    rest = [p for p in model.parameters() if id(p) not in others]
    optimizers = dict(
        head=RecordingSGD(head, lr=0.002).watch(model),
        rest=torch.optim.SGD(rest, lr=0.002),
    )
    run = Run(
        tmp_path,
        EMA,
        model=model,
        optimizers=optimizers,
        optimizer_config=TwoOptimizers(),
    ).train()
    assert 8 == meta_of(run, 'epoch_2.pth')[STEPS]
    assert 8 == len(optimizers['head'].records)


@pytest.mark.parametrize(
    'make',
    [
        lambda: GradientCumulativeOptimizerHook(cumulative_iters=2),
        lambda: DistOptimizerHook(update_interval=2),
    ],
)
def test_accumulation_is_known(make, tmp_path):
    """The plan has the steps that will be taken, not the iterations."""
    hook = dict(type='EMAHook', decay='auto')
    epochs = dict(max_epochs=10)
    run = Run(tmp_path, hook, optimizer_config=make(), runner=epochs).train()
    check(run, 20, 'epoch_10.pth', lambda n: 0.5 * (1 - math.exp(-n)))
    assert 8 == meta_of(run, 'epoch_10.pth')['batch_size']


def test_batch_size_is_known(tmp_path):
    """What a resume compares is that of the loader that is read in turns."""
    runner = dict(type='IterBasedRunner', max_iters=8)
    run = Run(tmp_path, EMA, loader=loader(batch=8), runner=runner).train()
    assert 8 == meta_of(run, 'iter_8.pth')['batch_size']


class OwnSteps(OptimizerHook):
    """Changes the weights itself when it is the optimizer's turn."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def after_train_iter(self, runner):
        def backward():
            runner.model.zero_grad()
            runner.model(**runner.data_batch).backward()

        backward()
        self.change(runner.model, backward)


@pytest.mark.parametrize('change', [by_data, in_place, two_steps])
@pytest.mark.parametrize('priority', ['VERY_HIGH', 'NORMAL', 'VERY_LOW'])
def test_weights_that_no_optimizer_changes(priority, change, tmp_path):
    """Both steps of a two-step optimizer are one update, in any order."""
    hook = dict(EMA, priority=priority)
    run = contract.train(tmp_path, ema=hook, optimizer_config=OwnSteps(change))
    contract.check(run, 8)
    told = '4 steps averaged, 0 skipped (NaN or Inf), in 4 iterations.'
    assert told in run.log
    assert 2 == run.log.count('steps averaged')
    assert 'did not change' not in run.log
