"""The hook's numbers, against the formula in NumPy float64."""

import numpy as np
import pytest
import torch
from torch import nn

from mmdet_ema.training.steps import TELLS_OF_STEPS
from tests import needs, oracle
from tests.for_mmengine.toy import Run, ToyModel, loader

# float32 rounds each of the 200 updates to 6e-8 of the magnitude
TOLERANCE = 1e-6
AVERAGED = [
    'low',
    'first.weight',
    'first.bias',
    'norm.weight',
    'norm.bias',
    'norm.running_mean',
    'norm.running_var',
    'tied.weight',
    'tied.bias',
    'head.weight',
    'head.bias',
]


def ramp(n):
    return oracle.ramp(n, 0.99, 30)


def errors(run, name, expected_of):
    """Largest relative error of each average in a checkpoint."""
    weights = run.load(name)['state_dict']
    return {
        key: oracle.relative_error(
            weights[key].double(), expected_of(*run.trace(key))
        )
        for key in AVERAGED
    }


def test_default_options_follow_rule_one_over_200_steps(tmp_path):
    """With no options the average is rule 1's, BatchNorm included."""
    run = Run(tmp_path, dict(type='EMAHook'), max_epochs=50).train()
    found = errors(
        run,
        'epoch_50.pth',
        lambda start, values: oracle.average(start, values, oracle.ramp),
    )
    assert len(run.records) == 200
    assert {k: v for k, v in found.items() if v > TOLERANCE} == {}


def test_ramp_options_follow_rule_one_over_200_steps(tmp_path):
    """A short ramp, which moves more, is averaged by the same formula."""
    hook = dict(type='EMAHook', decay=0.99, tau=30)
    run = Run(tmp_path, hook, max_epochs=50).train()
    found = errors(
        run,
        'epoch_50.pth',
        lambda start, values: oracle.average(start, values, ramp),
    )
    assert {k: v for k, v in found.items() if v > TOLERANCE} == {}


def test_counters_are_copied_exactly(tmp_path):
    """``num_batches_tracked`` of the average is the model's."""
    run = Run(tmp_path, dict(type='EMAHook'), max_epochs=3).train()
    saved = run.load('epoch_3.pth')
    key = 'norm.num_batches_tracked'
    assert saved['state_dict'][key] == torch.tensor(12)
    assert saved['ema_state_dict'][f'module.{key}'] == torch.tensor(12)


def test_tied_weights_are_averaged_once(tmp_path):
    """Both names of a tied weight hold one average, of one decay a step."""
    hook = dict(type='EMAHook', schedule='constant', decay=0.9)
    run = Run(tmp_path, hook, max_epochs=2).train()
    weights = run.load('epoch_2.pth')['state_dict']
    start, values = run.trace('first.weight')
    expected = oracle.average(start, values, lambda n: 0.9)
    assert torch.equal(weights['first.weight'], weights['tied.weight'])
    error = oracle.relative_error(weights['tied.weight'], expected)
    assert error < TOLERANCE


def test_bfloat16_is_averaged_in_float32(tmp_path):
    """A bfloat16 parameter has a float32 average, and stays bfloat16."""
    run = Run(tmp_path, dict(type='EMAHook'), max_epochs=1).train()
    saved = run.load('epoch_1.pth')
    assert saved['state_dict']['low'].dtype == torch.float32
    assert saved['ema_state_dict']['module.low'].dtype == torch.bfloat16
    assert run.model.low.dtype == torch.bfloat16


@pytest.mark.parametrize('schedule', ['exponential', 'constant'])
def test_interval_keeps_the_window(tmp_path, schedule):
    """Every fourth step takes the product of four decays."""
    hook = dict(type='EMAHook', schedule=schedule, decay=0.99, interval=4)
    run = Run(tmp_path, hook, max_epochs=50).train()

    def decay_of(n):
        return 0.99 if schedule == 'constant' else oracle.ramp(n, 0.99)

    found = errors(
        run,
        'epoch_50.pth',
        lambda start, values: oracle.average_every(start, values, decay_of, 4),
    )
    assert {k: v for k, v in found.items() if v > TOLERANCE} == {}


