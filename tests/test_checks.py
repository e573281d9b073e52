"""Checks of single options: value, range and remedy in one line."""

import math

import pytest

from mmdet_ema.checks import (
    check_choice,
    check_count,
    check_flag,
    check_number,
)
from mmdet_ema.errors import OptionError, did_you_mean


@pytest.mark.parametrize('value', [0, 0.5, 1, 1.0])
def test_number(value):
    """A number in the range comes back as a float."""
    found = check_number('x', value, 0, 1)
    assert value == found
    assert isinstance(found, float)


@pytest.mark.parametrize(
    ('ends', 'interval'),
    [
        ({}, '[0, 1]'),
        (dict(low_open=True), '(0, 1]'),
        (dict(high_open=True), '[0, 1)'),
        (dict(low_open=True, high_open=True), '(0, 1)'),
    ],
)
def test_ends(ends, interval):
    """An open end is refused, a closed one is taken, as the text says."""
    for value, flag in ((0, 'low_open'), (1, 'high_open')):
        if flag in ends:
            with pytest.raises(OptionError) as error:
                check_number('x', value, 0, 1, **ends)
            assert interval in str(error.value)
        else:
            assert value == check_number('x', value, 0, 1, **ends)
    with pytest.raises(OptionError) as error:
        check_number('x', 2, 0, 1, **ends)
    assert interval in str(error.value)


@pytest.mark.parametrize('value', [True, None, '1', [1], 1j, object])
def test_no_number(value):
    """What is no real number is refused by name and value."""
    with pytest.raises(OptionError) as error:
        check_number('x', value, 0, 1)
    assert f'x={value!r} is not a number; use one in [0, 1].' == str(
        error.value
    )


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, 10**400])
def test_not_finite(value):
    """NaN and infinity are in no range, not even an endless one."""
    with pytest.raises(OptionError, match='out of range'):
        check_number('x', value, -math.inf, math.inf)


def test_hint():
    """The hint ends the message."""
    with pytest.raises(OptionError) as error:
        check_number('x', 5, 0, 1, hint='Do so.')
    expected = 'x=5 is out of range; use a number in [0, 1]. Do so.'
    assert expected == str(error.value)
    with pytest.raises(OptionError) as error:
        check_count('k', 0, 1, hint='Do so.')
    expected = 'k=0 is out of range; use a whole number of at least 1. Do so.'
    assert expected == str(error.value)


@pytest.mark.parametrize('value', [0, -3, 1.0, '2', None, True])
def test_no_count(value):
    """A count is a whole number of at least the least, and no bool."""
    with pytest.raises(OptionError) as error:
        check_count('k', value, 1)
    assert f'k={value!r}' in str(error.value)
    assert 'at least 1' in str(error.value)


@pytest.mark.parametrize('value', [0, 1, None, 'True'])
def test_no_flag(value):
    """A flag is True or False and nothing that looks like it."""
    with pytest.raises(OptionError) as error:
        check_flag('f', value)
    assert f'f={value!r} is not allowed; use True or False.' == str(
        error.value
    )


@pytest.mark.parametrize(
    ('value', 'near'),
    [('skp', " Did you mean 'skip'?"), ('xyz', ''), (None, ''), (['a'], '')],
)
def test_no_choice(value, near):
    """An unknown word is answered with the words that there are."""
    with pytest.raises(OptionError) as error:
        check_choice('w', value, ('skip', 'raise'))
    expected = f"w={value!r} is not known; choose one of 'skip', 'raise'."
    assert expected + near == str(error.value)


def test_what_is_right_comes_back():
    """A count, a flag and a known word come back as they are."""
    assert [3, 0] == [check_count('k', 3, 1), check_count('k', 0, 0)]
    assert check_flag('f', True) is True
    assert check_flag('f', False) is False
    assert 'raise' == check_choice('w', 'raise', ('skip', 'raise'))


def test_did_you_mean():
    """A near miss is answered with the word, anything else with nothing."""
    assert " Did you mean 'decay'?" == did_you_mean('dcay', ['decay', 'tau'])
    assert '' == did_you_mean('zzz', ['decay', 'tau'])


def test_errors_are_value_errors():
    """Users can catch every bad option as ``ValueError``."""
    assert issubclass(OptionError, ValueError)
