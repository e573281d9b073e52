"""The constructor through mmengine's own builder."""

import pytest
import torch
from hypothesis import given, settings
from mmcv.ops import ModulatedDeformConv2dPack
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

import mmdet_ema  # noqa: F401  registers the constructor
from mmdet_ema.errors import OptionError
from tests.optimizers import detectors, side_by_side
from tests.optimizers.models import Tied, Zoo

SGD = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4)
FACTORS = (
    'norm_decay_mult',
    'bias_lr_mult',
    'bias_decay_mult',
    'dwconv_decay_mult',
    'flat_decay_mult',
    'dcn_offset_lr_mult',
)


def build(model, optimizer=SGD, constructor='EMAOptimizerConstructor', **cfg):
    """Build a wrapper as the runner does."""
    wrapper = cfg.pop('wrapper', {})
    cfg = dict(optimizer=optimizer, constructor=constructor, paramwise_cfg=cfg)
    return build_optim_wrapper(model, {**cfg, **wrapper})


@pytest.mark.parametrize('name', detectors.MODELS)
def test_groups_of_detectors(name):
    """Group, lr and weight decay are those written down by hand."""
    model = detectors.MODELS[name][0]()
    optimizer = build(model, batch_size=detectors.BATCH).optimizer
    assert detectors.expected(name, model) == detectors.found(optimizer, model)
    assert detectors.COUNTS[name] == detectors.counts(optimizer)


@settings(max_examples=60, deadline=None)
@given(cfg=side_by_side.options(*FACTORS))
def test_as_the_default_constructor(cfg):
    """With our defaults off, every rate is that of mmengine's constructor."""
    deformable = ModulatedDeformConv2dPack(4, 4, 3, padding=1)
    model = side_by_side.Compared(deformable)
    theirs = build(
        model,
        constructor='DefaultOptimWrapperConstructor',
        bypass_duplicate=True,
        **cfg,
    )
    ours = build(model, **side_by_side.NEUTRAL, **cfg)
    assert side_by_side.rates(theirs, model) == side_by_side.rates(ours, model)


def test_more_options_of_a_key_as_the_default():
    """Options of a key other than factors go to the group, as in mmengine."""
    keys = dict(custom_keys=dict(stem=dict(momentum=0.5, lr_mult=0.1)))
    model = Zoo()
    default = 'DefaultOptimWrapperConstructor'

    def seen(wrapper):
        names = {id(p): n for n, p in model.named_parameters()}
        return {
            names[id(p)]: (g['lr'], g['momentum'])
            for g in wrapper.optimizer.param_groups
            for p in g['params']
        }

    theirs = seen(build(model, constructor=default, **keys))
    assert theirs == seen(build(model, **keys))
    assert (0.01 * 0.1, 0.5) == theirs['stem.weight']


@pytest.mark.parametrize(
    'optimizer',
    [
        SGD,
        dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        dict(type='Adam', lr=1e-3, betas=(0.9, 0.99)),
        dict(type='RMSprop', lr=1e-3, weight_decay=1e-5),
        dict(type=torch.optim.NAdam, lr=1e-3),
    ],
)
def test_any_optimizer(optimizer):
    """Any registered optimizer gets the groups and its own options."""
    wrapper = build(Zoo(), optimizer)
    assert isinstance(wrapper, OptimWrapper)
    built = wrapper.optimizer
    assert ['weight', 'norm', 'bias', 'other'] == list(detectors.counts(built))
    for name, value in optimizer.items():
        if name not in ('type', 'weight_decay'):
            assert {value} == {group[name] for group in built.param_groups}


def test_without_paramwise_cfg():
    """The constructor's name alone makes the groups."""
    wrapper = build_optim_wrapper(
        Tied(), dict(constructor='EMAOptimizerConstructor', optimizer=SGD)
    )
    assert dict(weight=3, norm=1, bias=5) == detectors.counts(
        wrapper.optimizer
    )


def test_wrapped_model():
    """A model in a wrapper with .module gets the groups of the model."""
    inner = Tied()
    wrapper = nn.Module()
    wrapper.module = inner
    found = detectors.found(build(wrapper).optimizer, inner)
    assert found == detectors.found(build(inner).optimizer, inner)


def test_options_of_the_wrapper():
    """Options of the wrapper reach it, and the scaling."""
    options = dict(accumulative_counts=4, clip_grad=dict(max_norm=35))
    wrapper = build(Zoo(), batch_size=8, wrapper=options)
    assert 4 == wrapper._accumulative_counts
    assert dict(max_norm=35) == wrapper.clip_grad_kwargs
    assert 5e-4 * 8 * 4 / 64 == wrapper.param_groups[0]['weight_decay']


def test_the_table(caplog):
    """The groups are logged as a table, once, and the scaling in a line."""
    logger = MMLogger.get_instance('table', logger_name='table')
    logger.addHandler(caplog.handler)
    build(Tied(), batch_size=16)
    text = [r.getMessage() for r in caplog.records]
    table = [t for t in text if 'tensors in' in t]
    assert 1 == len(table)
    rows = [line.split() for line in table[0].splitlines()[1:]]
    elements = 4 * 3 * 9 + 4 * 4 * 9 + 16
    assert ['weight', '3', '1', f'{elements}', '0.01', '0.0005'] == rows[1]
    assert ['norm', '1', '0', '4', '0.01', '0'] == rows[2]
    assert ['bias', '5', '1', '20', '0.01', '0'] == rows[3]
    assert 4 == len(rows)
    assert 1 == sum('weight decay x 0.25 for 16 samples' in t for t in text)


def test_several_optimizers():
    """A constructor of the user calls ours for each submodule."""

    @OPTIM_WRAPPER_CONSTRUCTORS.register_module(name='TwoParts', force=True)
    class TwoParts:
        def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
            self.cfg, self.paramwise = optim_wrapper_cfg, paramwise_cfg

        def __call__(self, model):
            ours = OPTIM_WRAPPER_CONSTRUCTORS.get('EMAOptimizerConstructor')
            return OptimWrapperDict(
                **{
                    name: ours(cfg, self.paramwise)(getattr(model, name))
                    for name, cfg in self.cfg.items()
                }
            )

    model = nn.Module()
    model.one, model.two = Zoo(), Tied()
    cfg = dict(one=dict(optimizer=SGD), two=dict(optimizer=SGD))
    wrappers = build_optim_wrapper(model, dict(constructor='TwoParts', **cfg))
    for name, part in (('one', model.one), ('two', model.two)):
        assert detectors.found(wrappers[name].optimizer, part)


def test_several_optimizers_without_a_constructor_of_the_user():
    """Ours alone for several optimizers says what to do."""
    cfg = dict(one=dict(optimizer=SGD), two=dict(optimizer=SGD))
    cfg['constructor'] = 'EMAOptimizerConstructor'
    with pytest.raises(ValueError, match='OptimWrapperDict'):
        build_optim_wrapper(Zoo(), cfg)


def test_wrong_option():
    """A misspelt option is refused before anything is built."""
    with pytest.raises(OptionError, match="Did you mean 'norm_decay_mult'"):
        build(Zoo(), norm_decay_mul=0)
