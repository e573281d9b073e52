"""The hook's numbers, against the formula in NumPy float64."""

import numpy as np
import pytest

from tests import oracle
from tests.for_mmengine.toy import Run, loader


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
