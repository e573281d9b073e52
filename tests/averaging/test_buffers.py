"""Buffers that no mean makes sense of, and tensors that change in training."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, prune

from mmdet_ema.averaging import OptionError, WeightAverager

NAN, INF = float('nan'), float('inf')
pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),
    pytest.mark.filterwarnings('ignore::FutureWarning'),
]


def train(model, averager, steps, seed=0, inputs=6):
    """Take steps; return the value of every tensor after each, float64."""
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(steps):
        # the optimizer of a model whose parameters may be other ones by now
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        sgd.zero_grad()
        model(torch.randn(8, inputs, generator=generator)).pow(
            2
        ).mean().backward()
        sgd.step()
        assert averager.update()
        seen.append(
            {
                name: value.detach().double().numpy().copy()
                for name, value in model.state_dict().items()
                if isinstance(value, torch.Tensor)
            }
        )
    return seen


def averages(averager):
    return {
        name: value.detach().double().numpy().copy()
        for name, value in averager.named_averages()
    }


def formula(start, values, decay):
    for value in values:
        start = decay * start + (1 - decay) * value
    return start


@pytest.mark.parametrize('device', [None, 'cpu'])
@pytest.mark.parametrize('overlap', [False, True])
def test_observers_that_change_their_shape(overlap, device):
    """A model prepared for quantization trains from the first step on."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).train()
    model.qconfig = quantization.get_default_qat_qconfig('x86')
    quantization.prepare_qat(model, inplace=True)
    averager = WeightAverager(
        model, 'constant', decay=0.9, overlap=overlap, device=device
    )
    start = averages(averager)
    averager.before_step()
    seen = []
    for step in range(5):
        averager.before_step()
        seen += train(model, averager, 1, step)
    found, last = averages(averager), seen[-1]
    assert found.keys() == last.keys()
    for name in ('0.weight', '2.bias'):
        wanted = formula(start[name], [state[name] for state in seen], 0.9)
        np.testing.assert_allclose(found[name], wanted, rtol=1e-6, atol=1e-7)
    for name in set(found) - {'0.weight', '0.bias', '2.weight', '2.bias'}:
        np.testing.assert_array_equal(last[name], found[name], name)
    assert (8,) == found['0.weight_fake_quant.scale'].shape


def test_buffer_that_grows_with_every_step():
    """A buffer of another shape after each step is followed."""
    model = nn.Linear(6, 2)
    model.register_buffer('memory', torch.ones(1))
    averager = WeightAverager(model, 'constant', decay=0.9)
    for step in range(4):
        if step % 2:
            model.memory = torch.cat([model.memory, torch.ones(1)])
        else:
            model.memory.resize_(len(model.memory) + 1).fill_(step)
        train(model, averager, 1, step)
        found = averages(averager)['memory']
        assert model.memory.tolist() == found.tolist()


@pytest.mark.parametrize('decay', [0.5, 0.999])
def test_unit_vectors_keep_their_length(decay):
    """The vectors of spectral norm are copied, and stay of length one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 32)),
        nn.utils.spectral_norm(nn.Linear(32, 2)),
    )
    averager = WeightAverager(model, 'constant', decay=decay)
    last = train(model, averager, 50)[-1]
    found = averages(averager)
    names = [name for name in found if name.endswith(('_u', '_v'))]
    assert 4 == len(names)
    for name in names:
        np.testing.assert_array_equal(last[name], found[name])
        assert abs(np.linalg.norm(found[name]) - 1) < 1e-5


@pytest.mark.parametrize('again', [False, True])
def test_pruned_layer_keeps_its_average(again):
    """Pruning in mid-run renames the weight; its average goes on.

    A second mask is copied as the first was: the zeros are those of the raw
    model.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    averager = WeightAverager(model, 'constant', decay=0.9)
    start = averages(averager)['0.weight']
    values = [state['0.weight'] for state in train(model, averager, 5)]
    for _ in range(1 + again):
        prune.l1_unstructured(model[0], 'weight', amount=0.5)
        averager.refresh()
        seen = train(model, averager, 5)
        values += [state['0.weight_orig'] for state in seen]
    found = averages(averager)
    wanted = formula(start, values, 0.9)
    np.testing.assert_allclose(
        found['0.weight_orig'], wanted, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(
        seen[-1]['0.weight_mask'], found['0.weight_mask']
    )
    with averager.applied():
        model(torch.ones(1, 6))
        zeros = (model[0].weight == 0).sum().item()
    assert (18 if again else 12) == zeros


def weight_norm(layer):
    """``torch.nn.utils.parametrizations.weight_norm``, where there is one."""
    if not hasattr(parametrizations, 'weight_norm'):
        pytest.skip('this torch has no such parametrization')
    return parametrizations.weight_norm(layer)


@pytest.mark.parametrize(
    'put_on', [parametrizations.spectral_norm, weight_norm]
)
def test_parametrized_in_training(put_on):
    """A layer that is parametrized in mid-run keeps the average it had."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    averager = WeightAverager(model, 'constant', decay=0.99)
    train(model, averager, 20)
    expected = averages(averager)['0.weight']
    put_on(model[0])
    averager.refresh()
    found = averages(averager)
    if put_on is weight_norm:
        size, direction = (
            found[f'0.parametrizations.weight.original{i}'] for i in (0, 1)
        )
        length = np.linalg.norm(direction, axis=1, keepdims=True)
        value = size * direction / length
    else:
        value = found['0.parametrizations.weight.original']
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    train(model, averager, 2)


def test_named_tensors_are_copied():
    """What ``copied`` names is the raw tensor after each step, exactly."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    averager = WeightAverager(
        model, 'constant', decay=0.9, copied=('1.running_*', '2.bias')
    )
    start = averages(averager)
    seen = train(model, averager, 5)
    found = averages(averager)
    for name in ('1.running_mean', '1.running_var', '2.bias'):
        np.testing.assert_array_equal(seen[-1][name], found[name])
    wanted = formula(
        start['2.weight'], [state['2.weight'] for state in seen], 0.9
    )
    np.testing.assert_allclose(found['2.weight'], wanted, rtol=1e-5)