def test_accumulated_micro_batches_are_one_step(tmp_path):
    """With ``accumulative_counts=4`` only every fourth iteration counts."""
    hook = dict(type='EMAHook', decay=0.99, tau=30)
    run = Run(tmp_path, hook, max_epochs=200, accumulative_counts=4).train()
    found = errors(
        run,
        'epoch_200.pth',
        lambda start, values: oracle.average(start, values, ramp),
    )
    assert len(run.records) == 200
    assert run.load('epoch_200.pth')['ema_state_dict']['steps'] == 200
    assert {k: v for k, v in found.items() if v > TOLERANCE} == {}


def test_remainder_of_the_accumulation_is_a_step(tmp_path):
    """The framework steps at the last iteration too, and it counts."""
    options = dict(accumulative_counts=3, max_epochs=1)
    run = Run(tmp_path, dict(type='EMAHook'), **options).train()
    assert len(run.records) == 2
    assert run.load('epoch_1.pth')['ema_state_dict']['steps'] == 2


class ScaledWrapper:
    """mmengine's ``AmpOptimWrapper.step`` with a scaler that runs on CPU.

    ``AmpOptimWrapper`` itself refuses to be made without a GPU.
    """

    @staticmethod
    def build(optimizer, bad_iterations):
        from mmengine.optim import OptimWrapper

        class Wrapper(OptimWrapper):
            def __init__(self):
                super().__init__(optimizer)
                self.scaler = torch.amp.GradScaler('cpu', init_scale=4.0)

            def backward(self, loss, **kwargs):
                self._inner_count += 1
                bad = self._inner_count in bad_iterations
                loss = loss * (float('inf') if bad else 1.0)
                self.scaler.scale(loss).backward(**kwargs)

            def step(self, **kwargs):
                self.scaler.step(self.optimizer, **kwargs)
                self.scaler.update()

        return Wrapper()


@needs.cpu_scaler
def test_steps_that_the_scaler_skips_do_not_count(tmp_path):
    """An iteration whose gradients overflow leaves n and average alone."""
    model = ToyModel()
    hook = dict(type='EMAHook', decay=0.99, tau=30)
    run = Run(tmp_path, hook, model=model, max_epochs=10)
    run.runner.optim_wrapper = ScaledWrapper.build(run.optimizer, {2, 5, 40})
    run.train()
    found = errors(
        run,
        'epoch_10.pth',
        lambda start, values: oracle.average(start, values, ramp),
    )
    assert len(run.records) == 37
    assert run.load('epoch_10.pth')['ema_state_dict']['steps'] == 37
    assert {k: v for k, v in found.items() if v > TOLERANCE} == {}


class TwoOptimizers(ToyModel):
    """Steps one optimizer every iteration, the other every second one."""

    def train_step(self, data, optim_wrapper):
        data = self.data_preprocessor(data, True)
        self.calls = getattr(self, 'calls', 0) + 1
        losses = self._run_forward(data, mode='loss')
        loss, log = self.parse_losses(losses)
        optim_wrapper['a'].zero_grad()
        optim_wrapper['b'].zero_grad()
        loss.backward()
        optim_wrapper['a'].step()
        if self.calls % 2 == 0:
            optim_wrapper['b'].step()
        return log


def test_several_optimizers_count_once_an_iteration(tmp_path):
    """An iteration in which two optimizers step is one step."""
    from mmengine.optim import OptimWrapper, OptimWrapperDict

    model = TwoOptimizers()
    groups = [list(model.head.parameters()), list(model.first.parameters())]
    wrapper = OptimWrapperDict(
        a=OptimWrapper(torch.optim.SGD(groups[0], lr=0.01)),
        b=OptimWrapper(torch.optim.Adam(groups[1], lr=0.01)),
    )
    run = Run(tmp_path, dict(type='EMAHook'), model=model, max_epochs=2)
    run.runner.optim_wrapper = wrapper
    run.train()
    assert run.load('epoch_2.pth')['ema_state_dict']['steps'] == 8


def test_iteration_based_run_saves_the_update_of_its_last_step(tmp_path):
    """A checkpoint of iteration i holds the average of i steps."""
    run = Run(
        tmp_path,
        dict(type='EMAHook', priority='LOWEST'),
        train_cfg=dict(by_epoch=False, max_iters=6, val_interval=3),
        hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3)
        ),
    ).train()
    steps = [
        int(run.load(f'iter_{i}.pth')['ema_state_dict']['steps'])
        for i in (3, 6)
    ]
    assert steps == [3, 6]


