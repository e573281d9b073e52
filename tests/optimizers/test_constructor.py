"""The constructor through the builder of the installed generation."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.ops import ModulatedDeformConv2dPack
from torch import nn

from mmdet_ema.errors import OptionError
from tests.optimizers import detectors, toy
from tests.optimizers.logs import logged
from tests.optimizers.models import KINDS, Tied, Zoo, rows

LR, DECAY = 0.01, 5e-4
SGD = dict(type='SGD', lr=LR, momentum=0.9, weight_decay=DECAY)
ALL_KINDS = ('weight', 'norm', 'bias', 'other')
FACTORS = (
    'norm_decay_mult',
    'bias_lr_mult',
    'bias_decay_mult',
    'dwconv_decay_mult',
    'dcn_offset_lr_mult',
)


def build(model, optimizer=SGD, **cfg):
    """Build an optimizer with options of the constructor."""
    return toy.build(model, optimizer, paramwise_cfg=cfg)


def table(model, **cfg):
    """Return name -> (group, lr, weight decay)."""
    return rows(build(model, **cfg), model)


def kinds(model):
    """Return the kind of each parameter by name."""
    return {name: row[0] for name, row in table(model).items()}


def names(optimizer):
    """Return the names of the groups."""
    return [group['name'] for group in optimizer.param_groups]


@pytest.mark.parametrize('name', detectors.MODELS)
def test_groups_of_detectors(name):
    """Group, lr and weight decay are those written down by hand."""
    model = detectors.MODELS[name][0]()
    optimizer = build(model, batch_size=detectors.BATCH)
    assert detectors.expected(name, model) == rows(optimizer, model)


class Compared(nn.Module):
    """Every rule of the frameworks finds something here."""

    def __init__(self):
        super().__init__()
        self.zoo = Zoo()
        self.block = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.GroupNorm(2, 4),
            nn.Conv2d(4, 4, 3, groups=4),
            nn.InstanceNorm2d(4, affine=True),
            nn.LayerNorm(4),
            nn.Linear(4, 4),
        )
        self.deformable = ModulatedDeformConv2dPack(4, 4, 3, padding=1)
        self.deformable.gate = nn.Conv2d(4, 4, 1, groups=4)
        self.deformable.norm = nn.BatchNorm2d(4)
        self.again = self.block[5]
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.block[5].weight


MULT = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0])
KEYS = ['block', 'deform', '.bias', 'bias', 'norm']
KEYS += ['conv', 'offset', 'zoo.stem', 'zoo']
CUSTOM = st.dictionaries(
    st.sampled_from(KEYS),
    st.fixed_dictionaries({}, optional=dict(lr_mult=MULT, decay_mult=MULT)),
    max_size=4,
)
DRAWN = {**dict.fromkeys((*FACTORS, *toy.MORE), MULT), 'custom_keys': CUSTOM}
OURS_OFF = dict(decay_kinds=[*ALL_KINDS], nominal_batch_size=None)


@settings(max_examples=60, deadline=None)
@given(cfg=st.fixed_dictionaries({}, optional=DRAWN))
def test_as_the_default_constructor(cfg):
    """With our defaults off, every rate is that of the framework's own."""
    model = Compared()
    theirs = toy.build(
        model,
        SGD,
        paramwise_cfg=dict(cfg, bypass_duplicate=True),
        constructor=toy.DEFAULT,
    )
    found = {}
    for optimizer in (theirs, build(model, **OURS_OFF, **cfg)):
        for group in optimizer.param_groups:
            rates = group['lr'], group['weight_decay']
            for parameter in group['params']:
                found.setdefault(parameter, []).append(rates)
    assert set(model.parameters()) == set(found)
    assert all(left == right for left, right in found.values())


def test_kinds():
    """Weights have weight decay, norms, biases and the rest have none."""
    expected = {
        name: (kind, LR, DECAY if kind == 'weight' else 0.0)
        for name, kind in KINDS.items()
    }
    assert expected == table(Zoo())


