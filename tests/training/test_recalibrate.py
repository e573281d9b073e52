"""BatchNorm statistics from batches of data, against NumPy in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from mmdet_ema.training.recalibrate import (
    batch_statistics,
    first_batches,
    is_better,
)
from tests.toy import same, state_of


class Model(nn.Module):
    """Two layers to estimate, one that is frozen, one without statistics."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.BatchNorm2d(3).eval()
        self.first = nn.BatchNorm2d(3)
        self.second = nn.BatchNorm2d(3)
        self.none = nn.BatchNorm2d(3, track_running_stats=False)
        self.unused = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        nn.init.uniform_(self.first.weight)
        nn.init.uniform_(self.frozen.running_mean)
        self.calls, self.modes = [], []

    def forward(self, x):
        self.calls.append(len(x))
        self.modes.append((self.training, self.drop.training))
        assert not torch.is_grad_enabled()
        x = self.first(self.frozen(x))
        return self.none(self.second(self.drop(x).relu()) + torch.rand(()))


def batches():
    """Of other sizes, in samples and pixels, far from zero."""
    draw = np.random.RandomState(0)
    shapes = [(2, 3, 4, 5), (7, 3, 2, 3), (1, 3, 8, 8)]
    return [100 + draw.randn(*shape) * draw.rand() for shape in shapes]


def values_of(x):
    """All values of a channel in a row."""
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)


def expected(data, model):
    """Statistics of all values that the two layers see."""

    def column(parameter):
        return parameter.detach().numpy().reshape(-1, 1)

    seen = {'first': [], 'second': []}
    for x in data:
        # what is frozen has its own mean and a variance of 1
        x = values_of(x) - column(model.frozen.running_mean)
        x /= np.sqrt(1 + model.frozen.eps)
        seen['first'].append(x)
        x = x - x.mean(1, keepdims=True)
        # a layer normalises each batch by the batch's own statistics
        x /= np.sqrt((x**2).mean(1, keepdims=True) + model.first.eps)
        x = x * column(model.first.weight) + column(model.first.bias)
        seen['second'].append(np.maximum(x, 0))
    found = {}
    for name, parts in seen.items():
        together = np.concatenate(parts, axis=1)
        found[f'{name}.running_mean'] = together.mean(1)
        found[f'{name}.running_var'] = together.var(1, ddof=1)
    return found


@pytest.mark.parametrize(
    ('dtype', 'tolerance'),
    # the float32 sums are exact to what the inputs are
    [(torch.float64, 1e-10), (torch.float32, 1e-4)],
)
def test_statistics(dtype, tolerance):
    """Every value counts once, however unequal the batches are."""
    model, data = Model().to(dtype), batches()
    inputs = [torch.from_numpy(x).to(dtype) for x in data]
    found = batch_statistics(model, inputs, model)
    oracle = expected(data, model.double())
    assert oracle.keys() == found.keys()
    for name, value in oracle.items():
        assert found[name].dtype == torch.float64
        np.testing.assert_allclose(found[name], value, rtol=tolerance)


def test_no_trace():
    """Weights, buffers, modes, hooks and random numbers are as before."""
    model = Model()
    before, modes = state_of(model), [m.training for m in model.modules()]
    inputs = [torch.from_numpy(x).float() for x in batches()]
    torch.manual_seed(0)
    after = torch.rand(3)
    torch.manual_seed(0)
    seen = []

    def forward(batch):
        model(batch)
        seen.extend(model.modes)

    batch_statistics(model, inputs, forward)
    assert torch.equal(after, torch.rand(3))
    assert [] == same(before, state_of(model))
    assert modes == [m.training for m in model.modules()]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert {(True, False)} == set(seen)  # without dropout
    assert [] == model.calls


def test_a_forward_that_fails():
    """Leaves no trace either."""
    model = Model()
    before = state_of(model)

    def forward(batch):
        model(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch_statistics(model, [torch.rand(2, 3, 2, 2)], forward)
    assert [] == same(before, state_of(model))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layer_that_is_called_twice_and_one_that_is_the_model():
    """One estimate over all calls; its names have no prefix."""
    layer = nn.BatchNorm1d(2)
    x = torch.randn(6, 2, dtype=torch.float64)
    found = batch_statistics(
        layer.double(), [x], lambda x: (layer(x[:4]), layer(x[4:]))
    )
    np.testing.assert_allclose(found['running_mean'], x.numpy().mean(0))
    variance = x.numpy().var(0, ddof=1)
    np.testing.assert_allclose(found['running_var'], variance)


def test_no_more_batches_are_taken():
    """A loader is asked for as many batches as are wanted, not before."""
    taken = []

    class Loader:
        def __iter__(self):
            for i in range(9):
                taken.append(i)
                yield i

    batches = first_batches(Loader(), 3)
    assert [] == taken
    assert [0, 1, 2] == [*batches] == taken


@pytest.mark.parametrize(
    ('before', 'after', 'greater', 'better'),
    [
        (1.0, 2.0, True, True),
        (1.0, 2.0, False, False),
        (2.0, 1.0, False, True),
        (1.0, 1.0, True, False),
        (float('nan'), 1.0, True, True),
        (1.0, float('nan'), False, False),
    ],
)
def test_is_better(before, after, greater, better):
    """NaN is worse than anything, and equal is not better."""
    assert better is is_better(before, after, greater)
