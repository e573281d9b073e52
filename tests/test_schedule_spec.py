"""From what a user writes to a schedule, and what is refused."""

import functools
import inspect
import types

import pytest

from mmdet_ema.averaging import (
    SCHEDULES,
    OptionError,
    Schedule,
    build_schedule,
)
from mmdet_ema.schedules import check_decay, make_schedule, options_of


def message_of(function, *args, **kwargs):
    with pytest.raises(OptionError) as error:
        function(*args, **kwargs)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('name', sorted(set(SCHEDULES) - {'cosine'}))
def test_every_name_builds(name):
    """Every name of the registry builds the schedule of that name."""
    schedule = build_schedule(name)
    assert name == schedule.name
    assert 0 <= schedule(1) <= 1


def test_registry_is_sorted():
    """The names come in alphabetical order in messages."""
    assert sorted(SCHEDULES) == list(SCHEDULES)


def test_options_in_a_dict_and_beside_the_name():
    """Any mapping is taken, and left alone; what it says wins."""
    spec = types.MappingProxyType(dict(type='exponential', decay=0.5, tau=10))
    expected = dict(decay=0.5, tau=10.0)
    assert expected == build_schedule(spec).options
    assert expected == build_schedule(dict(spec), decay=0.25).options
    assert 0.5 == build_schedule('constant', decay=0.5)(1)


def test_schedule_as_it_is():
    """A ready schedule is taken as it is."""
    schedule = build_schedule('constant')
    assert schedule is build_schedule(schedule)


def plain_function(n):
    return 0.5


class Callable:
    def __call__(self, n):
        return 1 / n


@pytest.mark.parametrize(
    ('function', 'name'),
    [
        (plain_function, 'plain_function'),
        (lambda n: 0.5, '<lambda>'),
        (functools.partial(plain_function), 'partial'),
        (Callable(), 'Callable'),
    ],
)
def test_callables(function, name):
    """Any callable from n to a decay is a schedule with its own name."""
    schedule = build_schedule(function)
    assert isinstance(schedule, Schedule)
    assert name in schedule.name
    assert function(2) == schedule(2)
    assert schedule.limit is None


@pytest.mark.parametrize(
    'spec',
    [plain_function, build_schedule('constant', decay=0.9)],
    ids=['function', 'schedule'],
)
def test_options_beside_a_callable(spec):
    """An option that a callable cannot take is refused, not ignored."""
    assert 'decay' in message_of(build_schedule, spec, decay=0.5)


@pytest.mark.parametrize(
    'value', [-0.1, 1.1, float('nan'), float('inf'), None, '0.5', [0.5], 1j]
)
def test_callable_with_a_bad_value(value):
    """A callable that returns no decay is refused before it is used."""
    message = message_of(build_schedule, lambda n: value)
    assert repr(value) in message
    assert 'n = 1' in message
    assert '[0, 1]' in message


def test_callable_that_turns_bad():
    """A callable that returns no decay later is named with its n."""
    schedule = build_schedule(lambda n: 0.5 if n < 7 else 2.0)
    assert 0.5 == check_decay(schedule, 6)
    message = message_of(check_decay, schedule, 7)
    assert '2.0' in message
    assert 'n = 7' in message


def test_whole_numbers_are_decays():
    """A callable may return 0 or 1."""
    assert 0.0 == check_decay(build_schedule(lambda n: 0), 1)
    assert isinstance(check_decay(build_schedule(lambda n: 1), 1), float)


@pytest.mark.parametrize(
    ('spec', 'near'),
    [
        ('exponental', "'exponential'"),
        ('anealing', "'annealing'"),
        (dict(type='constnt'), "'constant'"),
    ],
)
def test_unknown_name(spec, near):
    """An unknown name is answered with all names and the nearest one."""
    message = message_of(build_schedule, spec)
    assert f'schedule={spec!r}' in message
    assert [] == [name for name in SCHEDULES if repr(name) not in message]
    assert f'Did you mean {near}?' in message


@pytest.mark.parametrize(
    'spec', [None, 3, 0.9, ['constant'], dict(decay=0.9), dict(type=3), '']
)
def test_no_name_at_all(spec):
    """What is no name, dict or callable is refused."""
    message = message_of(build_schedule, spec)
    assert f'schedule={spec!r} is not known' in message
    assert 'callable n -> decay' in message


def test_unknown_option():
    """An unknown option is answered with those that there are."""
    message = message_of(build_schedule, dict(type='exponential', taw=3))
    assert "'exponential' has no option 'taw'" in message
    assert 'it takes decay, tau, init_updates.' in message
    assert "Did you mean 'tau'?" in message
    message = message_of(build_schedule, dict(type='constant', momentum=3))
    assert 'decay = 1 - momentum.' in message
    assert 'no options' in message_of(build_schedule, 'mean', decay=0.5)


def test_cosine_needs_total_steps():
    """The cosine ramp says how its missing option is written."""
    message = message_of(build_schedule, 'cosine')
    assert "needs the option 'total_steps'" in message
    assert "schedule=dict(type='cosine', total_steps=...)" in message
    assert 0.996 == build_schedule('cosine', total_steps=4)(1)


@pytest.mark.parametrize('name', sorted(SCHEDULES))
def test_options_of(name):
    """Options and which of them are required are those of the function."""
    parameters = inspect.getfullargspec(SCHEDULES[name])
    without = len(parameters.args) - len(parameters.defaults or ())
    expected = {a: i < without for i, a in enumerate(parameters.args)}
    assert expected == options_of(name)


@pytest.mark.parametrize('name', sorted(SCHEDULES))
def test_options_make_the_schedule_again(name):
    """The options that a schedule names make the same schedule."""
    given = dict(total_steps=50) if name == 'cosine' else {}
    schedule = make_schedule(name, given)
    again = make_schedule(name, schedule.options)
    assert schedule.options == again.options
    assert [schedule(n) for n in range(1, 99)] == [
        again(n) for n in range(1, 99)
    ]
