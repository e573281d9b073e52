"""The constructor through mmcv's own builder."""

import logging

import pytest
import torch
from hypothesis import given, settings
from mmcv.ops import ModulatedDeformConv2dPack
from mmcv.runner import build_optimizer
from mmcv.utils import get_logger
from mmengine.optim import build_optim_wrapper
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
    'dcn_offset_lr_mult',
)


def build(model, optimizer=SGD, constructor='EMAOptimizerConstructor', **cfg):
    """Build an optimizer as mmdet 2 does."""
    cfg = dict(optimizer, constructor=constructor, paramwise_cfg=cfg)
    return build_optimizer(model, cfg)


@pytest.mark.parametrize('name', detectors.MODELS)
def test_groups_of_detectors(name):
    """Group, lr and weight decay are those written down by hand."""
    model = detectors.MODELS[name][0]()
    optimizer = build(model, batch_size=detectors.BATCH)
    assert detectors.expected(name, model) == detectors.found(optimizer, model)
    assert detectors.COUNTS[name] == detectors.counts(optimizer)


@pytest.mark.parametrize('name', detectors.MODELS)
@pytest.mark.parametrize(
    'cfg',
    [
        dict(),
        dict(custom_keys=dict(backbone=dict(lr_mult=0.1), bn1=dict())),
        dict(norm_decay_mult=1.0, bias_lr_mult=2.0, dcn_offset_lr_mult=0.1),
        dict(flat_decay_mult=0.5, decay_kinds=['weight', 'other']),
    ],
)
def test_same_groups_from_both(name, cfg):
    """The constructor for mmengine makes the same groups in the same order."""
    model = detectors.MODELS[name][0]()
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor='EMAOptimizerConstructor',
            optimizer=dict(SGD),
            paramwise_cfg=dict(cfg, batch_size=2),
        ),
    )
    theirs = wrapper.optimizer.param_groups
    ours = build(model, batch_size=2, **cfg).param_groups
    assert [g['name'] for g in theirs] == [g['name'] for g in ours]
    for left, right in zip(theirs, ours):
        assert [*map(id, left['params'])] == [*map(id, right['params'])]
        assert {**left, 'params': 0} == {**right, 'params': 0}


@settings(max_examples=60, deadline=None)
@given(cfg=side_by_side.options(*FACTORS))
def test_as_the_default_constructor(cfg):
    """With our defaults off, every rate is that of mmcv's constructor."""
    deformable = ModulatedDeformConv2dPack(4, 4, 3, padding=1)
    model = side_by_side.Compared(deformable)
    default = 'DefaultOptimizerConstructor'
    theirs = build(model, constructor=default, bypass_duplicate=True, **cfg)
    ours = build(model, **side_by_side.NEUTRAL, **cfg)
    assert side_by_side.rates(theirs, model) == side_by_side.rates(ours, model)


@pytest.mark.parametrize(
    'optimizer',
    [
        SGD,
        dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        dict(type='Adam', lr=1e-3, betas=(0.9, 0.99)),
        dict(type='RMSprop', lr=1e-3, weight_decay=1e-5),
    ],
)
def test_any_optimizer(optimizer):
    """Any registered optimizer gets the groups and its own options."""
    built = build(Zoo(), optimizer)
    assert type(built) is getattr(torch.optim, optimizer['type'])
    assert ['weight', 'norm', 'bias', 'other'] == list(detectors.counts(built))
    for name, value in optimizer.items():
        if name not in ('type', 'weight_decay'):
            assert {value} == {group[name] for group in built.param_groups}


def test_without_paramwise_cfg():
    """The constructor's name alone makes the groups."""
    cfg = dict(SGD, constructor='EMAOptimizerConstructor')
    built = build_optimizer(Tied(), cfg)
    assert dict(weight=3, norm=1, bias=5) == detectors.counts(built)


def test_wrapped_model():
    """A model in a wrapper with .module gets the groups of the model."""
    inner = Tied()
    wrapper = nn.Module()
    wrapper.module = inner
    found = detectors.found(build(wrapper), inner)
    assert found == detectors.found(build(inner), inner)


def test_accumulation():
    """Accumulated iterations count, where they are given."""
    built = build(Zoo(), batch_size=8, accumulation=4)
    assert 5e-4 * 8 * 4 / 64 == built.param_groups[0]['weight_decay']


def test_the_table(tmp_path):
    """The groups go as a table into the log file of the tool, once."""
    logger = get_logger('tool', log_file=str(tmp_path / 'tool.log'))
    build(Tied(), batch_size=16)
    text = (tmp_path / 'tool.log').read_text()
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()
            logger.removeHandler(handler)
    assert 1 == text.count('SGD, 9 tensors in 3 groups')
    rows = [line.split() for line in text.splitlines()]
    elements = 4 * 3 * 9 + 4 * 4 * 9 + 16
    assert ['weight', '3', '1', f'{elements}', '0.01', '0.0005'] in rows
    assert ['norm', '1', '0', '4', '0.01', '0'] in rows
    assert ['bias', '5', '1', '20', '0.01', '0'] in rows
    assert 1 == text.count('weight decay x 0.25 for 16 samples')


def test_no_type():
    """An optimizer without a type is refused with what to do."""
    cfg = dict(constructor='EMAOptimizerConstructor', lr=0.1)
    with pytest.raises(OptionError, match='add one'):
        build_optimizer(Zoo(), cfg)


def test_wrong_option():
    """A misspelt option is refused before anything is built."""
    with pytest.raises(OptionError, match="Did you mean 'norm_decay_mult'"):
        build(Zoo(), norm_decay_mul=0)