@pytest.mark.parametrize(
    ('name', 'leaf', 'shape', 'kind'),
    [
        ('Module', 'attention_biases', (4, 9), 'other'),
        ('Module', 'relative_position_bias_table', (9, 4), 'other'),
        ('Module', 'weight', (4,), 'other'),
        ('Module', 'other_weight', (4, 1), 'weight'),
        ('LayerNorm2d', 'weight', (1, 4, 1, 1), 'norm'),
        ('LayerNorm_3D', 'weight', (4, 8, 8), 'norm'),
        ('SwitchNormalization', 'weight', (4, 1), 'norm'),
        ('RMSNorm', 'weight', (4,), 'norm'),
        ('NormedHead', 'weight', (4,), 'norm'),
        ('NormedHead', 'weight', (4, 4), 'weight'),
        ('LayerNormLinear', 'weight', (4, 4), 'weight'),
    ],
)
def test_kinds_by_name(name, leaf, shape, kind):
    """A table is no bias, a vector no weight, what ends with norm is one."""
    module = type(name, (nn.Module,), {})()
    module.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
    assert {leaf: kind} == kinds(module)


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
    assert ['norm', 'weight'] == [found[f'{name}_g'], found[f'{name}_v']]
    assert 1 == list(found.values()).count('norm')


def test_magnitudes_of_parametrized_weights():
    """The same for the parametrization that replaced it in torch 2.1."""
    utils = nn.utils.parametrizations
    if not hasattr(utils, 'weight_norm'):
        pytest.skip('torch before 2.1')
    found = kinds(utils.weight_norm(nn.Linear(3, 4)))
    assert ['norm', 'weight'] == [
        found[f'parametrizations.weight.original{i}'] for i in (0, 1)
    ]


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


def test_few_groups_in_a_fixed_order():
    """Alike parameters share a group; those of the base rate come first."""
    keys = dict(
        stem=dict(lr_mult=0.1), memory=dict(lr_mult=0.1, decay_mult=0.5)
    )
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
    ] == names(build(Zoo(), custom_keys=keys))


def test_equal_factors_share_a_group():
    """0 and 0.0 are one factor."""
    keys = dict(stem=dict(decay_mult=0), queries=dict(decay_mult=0.0))
    found = [g for g in names(build(Zoo(), custom_keys=keys)) if g[0] == 'w']
    assert ['weight', 'weight decay*0.0'] == sorted(found)


@pytest.mark.parametrize('model', [Zoo(), Tied()])
def test_freezing_changes_no_group(model):
    """How much is frozen changes no group, so that a state can be resumed."""
    cfg = dict(custom_keys=dict(first=dict(lr_mult=0.1)), bias_lr_mult=2)
    model.requires_grad_(True)
    before = table(model, **cfg)
    frozen = list(model.parameters())[::2]
    for parameter in frozen:
        parameter.requires_grad_(False)
    assert before == table(model, **cfg)
    assert not any(parameter.requires_grad for parameter in frozen)


def test_parameters_without_gradients():
    """Integers, which can have no gradient, are in a group as well."""
    model = nn.Module()
    table_of_ints = torch.zeros(2, 2, dtype=torch.int8)
    model.weight = nn.Parameter(table_of_ints, requires_grad=False)
    assert {'weight': ('weight', LR, DECAY)} == table(model)


KEY_LR = dict(custom_keys=dict(stem=dict(lr_mult=0.1)))
KEY_DECAY = dict(custom_keys=dict(stem=dict(decay_mult=0.5)))
GIVEN = dict(norm_decay_mult=1, bias_decay_mult=0.5, bias_lr_mult=2)


@pytest.mark.parametrize(
    ('cfg', 'name', 'row'),
    [
        (KEY_LR, 'stem_norm.weight', ('norm lr*0.1', LR * 0.1, 0.0)),
        (KEY_LR, 'stem.weight', ('weight lr*0.1', LR * 0.1, DECAY)),
        (KEY_DECAY, 'stem.weight', ('weight decay*0.5', LR, DECAY * 0.5)),
        (KEY_DECAY, 'stem_norm.weight', ('norm decay*0.5', LR, DECAY * 0.5)),
        (KEY_DECAY, 'stem_norm.bias', ('bias decay*0.5', LR, DECAY * 0.5)),
        (GIVEN, 'stem_norm.weight', ('norm decay*1.0', LR, DECAY)),
        (GIVEN, 'stem_norm.bias', ('bias decay*1.0', LR, DECAY)),
        (
            GIVEN,
            'spectral.bias',
            ('bias lr*2.0 decay*0.5', LR * 2, DECAY * 0.5),
        ),
    ],
)
def test_given_factors(cfg, name, row):
    """A factor goes before the default of the kind; without it that stays."""
    assert row == table(Zoo(), **cfg)[name]


