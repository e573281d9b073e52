"""Every option of the hook: what is taken, what it does, what is refused."""

import inspect
import math

import pytest
import torch
from mmengine.model.averaged_model import (
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from torch import nn

from mmdet_ema import EMAHook
from mmdet_ema.averaging import OptionError, build_schedule
from mmdet_ema.training.options import NAMES, Options, parse_options
from tests import oracle


def schedule_of(planned=1000, **options):
    return parse_options(**options).choice.make(planned)


def message_of(**options):
    """Return the one line with which options are refused."""
    with pytest.raises(OptionError) as error:
        parse_options(**options)
    message = str(error.value)
    assert '\n' not in message
    assert isinstance(error.value, ValueError)
    return message


# Defaults


def test_defaults():
    """Without options the hook does what the design says."""
    options = parse_options()
    expected = dict(interval=1, begin_iter=0, begin_epoch=0, enabled=True)
    expected.update(update_buffers=True, copied=(), device=None, overlap=False)
    expected.update(evaluate='ema', nonfinite='skip')
    expected.update(strict_load=False, scale_decay=False, verify_ranks=False)
    assert Options(choice=options.choice, **expected) == options
    assert (0, (), None) == (
        options.choice.phase,
        options.choice.no_effect,
        options.choice.rule,
    )
    schedule = options.choice.make(1000)
    assert 'exponential(decay=0.9999, tau=2000.0)' == str(schedule)
    for n in (1, 100, 2000, 10_000):
        # exp and expm1 differ in the last digits for small n / tau.
        assert pytest.approx(oracle.ramp(n), rel=1e-12) == schedule(n)


@pytest.mark.parametrize(
    'words',
    [
        dict(momentum=0.0002),
        dict(ema_type='ExpMomentumEMA'),
        dict(evaluate_on_ema=True),
        dict(evaluate_on_origin=False),
    ],
    ids=str,
)
def test_defaults_of_openmmlab(words):
    """Under OpenMMLab's words mmengine's defaults are taken."""
    options = parse_options(**words)
    assert options.update_buffers is False
    assert 1 == options.choice.phase
    # 1 - 0.0002 is next to 0.9998 in float64.
    assert pytest.approx(0.9998, rel=1e-15) == options.choice.make(9).limit
    assert parse_options(update_buffers=True, **words).update_buffers is True


def test_signature():
    """``inspect.signature`` of the hook shows its options and defaults."""
    shown = inspect.signature(EMAHook).parameters
    assert [*NAMES[:-1]] == [*shown]
    assert 1 == shown['interval'].default
    assert shown['evaluate'].default is None


def test_every_option_is_documented():
    """The docstring of the hook says what each option means."""
    missing = [
        x for x in NAMES[:-1] if f'\n        {x} (' not in EMAHook.__doc__
    ]
    assert [] == missing


# decay, tau, schedule


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (dict(decay=0.5, tau=10), 'exponential(decay=0.5, tau=10.0)'),
        (dict(schedule='constant'), 'constant(decay=0.9999)'),
        (dict(schedule='constant', decay=0.5), 'constant(decay=0.5)'),
        (dict(schedule='inverse', decay=0.5), 'inverse(decay=0.5)'),
        (dict(schedule='mean'), 'mean()'),
        (
            dict(schedule=dict(type='exponential', tau=3), decay=0.5),
            'exponential(decay=0.5, tau=3.0)',
        ),
        (
            dict(schedule=dict(type='constant', decay=0.5), decay=0.5),
            'constant(decay=0.5)',
        ),
        (
            dict(schedule=dict(type='half_life', half_life=7)),
            'half_life(half_life=7.0)',
        ),
        (dict(schedule='constant', momentum=0.25), 'constant(decay=0.75)'),
        (
            dict(schedule='exponential', momentum=0.25, tau=3),
            'exponential(decay=0.75, tau=3.0)',
        ),
        (dict(momentum=0.1), 'ExponentialMovingAverage(momentum=0.1)'),
        (
            dict(ema_type='ExpMomentumEMA'),
            'ExpMomentumEMA(momentum=0.0002, gamma=2000.0)',
        ),
        (
            dict(ema_type='ExpMomentumEMA', momentum=0.01, gamma=50),
            'ExpMomentumEMA(momentum=0.01, gamma=50.0)',
        ),
        (
            dict(ema_type='ExpMomentumEMA', decay=0.99),
            'ExpMomentumEMA(momentum=0.01, gamma=2000.0)',
        ),
        (
            dict(ema_type='MomentumAnnealingEMA'),
            'MomentumAnnealingEMA(momentum=0.0002, gamma=100.0)',
        ),
        (
            dict(ema_type='StochasticWeightAverage'),
            'StochasticWeightAverage()',
        ),
        (dict(ema_type=StochasticWeightAverage), 'StochasticWeightAverage()'),
    ],
    ids=str,
)
def test_schedules(options, expected):
    """Options stand in the dict or beside it; a class is in its own words."""
    assert expected == str(schedule_of(**options))


