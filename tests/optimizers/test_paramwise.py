"""The options of the constructor and what is said to wrong ones."""

import pytest

from mmdet_ema.errors import OptionError
from mmdet_ema.optimizers.paramwise import MULTIPLIERS, parse_paramwise


@pytest.mark.parametrize('cfg', [None, {}])
def test_nothing_given(cfg):
    """Without options weights are decayed, for a nominal batch of 64."""
    options = parse_paramwise(cfg)
    assert ('weight',) == options.decay_kinds
    assert 64 == options.nominal_batch_size
    assert options.batch_size is None
    assert {} == options.multipliers
    assert {} == options.custom_keys


def test_multipliers_are_kept_as_given():
    """A factor of the framework is there if it was given and not None."""
    cfg = {**dict.fromkeys(MULTIPLIERS, 0), 'bias_lr_mult': None}
    given = parse_paramwise(cfg).multipliers
    assert set(MULTIPLIERS) - {'bias_lr_mult'} == set(given)
    assert {0.0} == set(given.values())


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
        parse_paramwise(cfg)
    text = str(error.value)
    assert value in text
    assert remedy in text
    assert '\n' not in text


def test_unknown_words_of_a_key_are_the_optimizers():
    """What is no misspelt factor goes to the group, as in mmengine."""
    cfg = dict(custom_keys=dict(a=dict(lr_mult=2, momentum=0.5)))
    expected = dict(a=dict(lr_mult=2.0, momentum=0.5))
    assert expected == parse_paramwise(cfg).custom_keys
