"""Groups of a model: their names, order, rates and members."""

import pytest
import torch
from torch import nn

from mmdet_ema.errors import OptionError
from mmdet_ema.optimizers.groups import group_parameters, param_groups
from mmdet_ema.optimizers.paramwise import parse_paramwise
from mmdet_ema.optimizers.rules import MMCV1, MMENGINE
from tests.optimizers.models import KINDS, Tied, Zoo

DIALECTS = pytest.mark.parametrize('dialect', [MMENGINE, MMCV1])
LR, DECAY = 0.01, 5e-4


def groups_of(model, dialect=MMENGINE, **cfg):
    """Return the groups of a model for an optimizer."""
    groups = group_parameters(model, parse_paramwise(cfg), dialect)
    return param_groups(groups, LR, DECAY)


def table(model, dialect=MMENGINE, **cfg):
    """Return name -> (group, lr, weight decay)."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group['name'], group['lr'], group['weight_decay'])
        for group in groups_of(model, dialect, **cfg)
        for p in group['params']
    }


@DIALECTS
def test_default_groups(dialect):
    """Weights have weight decay, norms, biases and the rest have none."""
    expected = {
        name: (kind, LR, DECAY if kind == 'weight' else 0.0)
        for name, kind in KINDS.items()
    }
    assert expected == table(Zoo(), dialect)


@DIALECTS
@pytest.mark.parametrize('model', [Zoo(), Tied()])
def test_each_parameter_once(model, dialect):
    """Every parameter is in one group, tied and frozen ones too."""
    cfg = dict(custom_keys=dict(first=dict(lr_mult=0.1)), bias_lr_mult=2)
    groups = groups_of(model, dialect, **cfg)
    members = [id(p) for group in groups for p in group['params']]
    assert len(members) == len(set(members))
    assert set(members) == {id(p) for p in model.parameters()}
    torch.optim.SGD(groups, lr=LR)  # torch refuses one in two groups


def test_few_groups_in_a_fixed_order():
    """Alike parameters share a group; those of the base rate come first."""
    keys = dict(
        stem=dict(lr_mult=0.1), memory=dict(lr_mult=0.1, decay_mult=0.5)
    )
    groups = groups_of(Zoo(), custom_keys=keys)
    assert [
        'weight',
        'weight lr*0.1',
        'weight lr*0.1 decay*0.5',
        'norm',
        'norm lr*0.1',
        'bias',
        'bias lr*0.1',
        'bias lr*0.1 decay*0.5',
        'other',
    ] == [group['name'] for group in groups]


def test_freezing_changes_no_group():
    """How much is frozen changes no group, so that a state can be resumed."""
    model = Zoo()
    before = table(model)
    model.stem.requires_grad_(False)
    model.stem_norm.requires_grad_(False)
    assert before == table(model)


def test_equal_factors_share_a_group():
    """0 and 0.0 are one factor."""
    keys = dict(stem=dict(decay_mult=0), queries=dict(decay_mult=0.0))
    names = [g['name'] for g in groups_of(Zoo(), custom_keys=keys)]
    assert 1 == sum('decay*' in name and 'weight' in name for name in names)


def test_longest_key_wins():
    """Of the keys in a name the longest decides, then the alphabet."""
    model = nn.Sequential()
    model.add_module('backbone', nn.Linear(2, 2))
    keys = dict(
        back=dict(lr_mult=2.0),
        bone=dict(lr_mult=3.0),
        backbon=dict(lr_mult=4.0),
    )
    assert {4.0 * LR} == {
        row[1] for row in table(model, custom_keys=keys).values()
    }
    del keys['backbon']
    assert {2.0 * LR} == {
        row[1] for row in table(model, custom_keys=keys).values()
    }


def test_root_parameters_match_a_leading_dot():
    """A key may ask for a whole name part, as the frameworks' keys do."""
    keys = {'.token': dict(lr_mult=0.5)}
    rows = table(Zoo(), custom_keys=keys)
    assert {'token'} == {n for n, row in rows.items() if row[1] != LR}


def test_key_without_decay_keeps_the_kind():
    """A key that is about the rate alone brings no decay to norms."""
    rows = table(Zoo(), custom_keys=dict(stem=dict(lr_mult=0.1)))
    assert ('norm lr*0.1', LR * 0.1, 0.0) == rows['stem_norm.weight']
    assert ('weight lr*0.1', LR * 0.1, DECAY) == rows['stem.weight']