@pytest.mark.parametrize(
    ('option', 'first'), [('begin_iter', 5), ('begin_epoch', 2)]
)
def test_average_begins_where_it_is_told(tmp_path, option, first):
    """``begin_iter=5`` and ``begin_epoch=2`` (of 4) average from step 5."""
    hook = dict(type='EMAHook', decay=0.9, tau=3)
    hook[option] = {'begin_iter': 5, 'begin_epoch': 2}[option]
    run = Run(tmp_path, hook, max_epochs=4).train()
    _, values = run.trace('head.weight')
    expected = oracle.average(
        values[3], values[4:], lambda n: oracle.ramp(n, 0.9, 3)
    )
    saved = run.load('epoch_4.pth')
    assert saved['ema_state_dict']['steps'] == 12
    error = oracle.relative_error(saved['state_dict']['head.weight'], expected)
    assert error < TOLERANCE


def test_before_it_begins_the_average_is_the_raw_weights(tmp_path):
    """A checkpoint from before ``begin_epoch`` holds the raw weights twice."""
    hook = dict(type='EMAHook', begin_epoch=2)
    run = Run(tmp_path, hook, max_epochs=2).train()
    saved = run.load('epoch_1.pth')
    raw = saved['ema_state_dict']
    assert raw['steps'] == 0
    assert all(
        torch.equal(value, raw[f'module.{key}'])
        for key, value in saved['state_dict'].items()
    )


def test_average_starts_after_init_weights(tmp_path):
    """What the constructor put into the weights never enters the average."""
    hook = dict(type='EMAHook', schedule='constant', decay=0.999)
    run = Run(tmp_path, hook, max_epochs=1).train()
    start, values = run.trace('head.bias')
    expected = oracle.average(start, values, lambda n: 0.999)
    found = run.load('epoch_1.pth')['state_dict']['head.bias']
    assert np.allclose(start, [-0.7, 1.3])
    assert oracle.relative_error(found, expected) < TOLERANCE


class Thawing(ToyModel):
    """Thaws its frozen layer in the third iteration."""

    def train_step(self, data, optim_wrapper):
        self.calls = getattr(self, 'calls', 0) + 1
        if self.calls == 3:
            self.frozen.requires_grad_(True)
        return super().train_step(data, optim_wrapper)


@pytest.mark.skipif(
    not TELLS_OF_STEPS,
    reason='torch before 2.0 does not tell before a step: what thaws within '
    'an iteration is averaged from after it',
)
def test_thawed_parameter_is_averaged_from_then_on(tmp_path):
    """A parameter frozen for two steps averages as if it never had been."""
    hook = dict(type='EMAHook', decay=0.9, tau=3)
    run = Run(tmp_path, hook, model=Thawing(), max_epochs=2).train()
    start, values = run.trace('frozen.weight')
    expected = oracle.average(start, values, lambda n: oracle.ramp(n, 0.9, 3))
    found = run.load('epoch_2.pth')['state_dict']['frozen.weight']
    assert not np.array_equal(start, values[-1])
    assert oracle.relative_error(found, expected) < TOLERANCE


class Uncopyable(nn.Module):
    """Like a sparse convolution or a process group."""

    def __deepcopy__(self, memo):
        raise RuntimeError('cannot be copied')


def test_module_that_cannot_be_copied_works(tmp_path):
    """The hook never deep-copies the model."""
    model = ToyModel()
    model.alien = Uncopyable()
    Run(tmp_path, dict(type='EMAHook'), model=model, max_epochs=1).train()
    assert (tmp_path / 'epoch_1.pth').exists()


def test_logged_scalars_are_decay_and_distance(tmp_path):
    """``ema_decay`` and ``ema_distance`` are what the weights say."""
    hook = dict(type='EMAHook', schedule='constant', decay=0.9)
    options = dict(train_dataloader=loader(4), max_epochs=1)
    run = Run(tmp_path, hook, **options).train()
    gap = size = 0.0
    for key in (
        'first.weight',
        'first.bias',
        'norm.weight',
        'norm.bias',
        'tied.bias',
        'head.weight',
        'head.bias',
        'low',
    ):
        start, values = run.trace(key)
        average = oracle.average(start, values, lambda n: 0.9)
        gap += float(((average - values[-1]) ** 2).sum())
        size += float((values[-1] ** 2).sum())
    assert run.scalar('train/ema_decay').tolist() == [0.9]
    # float32 averages against float64 ones
    assert run.scalar('train/ema_distance') == pytest.approx(
        [np.sqrt(gap / size)], rel=1e-4
    )
    assert run.scalar('train/ema_skipped').tolist() == [0]