def test_callable():
    """A callable is the schedule."""
    schedule = schedule_of(schedule=lambda n: 1 / (n + 1))
    assert [0.5, 0.25] == [schedule(1), schedule(3)]


def test_the_config_stays():
    """The dict in the config is not changed."""
    spec = dict(type='exponential', tau=3)
    parse_options(schedule=spec, decay=0.5)
    assert dict(type='exponential', tau=3) == spec


def test_cosine():
    """The cosine ramp takes the planned steps where it is not told more."""
    options = parse_options(schedule='cosine')
    assert 40 == options.choice.make(40).options['total_steps']
    assert 1 == options.choice.make(0).options['total_steps']
    spec = dict(type='cosine', total_steps=7, end_decay=0.999)
    schedule = parse_options(schedule=spec).choice.make(40)
    assert 7 == schedule.options['total_steps']
    assert 0.999 == schedule(8)


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (dict(tau=5, schedule='constant'), ('tau',)),
        (dict(decay=0.9, schedule='mean'), ('decay',)),
        (dict(decay=0.9, tau=5, schedule='mean'), ('decay', 'tau')),
        (dict(decay=0.9, schedule='half_life'), ('decay',)),
        (dict(tau=5, schedule=lambda n: 0.5), ('tau',)),
        (dict(decay=0.5, schedule=build_schedule('mean')), ('decay',)),
        (dict(momentum=0.1, schedule='mean'), ('momentum',)),
        (dict(momentum=0.1, schedule=lambda n: 0.5), ('momentum',)),
        (
            dict(momentum=0.1, ema_type='StochasticWeightAverage'),
            ('momentum',),
        ),
        (dict(decay=0.9, ema_type='StochasticWeightAverage'), ('decay',)),
        (dict(decay=0.9, tau=5), ()),
        (dict(decay=0.9, schedule='constant'), ()),
        (dict(ema_type='ExpMomentumEMA', momentum=0.1, gamma=3), ()),
        (dict(ema_type='StochasticWeightAverage'), ()),
    ],
)
def test_no_effect(options, expected):
    """An option that changes nothing is named, as the user wrote it."""
    found = parse_options(**options).choice.no_effect
    assert expected == tuple(text.partition(' ')[0] for text in found)
    assert all('has no effect with' in text for text in found)


def test_the_same_said_twice():
    """A momentum that says the same as a decay in the dict is no error."""
    spec = dict(type='constant', decay=0.1)
    schedule = schedule_of(momentum=0.9, schedule=spec)
    # 1 - 0.9 is next to 0.1 in float64.
    assert pytest.approx(0.1, rel=1e-12) == schedule(5)


