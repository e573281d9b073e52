"""The hook's numbers, against the formula in NumPy float64."""

import numpy as np
import pytest
import torch

from tests import needs, oracle
from tests.contract import toy as contract
from tests.for_mmengine.toy import Run, loader


def ramp(n):
    return oracle.ramp(n, 0.99, 30)


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
    hook = dict(type='EMAHook', decay=0.99, tau=30)
    run = contract.Run(tmp_path, hook, epochs=10)
    wrapper = ScaledWrapper.build(run.toy.optimizer, {2, 5, 40})
    run.toy.runner.optim_wrapper = wrapper
    saved = run.train().load()
    assert 37 == len(run.records) == saved.steps
    assert {} == run.wrong(saved, ramp)


def test_average_starts_after_init_weights(tmp_path):
    """What the constructor put into the weights never enters the average."""
    hook = dict(type='EMAHook', schedule='constant', decay=0.999)
    run = Run(tmp_path, hook, max_epochs=1).train()
    assert np.allclose(run.recorder.start['head.bias'], [-0.7, 1.3])
    weights = run.load('epoch_1.pth')['state_dict']
    assert {} == run.wrong(weights, lambda n: 0.999)


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