def test_key_with_decay_is_obeyed():
    """A decay_mult of a key holds for norms and biases as well."""
    rows = table(Zoo(), custom_keys=dict(stem=dict(decay_mult=0.5)))
    for name in ('stem.weight', 'stem_norm.weight', 'stem_norm.bias'):
        assert DECAY * 0.5 == rows[name][2]


def test_more_options_of_a_key():
    """Other options of a key are those of its group."""
    keys = dict(stem=dict(momentum=0.5, lr=0.3))
    groups = groups_of(Zoo(), custom_keys=keys)
    found = [g for g in groups if g['name'].endswith('lr=0.3 momentum=0.5')]
    assert 3 == sum(len(group['params']) for group in found)
    assert {(0.3, 0.5)} == {(g['lr'], g['momentum']) for g in found}


@DIALECTS
def test_given_factors(dialect):
    """A factor that is given goes before what we do by default."""
    cfg = dict(norm_decay_mult=1, bias_decay_mult=0.5, bias_lr_mult=2)
    rows = table(Zoo(), dialect, **cfg)
    assert ('norm decay*1.0', LR, DECAY) == rows['stem_norm.weight']
    assert ('bias decay*1.0', LR, DECAY) == rows['stem_norm.bias']
    expected = ('bias lr*2.0 decay*0.5', LR * 2, DECAY * 0.5)
    assert expected == rows['spectral.bias']


def test_depthwise_biases_as_each_framework_has_them():
    """First comes the rule of mmcv 1.x for them, or the one for biases."""
    cfg = dict(bias_decay_mult=0.5, dwconv_decay_mult=0.25)
    assert DECAY * 0.5 == table(Zoo(), MMENGINE, **cfg)['depthwise.bias'][2]
    assert DECAY * 0.25 == table(Zoo(), MMCV1, **cfg)['depthwise.bias'][2]
    del cfg['dwconv_decay_mult']
    assert DECAY * 0.5 == table(Zoo(), MMENGINE, **cfg)['depthwise.bias'][2]
    assert 0.0 == table(Zoo(), MMCV1, **cfg)['depthwise.bias'][2]


def test_biases_of_norms_as_each_framework_has_them():
    """To mmengine the bias of a norm is a bias too, to mmcv 1.x it is not."""
    cfg = dict(bias_decay_mult=0.5)
    assert DECAY * 0.5 == table(Zoo(), MMENGINE, **cfg)['stem_norm.bias'][2]
    assert 0.0 == table(Zoo(), MMCV1, **cfg)['stem_norm.bias'][2]


@DIALECTS
def test_flat_parameters(dialect):
    """flat_decay_mult is about one dimension, whatever the name."""
    rows = table(Zoo(), dialect, flat_decay_mult=0.5)
    found = {name for name, row in rows.items() if row[2] == DECAY * 0.5}
    assert found == {n for n, p in Zoo().named_parameters() if p.dim() == 1}


def test_decay_of_other_kinds():
    """decay_kinds says which kinds are decayed by default."""
    kinds = ['weight', 'norm', 'bias', 'other']
    rows = table(Zoo(), decay_kinds=kinds)
    assert {DECAY} == {row[2] for row in rows.values()}
    rows = table(Zoo(), decay_kinds=[])
    assert {0.0} == {row[2] for row in rows.values()}


def test_without_weight_decay():
    """An optimizer's own weight decay stays for weights and no others."""
    groups = group_parameters(Zoo(), parse_paramwise({}), MMENGINE)
    optimizer = torch.optim.AdamW(param_groups(groups, None, None))
    own = torch.optim.AdamW([nn.Parameter(torch.ones(1))]).defaults
    for group in optimizer.param_groups:
        decayed = group['name'] == 'weight'
        assert (own['weight_decay'] if decayed else 0) == group['weight_decay']
        assert own['lr'] == group['lr']


@pytest.mark.parametrize(
    ('cfg', 'word'),
    [(dict(bias_lr_mult=2), 'lr'), (dict(norm_decay_mult=2), 'weight_decay')],
)
def test_a_factor_needs_a_base(cfg, word):
    """A factor of what the optimizer is not given is an error."""
    groups = group_parameters(Zoo(), parse_paramwise(cfg), MMENGINE)
    with pytest.raises(OptionError, match=f'{word} by 2.*add {word}='):
        param_groups(groups, None, None)