# What is refused


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (
            dict(decay=0.9998, momentum=0.0002),
            ('decay=0.9998', 'momentum=0.0002', 'momentum = 1 - decay'),
        ),
        (
            dict(decay=0.9, schedule=dict(type='constant', decay=0.5)),
            ('decay=0.9', 'contradicts', 'give decay once'),
        ),
        (
            dict(momentum=0.1, schedule=dict(type='constant', decay=0.5)),
            ('momentum=0.1', 'contradicts'),
        ),
        (
            dict(schedule='constant', ema_type='ExpMomentumEMA'),
            ("schedule='constant'", 'ema_type', 'dict(type='),
        ),
        (
            dict(schedule='constant', gamma=3),
            ("schedule='constant'", 'gamma', 'dict(type='),
        ),
        (dict(tau=5, momentum=0.1), ('tau=5', 'gamma', 'ExpMomentumEMA')),
        (dict(tau=5, ema_type='ExpMomentumEMA'), ('tau=5', 'gamma')),
        (dict(tau=5, gamma=3), ('tau=5', 'gamma')),
        (
            dict(begin_iter=5, begin_epoch=2),
            ('begin_iter=5', 'begin_epoch=2', 'give the one'),
        ),
        (dict(gamma=3), ('gamma=3', 'ExpMomentumEMA')),
        (
            dict(gamma=3, ema_type='StochasticWeightAverage'),
            ('gamma=3', "'StochasticWeightAverage'", 'ExpMomentumEMA'),
        ),
        (dict(decay=1), ('decay=1 ', '[0, 1)')),
        (dict(decay='0.9'), ("decay='0.9'", '[0, 1)')),
        (dict(decay=1, ema_type='ExpMomentumEMA'), ('decay=1 ', '[0, 1)')),
        (dict(tau=0), ('tau=0', '(0, inf)', "'constant'")),
        (dict(schedule='exponental'), ("Did you mean 'exponential'?",)),
        (dict(schedule=dict(type='constant', tau=3)), ("no option 'tau'",)),
        (dict(schedule=dict(type='cosine', end_decay=2)), ('end_decay=2',)),
        (dict(schedule=5), ('schedule=5', "'exponential'")),
        (dict(schedule=lambda n: 2.0), ('2.0', '[0, 1]')),
        (dict(interval=0), ('interval=0', 'at least 1')),
        (dict(interval=1.5), ('interval=1.5', 'whole number')),
        (dict(interval=True), ('interval=True', 'whole number')),
        (dict(begin_iter=-1), ('begin_iter=-1', 'at least 0')),
        (dict(begin_epoch=-1), ('begin_epoch=-1', 'at least 0')),
        (dict(begin_epoch='2'), ("begin_epoch='2'", 'whole number')),
        (dict(update_buffers=1), ('update_buffers=1', 'True or False')),
        (dict(strict_load='no'), ("strict_load='no'", 'True or False')),
        (dict(enabled='no'), ("enabled='no'", 'True or False')),
        (dict(copied='head.*'), ("copied='head.*'", 'use a list of names')),
        (dict(copied=None), ('copied=None', 'use a list of names')),
        (dict(copied=[1]), ('copied=[1]', 'use a list of names')),
        (dict(copied=['']), ("copied=['']", 'use a list of names')),
        (dict(device='gpu'), ("device='gpu'", "'cpu'")),
        (
            dict(evaluate='raw', evaluate_on_origin=True),
            ("evaluate='raw' contradicts evaluate_on_origin=True", "'both'"),
        ),
        (
            dict(evaluate='ema', evaluate_on_ema=False),
            ("evaluate='ema' contradicts evaluate_on_ema=False", "'raw'"),
        ),
        (dict(evaluate_on_ema='yes'), ("evaluate_on_ema='yes'", 'True')),
        (dict(evaluate='emma'), ("evaluate='emma'", "Did you mean 'ema'?")),
        (dict(evaluate=True), ('evaluate=True', "'raw'", "'both'")),
        (dict(nonfinite='skipp'), ("'skipp'", "Did you mean 'skip'?")),
        (dict(momentum=0), ('momentum=0', '(0, 1)', '1 - decay')),
        (dict(momentum=1), ('momentum=1', '(0, 1)', '1 - decay')),
        (dict(momentum='x'), ("momentum='x'", '(0, 1)')),
        (
            dict(ema_type='ExpMomentumEMA', gamma=0),
            ('gamma=0', '(0, inf)'),
        ),
        (
            dict(ema_type='ExpMomentEMA'),
            ("ema_type='ExpMomentEMA'", "Did you mean 'ExpMomentumEMA'?"),
        ),
        (
            dict(ema_type='mmdet.Nothing'),
            ("'mmdet.Nothing'", "'StochasticWeightAverage'"),
        ),
        (dict(ema_type=5), ('ema_type=5', "'ExpMomentumEMA'")),
        (dict(ema_type=''), ("ema_type=''", "'ExpMomentumEMA'")),
    ],
)
def test_refused(options, words):
    """A bad value, or two that contradict, is one line: what, what to do."""
    message = message_of(**options)
    assert [] == [word for word in words if word not in message]


