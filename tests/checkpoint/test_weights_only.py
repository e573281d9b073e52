"""Plain values: there and back, and readable anywhere."""

import io
import pickle
import sys
from collections import OrderedDict, defaultdict, namedtuple
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdet_ema.checkpoint.weights_only import (
    Codec,
    foreign,
    from_plain,
    to_plain,
)
from tests.averaging.models import run_python


class Point:
    """A type of a framework."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __eq__(self, other):
        return type(other) is Point and (self.x, self.y) == (other.x, other.y)

    __hash__ = None


class Special(Point):
    """A subclass, which has no codec."""


POINT = Codec(
    Point, lambda p: {'x': p.x, 'y': p.y}, lambda d: Point(d['x'], d['y'])
)
FRACTION = Codec(
    Fraction,
    lambda f: {'n': f.numerator, 'd': f.denominator},
    lambda d: Fraction(d['n'], d['d']),
)
ARRAY = Codec(
    np.ndarray,
    lambda a: {'tensor': torch.from_numpy(a)},
    lambda d: d['tensor'].numpy(),
)
CODECS = [POINT, FRACTION, ARRAY]

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


def test_codecs():
    """Types are dicts under the tag of their name, also inside of others."""
    plain = to_plain(Point(1, 2), CODECS)
    name = f'{Point.__module__}.Point'
    assert {'__mmdet_ema_type__': name, 'x': 1, 'y': 2} == plain
    value = Point(Fraction(1, 3), [Point(np.float32(0.5), None)])
    expected = Point(Fraction(1, 3), [Point(0.5, None)])
    plain = to_plain(value, CODECS)
    assert [] == foreign(plain)
    assert expected == from_plain(plain, CODECS)
    # what is under the tag of an unknown type stays as it is
    back = from_plain(to_plain({'a': Point(1, Fraction(1, 2))}, CODECS), [])
    assert back['a']['x'] == 1


def test_types_without_a_codec_are_named():
    """A subclass of a type with a codec, and an array, stay what they are."""
    for value, name in (
        (Special(1, 2), f'{__name__}.Special'),
        (np.zeros(()), 'numpy.ndarray'),
        (np.zeros((1, 2)), 'numpy.ndarray'),
    ):
        assert value is to_plain(value, [POINT, FRACTION])
        assert [name] == foreign([value])


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
    """NumPy scalars become the Python values that they equal."""
    plain = to_plain({'a': [value]}, [])['a'][0]
    assert expected == plain
    assert type(expected) is type(plain)


def test_numpy_keys():
    """NumPy scalars that are keys become Python values too."""
    plain = to_plain({np.int64(3): 1, np.str_('a'): 2}, [])
    assert {3: 1, 'a': 2} == plain
    assert [] == foreign(plain)


def test_arrays():
    """An array with a codec comes back with shape and dtype."""
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    plain = to_plain({'a': array}, CODECS)
    assert [] == foreign(plain)
    back = from_plain(plain, CODECS)['a']
    assert array.dtype == back.dtype
    assert array.tolist() == back.tolist()


def test_order_and_metadata():
    """Dicts keep their order and kind, and a ``state_dict`` its metadata."""
    state = torch.nn.Linear(1, 1).state_dict()
    plain = to_plain({'b': 1, 'a': state}, CODECS)
    assert ['b', 'a'] == list(plain)
    assert type(plain['a']) is OrderedDict
    assert state._metadata == plain['a']._metadata
    assert state._metadata == from_plain(plain, CODECS)['a']._metadata


def test_the_value_stays():
    """Nothing in it is changed, and tensors that are shared stay so."""
    tensor = torch.ones(2)
    inner = [np.float64(1.0), Point(1, 2), tensor]
    value = {'a': inner, 'b': tensor}
    plain = to_plain(value, CODECS)
    assert plain['a'][2] is plain['b'] is tensor
    assert value['a'] is inner
    assert isinstance(inner[0], np.float64)


class OwnTensor(torch.Tensor):
    """A tensor subclass of somebody."""


Pair = namedtuple('Pair', 'a b')


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (1, []),
        (torch.float32, []),
        (torch.ones(1), []),
        (torch.nn.Parameter(torch.ones(1)), []),
        (torch.Size([1]), []),
        (torch.device('cpu'), []),
        ({'a': [(1, {2})]}, []),
        (Fraction(1), ['fractions.Fraction']),
        (np.float32(1), ['numpy.float32']),
        ({Fraction(1): 2}, ['fractions.Fraction']),
        ([[Fraction(1)], {'a': Fraction(2)}], ['fractions.Fraction']),
        (defaultdict(int), ['collections.defaultdict']),
        (frozenset([1]), ['builtins.frozenset']),
        (slice(3), ['builtins.slice']),
        (print, ['builtins.builtin_function_or_method']),
        (Pair(1, Fraction(1)), [f'{__name__}.Pair', 'fractions.Fraction']),
        (torch.ones(1).as_subclass(OwnTensor), [f'{__name__}.OwnTensor']),
    ],
)
def test_foreign(value, expected):
    """Types that are not plain are listed, each once, in order."""
    assert expected == foreign(value)


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
    [[]],
    {1: {'a': ()}},
    OrderedDict(a=1),
    torch.nn.Linear(1, 1).state_dict(),
    torch.nn.Parameter(torch.ones(2)),
    torch.ones(2, dtype=torch.bfloat16),
    torch.tensor(True),
]

READ = """
import pickle, sys, torch
value = torch.load(sys.argv[1], weights_only=True)
assert not {'mmdet_ema', 'mmengine', 'mmdet', 'mmcv'} & set(sys.modules)
print(value['history'], len(value['plain']), value['array']['tensor'].tolist())
for path in sys.argv[2:]:
    try:
        torch.load(path, weights_only=True)
    except pickle.UnpicklingError:
        continue
    raise AssertionError(f'{path} loads')
"""
FOREIGN = [Fraction(1), np.float32(1), slice(3), frozenset([1]), Point(1, 2)]


def reads(value):
    """Return whether this torch reads a value with ``weights_only=True``."""
    file = io.BytesIO()
    torch.save([value], file)
    file.seek(0)
    try:
        return type(torch.load(file, weights_only=True)[0]) is type(value)
    except pickle.UnpicklingError:
        return False


# torch 1.13 refuses floats, torch before 2.6 some other plain values
LATER = (float, complex, bytes, set, torch.device, torch.dtype)


def test_files(tmp_path):
    """In a bare process what is plain loads, and what is foreign does not."""
    assert all(reads(value) for value in PLAIN if not isinstance(value, LATER))
    values = [value for value in PLAIN if reads(value)]
    value = {
        'history': {'n': np.int64(3)},
        'plain': values,
        'array': np.arange(3),
        'point': Point(1, 2),
    }
    plain = to_plain(value, CODECS)
    assert [] == foreign(plain)
    assert [] == foreign(PLAIN)
    torch.save(plain, tmp_path / 'a.pth')
    paths = []
    for number, value in enumerate(FOREIGN):
        assert [] != foreign(value)
        paths.append(tmp_path / f'{number}.pth')
        torch.save({'a': value}, paths[-1])
    run = run_python(READ, tmp_path / 'a.pth', *paths, OMP_NUM_THREADS='1')
    assert 0 == run.returncode, run.stderr
    assert f"{{'n': 3}} {len(values)} [0, 1, 2]" == run.stdout.strip()


def test_deep_nesting():
    """A nesting of a few hundred levels is no problem."""
    value = []
    for _ in range(min(300, sys.getrecursionlimit() // 8)):
        value = [value]
    assert value == from_plain(to_plain(value, CODECS), CODECS)