def test_more_options_of_a_key():
    """Other options of a key are those of its group; the longest key wins."""
    keys = {'.token': dict(momentum=0.5, lr=0.3), 'token': dict(momentum=0.7)}
    optimizer = build(Zoo(), custom_keys=keys)
    (group,) = [g for g in optimizer.param_groups if 'lr=' in g['name']]
    assert 'other lr=0.3 momentum=0.5' == group['name']
    assert (0.3, 0.5) == (group['lr'], group['momentum'])


@pytest.mark.parametrize('name', ['depthwise.bias', 'stem_norm.bias'])
def test_biases_as_each_framework_has_them(name):
    """Those of norms and depthwise layers are none of mmcv 1.x's biases."""
    found = table(Zoo(), bias_decay_mult=0.5, dwconv_decay_mult=None)
    assert DECAY * toy.SPECIAL_BIASES * 0.5 == found[name][2]


def test_flat_parameters():
    """flat_decay_mult is about one dimension where no key is followed."""
    model = Zoo()
    keys = dict(own_norm=dict(lr_mult=0.1))
    found = table(model, flat_decay_mult=0.5, custom_keys=keys)
    assert 0.0 == found.pop('own_norm.weight')[2]
    flat = {n for n, p in model.named_parameters() if p.dim() == 1} - {
        'own_norm.weight'
    }
    assert flat == {n for n, row in found.items() if row[2] == DECAY * 0.5}


@pytest.mark.parametrize('decayed', [[], ['norm', 'other'], [*ALL_KINDS]])
def test_decay_of_other_kinds(decayed):
    """decay_kinds says which kinds are decayed by default."""
    for kind, _, decay in table(Zoo(), decay_kinds=decayed).values():
        assert (DECAY if kind in decayed else 0.0) == decay


def test_without_rates():
    """An optimizer's own weight decay stays for weights and no others."""
    optimizer = build(Zoo(), dict(type='AdamW'))
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
    with pytest.raises(OptionError, match=f'{word} by 2.*add {word}='):
        build(Zoo(), dict(type='AdamW'), **cfg)


@pytest.mark.parametrize(
    'optimizer',
    [
        SGD,
        dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        dict(type='Adam', lr=1e-3, betas=(0.9, 0.99)),
        dict(type='RMSprop', lr=1e-3, weight_decay=1e-5),
        dict(type='SGD', lr=1),
        dict(type='SGD', lr=0),
        dict(type='SGD', lr=torch.tensor(0.1)),
    ],
)
def test_any_optimizer(optimizer):
    """Any registered optimizer gets the groups and its own options."""
    built = build(Zoo(), optimizer)
    assert type(built) is getattr(torch.optim, optimizer['type'])
    assert [*ALL_KINDS] == names(built)
    for name, value in optimizer.items():
        if name not in ('type', 'weight_decay'):
            assert all(value == group[name] for group in built.param_groups)


def test_wrapped_model():
    """The name alone makes the groups, in a wrapper with .module as well."""
    wrapper = nn.Module()
    wrapper.module = inner = Tied()
    optimizer = toy.build(wrapper, SGD)
    assert ['weight', 'norm', 'bias'] == names(optimizer)
    assert table(inner) == rows(optimizer, inner)


def test_accumulation():
    """Accumulated iterations count, where they are given."""
    built = build(Zoo(), batch_size=8, accumulation=4)
    assert DECAY * 8 * 4 / 64 == built.param_groups[0]['weight_decay']


def test_the_log():
    """The groups are logged as a table, once, and the scaling in a line."""
    with logged(toy.logger()) as lines:
        build(Tied(), batch_size=16, bias_decay_mult=0)
    assert [] == lines.warnings
    report, scaled = lines.infos
    first, _, *found = report.splitlines()
    assert first.endswith('SGD, 9 tensors in 3 groups')
    elements = 4 * 3 * 9 + 4 * 4 * 9 + 16
    assert [
        ['weight', '3', '1', f'{elements}', '0.01', '0.0005'],
        ['norm', '1', '0', '4', '0.01', '0'],
        ['bias', '5', '1', '20', '0.01', '0'],
    ] == [line.split() for line in found]
    assert 'weight decay x 0.25 for 16 samples' in scaled


