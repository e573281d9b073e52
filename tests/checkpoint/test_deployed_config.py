"""The config of the deployed model: without what is of the package."""

import copy

import pytest

from mmdet_ema.checkpoint.portable import without_package


class EMAHook:
    """Stands for the class that a new-style config names."""


EMAHook.__module__ = 'mmdet_ema.for_mmengine.ema_hook'


@pytest.mark.parametrize(
    'kind',
    [
        'EMAHook',
        'BiasWarmupHook',
        'MEGVIIEMAHook',
        'mmengine.EMAHook',
        'mmengine.hooks.EMAHook',
        'mmdet_ema.EMAHook',
        EMAHook,
    ],
)
@pytest.mark.parametrize('imports', ['mmdet_ema', ['mmdet_ema']])
def test_package_alone(kind, imports):
    """Nothing is left of what is there for the package alone."""
    cfg = dict(
        custom_imports=dict(imports=imports, allow_failed_imports=False),
        default_hooks=dict(ema=dict(type=kind), timer=dict(type='Timer')),
        custom_hooks=[dict(type=kind, decay=0.9)],
        optim_wrapper=dict(type='A', constructor='EMAOptimizerConstructor'),
        optimizer=dict(
            type='B', constructor='mmdet_ema.EMAOptimizerConstructor'
        ),
        model=dict(type='C'),
    )
    before = copy.deepcopy(cfg)
    assert without_package(cfg) == dict(
        default_hooks=dict(timer=dict(type='Timer')),
        custom_hooks=[],
        optim_wrapper=dict(type='A'),
        optimizer=dict(type='B'),
        model=dict(type='C'),
    )
    assert cfg == before


def test_others_are_kept():
    """Other imports, hooks and constructors, and a user's own EMAHook."""
    cfg = dict(
        custom_imports=dict(imports=['mine', 'mmdet_ema', 'mmdet_ema_more']),
        custom_hooks=[dict(type='mine.EMAHook'), dict(type='EMAHookOfMine')],
        optim_wrapper=dict(type='A', constructor='Mine'),
    )
    expected = copy.deepcopy(cfg)
    expected['custom_imports']['imports'] = ['mine', 'mmdet_ema_more']
    assert without_package(cfg) == expected
