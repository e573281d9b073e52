"""The constructor where mmengine has more than mmcv 1.x."""

import pytest
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from tests.optimizers import toy
from tests.optimizers.models import Tied, Zoo, rows

SGD = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4)


def test_more_options_of_a_key_as_the_default():
    """Options of a key other than factors go to the group, as in mmengine."""
    keys = dict(custom_keys=dict(stem=dict(momentum=0.5, lr_mult=0.1)))
    model = Zoo()
    found = {}
    for constructor in (toy.DEFAULT, 'EMAOptimizerConstructor'):
        optimizer = toy.build(model, SGD, constructor, paramwise_cfg=keys)
        for group in optimizer.param_groups:
            for parameter in group['params']:
                rates = group['lr'], group['momentum']
                found.setdefault(parameter, []).append(rates)
    assert all(left == right for left, right in found.values())
    assert [(0.01 * 0.1, 0.5)] * 2 == found[model.stem.weight]


def test_options_of_the_wrapper():
    """Options of the wrapper reach it, and the scaling."""
    wrapper = build_optim_wrapper(
        Zoo(),
        dict(
            constructor='EMAOptimizerConstructor',
            optimizer=SGD,
            paramwise_cfg=dict(batch_size=8),
            accumulative_counts=4,
            clip_grad=dict(max_norm=35),
        ),
    )
    assert 4 == wrapper._accumulative_counts
    assert dict(max_norm=35) == wrapper.clip_grad_kwargs
    assert 5e-4 * 8 * 4 / 64 == wrapper.param_groups[0]['weight_decay']


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
class TwoParts:
    """A constructor of a user that calls ours for each submodule."""

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


def test_several_optimizers():
    """A constructor of the user may call ours; ours alone says so."""
    model = nn.Module()
    model.one, model.two = Zoo(), Tied()
    cfg = dict(one=dict(optimizer=SGD), two=dict(optimizer=SGD))
    wrappers = build_optim_wrapper(model, dict(cfg, constructor='TwoParts'))
    for name, part in (('one', model.one), ('two', model.two)):
        assert rows(wrappers[name].optimizer, part)
    cfg['constructor'] = 'EMAOptimizerConstructor'
    with pytest.raises(ValueError, match='OptimWrapperDict'):
        build_optim_wrapper(model, cfg)
