"""The hook's numbers, against the formula in NumPy float64."""

import numpy as np
import pytest
import torch

from tests import needs, oracle
from tests.contract.toy import AVERAGED
from tests.for_mmengine.toy import Run, ToyModel, loader

# float32 rounds each of the 200 updates to 6e-8 of the magnitude
TOLERANCE = 1e-6


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


def test_average_starts_after_init_weights(tmp_path):
    """What the constructor put into the weights never enters the average."""
    hook = dict(type='EMAHook', schedule='constant', decay=0.999)
    run = Run(tmp_path, hook, max_epochs=1).train()
    start, values = run.trace('head.bias')
    expected = oracle.average(start, values, lambda n: 0.999)
    found = run.load('epoch_1.pth')['state_dict']['head.bias']
    assert np.allclose(start, [-0.7, 1.3])
    assert oracle.relative_error(found, expected) < TOLERANCE


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