def test_named_parameter_may_hold_inf():
    """A parameter that ``copied`` names makes no step bad."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    averager = WeightAverager(
        model, 'constant', decay=0.9, nonfinite='raise', copied=['1.bias']
    )
    model[1].bias.data[1] = -INF
    assert averager.update()
    assert -INF == averages(averager)['1.bias'][1]
    model[1].weight.data[0, 0] = NAN
    with pytest.raises(FloatingPointError, match=r'1\.weight'):
        averager.update()


def test_pattern_that_matches_nothing():
    """It is refused, with what names look like."""
    with pytest.raises(OptionError, match=r"copied=\['head\.\*'\]: no para"):
        WeightAverager(nn.Linear(2, 2), copied=['weight', 'head.*'])


@pytest.mark.parametrize('value', ['*.mask', None, [''], [1], {'a': 1}, True])
def test_bad_patterns(value):
    """Anything but a list of names is refused in one line."""
    with pytest.raises(OptionError, match=r'^copied=.* use a list of names'):
        WeightAverager(nn.Linear(2, 2), copied=value)


@pytest.mark.parametrize('update_buffers', [True, False])
def test_statistics_with_nan(update_buffers):
    """A batch with NaN spoils raw statistics for ever, not their average.

    Parameters that stay finite are averaged on.
    """
    model = nn.BatchNorm1d(3)
    averager = WeightAverager(
        model, 'constant', decay=0.9, update_buffers=update_buffers
    )
    model(torch.randn(8, 3))
    assert averager.update()
    kept = averages(averager)['running_mean']
    assert [] == averager.held_back()
    model(torch.full((8, 3), NAN))
    model.weight.data.fill_(2.0)
    for n in range(1, 4):
        assert averager.update()
        assert n + 1 == averager.num_updates
    found = averages(averager)
    np.testing.assert_array_equal(kept, found['running_mean'])
    np.testing.assert_allclose(found['weight'], 2 - 0.9**3, rtol=1e-6)
    assert 2 == found['num_batches_tracked']
    assert ['running_mean', 'running_var'] == averager.held_back()


def test_ignore_takes_statistics_in():
    """Under 'ignore' a buffer with NaN goes into its average."""
    model = nn.BatchNorm1d(3)
    averager = WeightAverager(model, nonfinite='ignore')
    model.running_mean[1] = NAN
    assert averager.update()
    assert [False, True, False] == np.isnan(
        averages(averager)['running_mean']
    ).tolist()
    assert [] == averager.held_back()


@pytest.mark.parametrize('update_buffers', [True, False])
def test_loaded_averages_outlive_raw_weights_that_are_nan(update_buffers):
    """Finite averages stay where the model holds NaN when they are loaded.

    That is what the run that was not stopped does.
    """

    def run():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
        averager = WeightAverager(
            model, 'constant', decay=0.9, update_buffers=update_buffers
        )
        return model, averager

    model, averager = run()
    train(model, averager, 3)
    model[0].weight.data.fill_(NAN)
    model[1].running_var.fill_(NAN)
    assert not averager.update()
    resumed, other = run()
    resumed.load_state_dict(model.state_dict())
    other = WeightAverager(
        resumed, 'constant', decay=0.9, update_buffers=update_buffers
    )
    other.load_state_dict(averager.state_dict())
    for each in (averager, other):
        assert not each.update()
    expected, found = averages(averager), averages(other)
    for name, value in expected.items():
        assert np.isfinite(value).all()
        np.testing.assert_array_equal(value, found[name])
    # and the averages go on where the weights recover
    for each, net in ((averager, model), (other, resumed)):
        net[0].weight.data.fill_(1.0)
        net[1].running_var.fill_(1.0)
        assert each.update()
    expected, found = averages(averager), averages(other)
    for name, value in expected.items():
        np.testing.assert_array_equal(value, found[name])


def test_loaded_averages_that_are_nan_start_again():
    """NaN in a loaded average gives way to the model's finite weights."""
    model = nn.Linear(2, 2)
    averager = WeightAverager(model, 'constant', decay=0.9)
    state = averager.state_dict()
    bad = torch.full((2, 2), NAN)
    state['averages'] = {**state['averages'], 'weight': bad}
    averager.load_state_dict(state)
    np.testing.assert_array_equal(
        averages(averager)['weight'], model.weight.detach().numpy()
    )