@pytest.mark.parametrize(
    ('name', 'answer'),
    [
        ('decai', "Did you mean 'decay'?"),
        ('moment', "Did you mean 'momentum'?"),
        ('begin_epochs', "Did you mean 'begin_epoch'?"),
        ('update_buffer', "Did you mean 'update_buffers'?"),
        ('strict', "Did you mean 'strict_load'?"),
        ('init_updates', "schedule=dict(type='exponential', init_updates=3)"),
        ('half_life', "schedule=dict(type='half_life', half_life=3)"),
        ('inv_gamma', "schedule=dict(type='power', inv_gamma=3)"),
        ('total_steps', "schedule=dict(type='cosine', total_steps=3)"),
        ('zzz', ''),
    ],
)
def test_unknown_option(name, answer):
    """It is answered with all names, and the nearest or where it goes."""
    message = message_of(**{name: 3})
    assert f'no option {name!r} (given: {name}=3)' in message
    assert all(known in message for known in NAMES)
    assert answer in message
    assert ('Did you mean' in message) is answer.startswith('Did you mean')


@pytest.mark.parametrize('device', ['cpu', torch.device('cpu')])
def test_device(device):
    """A device is given as text or object."""
    assert torch.device('cpu') == parse_options(device=device).device


# OpenMMLab's words


@pytest.mark.parametrize(
    'scope', ['', 'mmdet.', 'mmengine.', 'mmdet3d.', 'mmengine.model.']
)
def test_scope(scope):
    """A class is named with or without its scope."""
    for kind in ('ExpMomentumEMA', 'StochasticWeightAverage'):
        assert kind == schedule_of(ema_type=scope + kind).name


@pytest.mark.parametrize('gamma', [0.3, 0.6, 0.7, 1.1, 100])
def test_annealing_begins_with_a_copy(gamma):
    """The first annealed update copies, whatever gamma is."""
    schedule = schedule_of(ema_type='MomentumAnnealingEMA', gamma=gamma)
    assert 0.0 == schedule(1)


def test_interval_keeps_the_window():
    """Unlike mmengine's, the window does not change with the interval."""
    options = dict(ema_type='ExponentialMovingAverage', momentum=0.1)
    every, rare = schedule_of(**options), schedule_of(**options, interval=10)
    assert [every(n) for n in range(1, 50)] == [rare(n) for n in range(1, 50)]
    assert 0.0 == rare(1)
    assert math.isclose(0.9, rare(2))


def test_mmengine_is_what_we_think():
    """The default class and momentum of mmengine are those taken here."""
    peer = ExponentialMovingAverage(nn.Linear(1, 1))
    assert 0.0002 == peer.momentum
    assert peer.update_buffers is False
    assert 100 == MomentumAnnealingEMA(nn.Linear(1, 1)).gamma
