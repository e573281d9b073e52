"""Messages: short, on one line, and with what to write instead."""

import pytest
import torch
from mmengine.registry import HOOKS

from mmdet_ema import OptionError
from mmdet_ema.errors import show
from mmdet_ema.training.options import parse_options


def message_of(call, **options):
    with pytest.raises(OptionError) as error:
        call(**options)
    message = str(error.value)
    assert '\n' not in message
    return message


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (0.5, '0.5'),
        ('a' * 98, repr('a' * 98)),
        ({'a': [1]}, "{'a': [1]}"),
        (torch.zeros(2, 2), 'tensor([[0., 0.], [0., 0.]])'),
    ],
    ids=['number', 'text', 'dict', 'tensor'],
)
def test_short_values_are_shown_as_they_are(value, expected):
    """What fits is shown, on one line."""
    assert show(value) == expected


def test_long_values_are_cut_in_the_middle():
    """Beginning, end and length of a long value are shown."""
    found = show(list(range(5000)))
    assert found.startswith('[0, 1, 2, ')
    assert '4998, 4999] (' in found
    assert found.endswith(f'({len(repr(list(range(5000))))} characters)')
    assert len(found) < 140


LONG = list(range(5000))


@pytest.mark.parametrize(
    'options',
    [
        {'decay': LONG},
        {'decay': '0.9' * 5000},
        {'tau': torch.zeros(5000)},
        {'interval': LONG},
        {'begin_iter': LONG},
        {'update_buffers': LONG},
        {'copied': LONG},
        {'enabled': LONG},
        {'nonfinite': LONG},
        {'evaluate': ''.join(map(str, LONG))},
        {'evaluate': LONG},
        {'device': LONG},
        {'schedule': LONG},
        {'schedule': {'type': 'constant', 'decay': LONG}},
        {'schedule': {'type': 'cosine', 'values': LONG}},
        {'schedule': lambda n: LONG},
        {'ema_type': LONG},
        {'momentum': LONG},
        {'ema_type': 'ExpMomentumEMA', 'gamma': LONG},
        {'gamma': LONG},
        {'decay': LONG, 'momentum': LONG},
        {'schedule': 'constant', 'decay': LONG},
        {'unknown': LONG},
    ],
    ids=lambda options: ' '.join(options),
)
def test_no_message_prints_a_whole_list(options):
    """However long a wrong value is, the message stays readable."""
    assert len(message_of(parse_options, **options)) < 600


@pytest.mark.parametrize(
    ('name', 'value', 'words'),
    [
        ('alpha', 0.999, ('decay=', 'momentum=')),
        ('beta', 0.999, ("'decay'",)),
        ('decay_rate', 0.999, ("'decay'",)),
        ('ema_decay', 0.999, ("'decay'",)),
        ('end_momentum', 0.0, ("type='cosine'", '1 - momentum')),
        ('resume_from', 'a.pth', ('load_from', 'resume=True')),
        ('skip_buffers', True, ('update_buffers', 'opposite')),
        ('start_iters', 500, ("Did you mean 'begin_iter'?",)),
        ('start_epoch', 5, ("Did you mean 'begin_epoch'?",)),
        ('swa', True, ("'ema_type'",)),
        ('total_iter', 2000, ("'ExpMomentumEMA'", 'gamma')),
        ('update_every', 5, ("'interval'",)),
        ('update_interval', 5, ("'interval'",)),
        ('use_buffers', True, ("'update_buffers'",)),
        ('warm_up', 100, ("'MomentumAnnealingEMA'", 'gamma')),
    ],
)
def test_options_of_other_projects(name, value, words):
    """Each is answered with what to write here."""
    message = message_of(parse_options, **{name: value})
    assert f'no option {name!r} (given: {name}={value!r})' in message
    advice = message.partition('priority.')[2]
    assert [word for word in words if word not in advice] == []


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('CosineEMA', ("type='cosine'", '1 - momentum')),
        ('mmpretrain.CosineEMA', ("type='cosine'",)),
        ('ModelEMA', ('no ema_type', 'tau=2000')),
        ('RampUpEMA', ("type='half_life'",)),
        ('SWA', ("'StochasticWeightAverage'",)),
    ],
)
def test_classes_of_other_projects(name, words):
    """Each is answered with what has its numbers, or nearly."""
    message = message_of(parse_options, ema_type=name)
    advice = message.partition("'StochasticWeightAverage'.")[2]
    assert f'ema_type={name!r} is not known' in message
    assert [word for word in words if word not in advice] == []


@pytest.mark.parametrize(
    ('kind', 'words'),
    [
        ('ExpMomentumEMAHook', ("'ExpMomentumEMA'", 'gamma=2000')),
        ('mmdet.ExpMomentumEMAHook', ("'ExpMomentumEMA'",)),
        ('LinearMomentumEMAHook', ("'MomentumAnnealingEMA'", 'gamma=100')),
        ('MEGVIIEMAHook', ('init_updates',)),
        ('SWAHook', ("'StochasticWeightAverage'",)),
    ],
)
def test_hooks_of_other_projects(kind, words):
    """Each is answered with the dict of our hook that does the same."""
    message = message_of(HOOKS.build, cfg=dict(type=kind, momentum=0.1))
    assert message.startswith(f'type={kind!r} is not a hook of this')
    advice = message.partition("dict(type='EMAHook', ")[2]
    assert [word for word in words if word not in advice] == []


def test_other_unknown_hooks_are_the_frameworks_matter():
    """A name that we know nothing of has the framework's own message."""
    with pytest.raises(KeyError, match='is not in the mmengine::hook'):
        HOOKS.build(dict(type='NobodysHook'))


def test_a_hook_of_ones_own_under_such_a_name():
    """One who registers a class of that name gets it."""
    kind = type('SWAHook', (), {})
    HOOKS.register_module(module=kind)
    try:
        assert type(HOOKS.build(dict(type='SWAHook'))) is kind
    finally:
        del HOOKS._module_dict['SWAHook']
