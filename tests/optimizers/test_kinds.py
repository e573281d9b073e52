"""What kind of parameter a parameter is."""

import pytest
import torch
from torch import nn

from mmdet_ema.optimizers.kinds import walk
from tests.optimizers.models import KINDS, Tied, Zoo


class Deformable(nn.Conv2d):
    """Stands for a deformable convolution with its offset layer."""

    def __init__(self):
        super().__init__(4, 4, 3)
        self.conv_offset = nn.Conv2d(4, 18, 3)


def kinds(model, *dcn_types):
    """Return the kind of each parameter by name."""
    return {p.name: p.kind for p in walk(model, dcn_types)}


def test_kinds():
    """Every sort of parameter has the kind that was written down by hand."""
    assert KINDS == kinds(Zoo())


def test_names_are_torch_s():
    """Names and order are those of named_parameters, tied ones once."""
    for model in (Zoo(), Tied(), nn.Linear(2, 2)):
        named = [name for name, _ in model.named_parameters()]
        assert sorted(named) == sorted(p.name for p in walk(model, ()))


def test_tied_once():
    """A tied tensor comes once, under the first of its names."""
    found = list(walk(Tied(), ()))
    assert len(found) == len({id(p.tensor) for p in found})
    names = [p.name for p in found]
    assert 'first.weight' in names
    assert 'second.weight' not in names
    assert 'shared.0.weight' not in names


def test_a_table_of_biases_is_no_bias():
    """Neither a position table nor a plural counts as a bias."""
    model = nn.Module()
    model.attention_biases = nn.Parameter(torch.zeros(4, 9))
    model.relative_position_bias_table = nn.Parameter(torch.zeros(9, 4))
    assert {'other'} == set(kinds(model).values())


def test_offsets_of_deformable_convolutions():
    """The bias of an offset layer is none of the biases that are warmed."""
    expected = {
        'weight': 'weight',
        'bias': 'bias',
        'conv_offset.weight': 'weight',
        'conv_offset.bias': 'other',
    }
    assert expected == kinds(Deformable(), Deformable)
    assert 'bias' == kinds(Deformable())['conv_offset.bias']


def test_vectors_named_weight():
    """One dimension is too few for a weight that is decayed."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(4))
    model.other_weight = nn.Parameter(torch.zeros(4, 1))
    assert {'weight': 'other', 'other_weight': 'weight'} == kinds(model)


@pytest.mark.parametrize(
    ('name', 'shape', 'kind'),
    [
        ('LayerNorm2d', (1, 4, 1, 1), 'norm'),
        ('LayerNorm_3D', (4, 8, 8), 'norm'),
        ('SwitchNormalization', (4, 1), 'norm'),
        ('RMSNorm', (4,), 'norm'),
        ('NormedHead', (4,), 'norm'),
        ('NormedHead', (4, 4), 'weight'),
        ('LayerNormLinear', (4, 4), 'weight'),
        ('Head', (4, 4), 'weight'),
    ],
)
def test_norms_by_the_name_of_their_class(name, shape, kind):
    """A class whose name ends with norm is one, whatever the shape."""
    module = type(name, (nn.Module,), {})()
    module.weight = nn.Parameter(torch.ones(shape))
    assert {'weight': kind} == kinds(module)


@pytest.mark.filterwarnings('ignore:.*weight_norm. is deprecated')
@pytest.mark.parametrize(
    ('layer', 'name'),
    [
        (nn.Linear(3, 4), 'weight'),
        (nn.Conv2d(3, 4, 1), 'weight'),
        (nn.LSTM(3, 4), 'weight_hh_l0'),
    ],
)
def test_magnitudes_of_weight_normalization(layer, name):
    """The magnitude of a normalized weight is a norm, its direction not."""
    found = kinds(nn.utils.weight_norm(layer, name))
    assert 'norm' == found[f'{name}_g']
    assert 'weight' == found[f'{name}_v']
    assert 1 == list(found.values()).count('norm')


def test_magnitudes_of_parametrized_weights():
    """The same for the parametrization that replaced it in torch 2."""
    utils = nn.utils.parametrizations
    if not hasattr(utils, 'weight_norm'):
        pytest.skip('torch before 2.1')
    found = kinds(utils.weight_norm(nn.Linear(3, 4)))
    expected = {
        'bias': 'bias',
        'parametrizations.weight.original0': 'norm',
        'parametrizations.weight.original1': 'weight',
    }
    assert expected == found


class Sum(nn.Module):
    """A weight as the sum of two."""

    def forward(self, left, right):
        return left + right

    def right_inverse(self, weight):
        return weight / 2, weight / 2


def test_other_parametrizations_have_no_magnitude():
    """The first of two summands of a weight is a weight."""
    layer = nn.Linear(3, 4, bias=False)
    nn.utils.parametrize.register_parametrization(layer, 'weight', Sum())
    assert ['weight', 'weight'] == list(kinds(layer).values())
