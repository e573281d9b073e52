"""Plain values: there and back, and readable anywhere."""

import io
import pickle
from collections import OrderedDict, defaultdict, namedtuple
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdet_ema.checkpoint.portable import (
    Codec,
    foreign,
    from_plain,
    to_plain,
)


class Point:
    """A type of a framework."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __eq__(self, other):
        return type(other) is Point and (self.x, self.y) == (other.x, other.y)

    __hash__ = None


class Special(Point):
    """A subclass, which has no codec."""


CODECS = [
    Codec(
        Point, lambda p: {'x': p.x, 'y': p.y}, lambda d: Point(d['x'], d['y'])
    ),
    Codec(
        Fraction,
        lambda f: {'n': f.numerator, 'd': f.denominator},
        lambda d: Fraction(d['n'], d['d']),
    ),
]

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    # some libraries switch subnormal numbers off for the whole process
    st.floats(allow_nan=False, allow_subnormal=False),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.fractions(),
    st.builds(Point, st.integers(), st.integers()),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.dictionaries(st.integers(), inner, max_size=3).map(OrderedDict),
        st.builds(Point, inner, inner),
    ),
    max_leaves=12,
)


def types_of(value):
    """Return the types of all containers in a value."""
    if isinstance(value, dict):
        return [type(value), *(types_of(v) for v in value.values())]
    if isinstance(value, (list, tuple)):
        return [type(value), *map(types_of, value)]
    if isinstance(value, Point):
        return [type(value), types_of(value.x), types_of(value.y)]
    return type(value)


@settings(deadline=None)
@given(value=VALUES)
def test_round_trip(value):
    """Any nesting of values comes back equal, in the same containers."""
    plain = to_plain(value, CODECS)
    assert [] == foreign(plain)
    back = from_plain(plain, CODECS)
    assert value == back
    assert types_of(value) == types_of(back)


def test_tags():
    """Types are dicts under the tag of their name, also inside of others."""
    name = f'{Point.__module__}.Point'
    plain = to_plain(Point(1, Fraction(1, 2)), CODECS)
    inner = {'__mmdet_ema_type__': 'fractions.Fraction', 'n': 1, 'd': 2}
    assert {'__mmdet_ema_type__': name, 'x': 1, 'y': inner} == plain
    # what is under the tag of an unknown type stays as it is
    assert plain == from_plain(plain, [])


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.float16(0.25), 0.25),
        (np.int64(-3), -3),
        (np.uint8(200), 200),
        (np.bool_(True), True),
        (np.str_('a'), 'a'),
        (np.bytes_(b'a'), b'a'),
        (np.complex128(1 + 2j), 1 + 2j),
        (np.longdouble(0.5), 0.5),
    ],
)
def test_numpy_scalars(value, expected):
    """They become the Python values that they equal, as keys too."""
    ((key, (item,)),) = to_plain({value: [value]}, []).items()
    assert expected == key == item
    assert type(expected) is type(key) is type(item)


def test_order_metadata_and_shared_tensors():
    """A ``state_dict`` keeps all three; the value itself is not changed."""
    state = torch.nn.Linear(1, 1).state_dict()
    inner = [np.float64(1.0), Point(1, 2), state['bias']]
    plain = to_plain({'b': inner, 'a': state}, CODECS)
    assert ['b', 'a'] == list(plain)
    assert type(plain['a']) is OrderedDict
    assert state._metadata == plain['a']._metadata
    assert state._metadata == from_plain(plain, CODECS)['a']._metadata
    assert plain['b'][2] is plain['a']['bias'] is state['bias']
    assert isinstance(inner[0], np.float64)


class OwnTensor(torch.Tensor):
    """A tensor subclass of somebody."""


Pair = namedtuple('Pair', 'a b')
PLAIN = [
    None,
    True,
    -(2**70),
    0.1,
    1 + 2j,
    'ä',
    b'\x00\xff',
    torch.bfloat16,
    torch.Size([1, 2]),
    torch.device('cpu'),
    {1, 2},
    (1, (2,)),
    {'a': [(1, {2})]},
    OrderedDict(a=1),
    torch.nn.Linear(1, 1).state_dict(),
    torch.nn.Parameter(torch.ones(2)),
    torch.ones(2, dtype=torch.bfloat16),
    torch.tensor(True),
]
FOREIGN = [
    (Fraction(1), ['fractions.Fraction']),
    ({Fraction(1): 2}, ['fractions.Fraction']),
    ([[Fraction(1)], {'a': Fraction(2)}], ['fractions.Fraction']),
    (Special(1, 2), [f'{__name__}.Special']),
    (defaultdict(int), ['collections.defaultdict']),
    (frozenset([1]), ['builtins.frozenset']),
    (slice(3), ['builtins.slice']),
    (print, ['builtins.builtin_function_or_method']),
    (Pair(1, Fraction(1)), [f'{__name__}.Pair', 'fractions.Fraction']),
    (torch.ones(1).as_subclass(OwnTensor), [f'{__name__}.OwnTensor']),
]
# torch 1.13 refuses floats, torch before 2.6 some other plain values
LATER = (float, complex, bytes, set, torch.device, torch.dtype)


def reads(value):
    """Return whether this torch reads a value with ``weights_only=True``."""
    file = io.BytesIO()
    torch.save([value], file)
    file.seek(0)
    try:
        return type(torch.load(file, weights_only=True)[0]) is type(value)
    except pickle.UnpicklingError:
        return False


@pytest.mark.parametrize('value', PLAIN, ids=repr)
def test_plain(value):
    """What is called plain can be read with ``weights_only=True``."""
    assert [] == foreign(value)
    assert reads(value) or isinstance(value, (LATER, dict))


@pytest.mark.parametrize(('value', 'expected'), FOREIGN, ids=repr)
def test_foreign(value, expected):
    """Types that are not plain are listed, each once; torch refuses them."""
    assert expected == foreign(value)
    assert not reads(value)


@pytest.mark.parametrize(
    ('value', 'name'),
    [(np.zeros((1, 2)), 'numpy.ndarray'), (np.float32(1), 'numpy.float32')],
)
def test_numpy_is_foreign(value, name):
    """Other packages may have allow-listed it in this process."""
    assert [name] == foreign([value])
