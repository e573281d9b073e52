"""What a constructor warns of and refuses, in any framework."""

import pytest
import torch

from mmdet_ema.errors import OptionError
from mmdet_ema.optimizers.construction import Construction
from mmdet_ema.optimizers.rules import MMCV1, MMENGINE
from tests.optimizers.models import Tied
from tests.optimizers.test_nominal import Lines

SGD = dict(lr=0.1, weight_decay=5e-4)


def warnings_of(dialect=MMENGINE, **cfg):
    """Return the warnings when the groups of a model are made."""
    log = Lines()
    Construction(SGD, cfg, dialect, log).param_groups(Tied(), ())
    return log.warnings


@pytest.mark.parametrize('dialect', [MMENGINE, MMCV1])
def test_keys_of_no_parameter(dialect):
    """One warning names all keys that no parameter follows, and no others."""
    half = dict(lr_mult=0.5)
    keys = dict(backbone=half, neck=half, **{'bbox head': half})
    (line,) = warnings_of(dialect, custom_keys=keys)
    assert "no effect of custom_keys 'neck', 'bbox head': " in line
    assert 'backbone' not in line
    assert '\n' not in line


def test_keys_hidden_by_longer_ones():
    """A key in whose place a longer one is always obeyed is named too."""
    keys = dict(back=dict(lr_mult=0.5), backbone=dict(lr_mult=0.1))
    (line,) = warnings_of(custom_keys=keys)
    assert "custom_keys 'back': " in line
    assert 'a longer key goes first' in line


@pytest.mark.parametrize(
    ('cfg', 'given', 'why'),
    [
        (dict(accumulation=4), 'accumulation=4 ', 'without batch_size'),
        (
            dict(batch_size=8, nominal_batch_size=None),
            'batch_size=8: ',
            'nominal_batch_size=None',
        ),
        (
            dict(batch_size=8, accumulation=4, nominal_batch_size=None),
            'batch_size=8 and accumulation=4: ',
            'nominal_batch_size=None',
        ),
        (
            dict(accumulation=4, nominal_batch_size=None),
            'accumulation=4: ',
            'nominal_batch_size=None',
        ),
    ],
)
def test_options_of_the_scaling_without_effect(cfg, given, why):
    """One warning says which option does nothing, why and what to do."""
    (line,) = warnings_of(**cfg)
    assert f'no effect of {given}' in line
    assert why in line
    assert 'remove' in line


@pytest.mark.parametrize(
    'cfg',
    [
        dict(),
        dict(nominal_batch_size=None),
        dict(batch_size=8),
        dict(batch_size=8, accumulation=4),
        dict(custom_keys=dict(backbone=dict(lr_mult=0.1))),
        dict(custom_keys={'': dict(lr_mult=0.1), 'first': dict()}),
    ],
)
def test_silence_of_options_with_effect(cfg):
    """Nothing is said of options that do something."""
    assert [] == warnings_of(**cfg)


@pytest.mark.parametrize('name', ['lr', 'weight_decay'])
@pytest.mark.parametrize(
    ('value', 'problem'),
    [
        ('a', 'is not a number'),
        ('1e-3', 'is not a number'),
        ([0.1], 'is not a number'),
        (True, 'is not a number'),
        (-0.1, 'is out of range'),
        (float('nan'), 'is out of range'),
    ],
)
def test_wrong_rates(name, value, problem):
    """A wrong rate is refused in one line, before anything is built."""
    with pytest.raises(OptionError) as error:
        Construction({**SGD, name: value}, None, MMENGINE, Lines())
    text = str(error.value)
    assert text.startswith(f'optimizer.{name}={value!r} {problem}; use ')
    assert '[0, inf)' in text
    assert '\n' not in text


@pytest.mark.parametrize('lr', [0, 1, 0.1, torch.tensor(0.1)])
def test_right_rates(lr):
    """Numbers and tensors are rates."""
    made = Construction(dict(lr=lr), None, MMENGINE, Lines())
    groups = made.param_groups(Tied(), ())
    assert {float(lr)} == {float(group['lr']) for group in groups}


def test_no_rate():
    """A rate that is None is left to the optimizer."""
    made = Construction(dict(lr=None), None, MMENGINE, Lines())
    assert not any('lr' in group for group in made.param_groups(Tied(), ()))