HALF = dict(lr_mult=0.5)
UNSCALED = dict(nominal_batch_size=None)
NO_EFFECT = [
    (
        dict(custom_keys=dict(backbone=HALF, neck=HALF, bbox_head=HALF)),
        "custom_keys 'neck', 'bbox_head': ",
        'correct or remove',
    ),
    (
        dict(custom_keys=dict(back=HALF, backbone=HALF)),
        "custom_keys 'back': ",
        'a longer key goes first',
    ),
    (dict(accumulation=4), 'accumulation=4 ', 'without batch_size'),
    (dict(UNSCALED, batch_size=8), 'batch_size=8: ', 'size=None'),
    (dict(UNSCALED, accumulation=4), 'accumulation=4: ', 'size=None'),
    (
        dict(UNSCALED, batch_size=8, accumulation=4),
        'batch_size=8 and accumulation=4: ',
        'nominal_batch_size=None',
    ),
]


@pytest.mark.parametrize(('cfg', 'what', 'why'), NO_EFFECT)
def test_options_without_effect(cfg, what, why):
    """One warning says which options do nothing, why and what to do."""
    with logged(toy.logger()) as lines:
        build(Tied(), **cfg)
    (line,) = lines.warnings
    assert f'no effect of {what}' in line
    assert why in line
    assert 'remove' in line
    assert '\n' not in line


@pytest.mark.parametrize(
    'cfg',
    [
        dict(bias_lr_mult=None, batch_size=None),
        UNSCALED,
        dict(batch_size=8, accumulation=4),
        dict(custom_keys={'': HALF, 'first': dict()}),
    ],
)
def test_silence_of_options_with_effect(cfg):
    """Nothing is said of options that do something."""
    with logged(toy.logger()) as lines:
        build(Tied(), **cfg)
    assert [] == lines.warnings


WRONG = [
    (dict(norm_decay=0), "no option 'norm_decay'", "'norm_decay_mult'?"),
    (dict(custom_key={}), "no option 'custom_key'", "'custom_keys'?"),
    (dict(bias_lr_mult=-1), 'bias_lr_mult=-1', '[0, inf)'),
    (dict(bias_lr_mult='2'), "bias_lr_mult='2'", 'not a number'),
    (dict(bypass_duplicate=1), 'bypass_duplicate=1', 'True or False'),
    (dict(custom_keys=['a']), "custom_keys=['a']", 'use a dict'),
    (dict(custom_keys=dict(a=0.1)), "custom_keys['a']=0.1", 'use a dict'),
    (
        dict(custom_keys=dict(a=dict(lr_mul=0.1))),
        "custom_keys['a'] has no option 'lr_mul'",
        "'lr_mult'?",
    ),
    (
        dict(custom_keys=dict(a=dict(decay_mult=-0.1))),
        "custom_keys['a'] decay_mult=-0.1",
        '[0, inf)',
    ),
    (dict(decay_kinds='weight'), "decay_kinds='weight'", 'list'),
    (dict(decay_kinds=['bn']), "decay_kinds='bn'", "'norm'"),
    (dict(nominal_batch_size=0), 'nominal_batch_size=0', 'at least 1'),
    (dict(batch_size=2.5), 'batch_size=2.5', 'whole number'),
    (dict(accumulation=0), 'accumulation=0', 'at least 1'),
    ([1], 'paramwise_cfg=[1]', 'use a dict'),
]


@pytest.mark.parametrize(('cfg', 'value', 'remedy'), WRONG)
def test_wrong_options(cfg, value, remedy):
    """A wrong option is named in one line, with what is allowed."""
    with pytest.raises(OptionError) as error:
        toy.build(Tied(), SGD, paramwise_cfg=cfg)
    text = str(error.value)
    assert value in text
    assert remedy in text
    assert '\n' not in text


@pytest.mark.parametrize('name', ['lr', 'weight_decay'])
@pytest.mark.parametrize('value', ['1e-3', [0.1], True, -0.1, float('nan')])
def test_wrong_rates(name, value):
    """A wrong rate is refused in one line, before anything is built."""
    given = re.escape(f'optimizer.{name}={value!r} is ')
    problem = r'(not a number|out of range); .*\[0, inf\)\.$'
    with pytest.raises(OptionError, match=f'{given}{problem}'):
        build(Tied(), {**SGD, name: value})
