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

from mmdet_ema.checkpoint import Codec, foreign, from_plain, to_plain
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


def test_tag():
    """A type with a codec is a dict under the tag of its name."""
    plain = to_plain(Point(1, 2), CODECS)
    name = f'{Point.__module__}.Point'
    assert {'__mmdet_ema_type__': name, 'x': 1, 'y': 2} == plain


def test_codecs_inside_codecs():
    """What a codec encodes is made plain in turn."""
    value = Point(Fraction(1, 3), [Point(np.float32(0.5), None)])
    expected = Point(Fraction(1, 3), [Point(0.5, None)])
    plain = to_plain(value, CODECS)
    assert [] == foreign(plain)
    assert expected == from_plain(plain, CODECS)


def test_subclasses_are_not_included():
    """A subclass of a type with a codec stays what it is, and is named."""
    value = Special(1, 2)
    assert value is to_plain(value, CODECS)
    assert [f'{__name__}.Special'] == foreign([value])


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


@pytest.mark.parametrize('shape', [(0,), (2,), (2, 3), (), (1,)])
def test_array_without_a_codec(shape):
    """An array for which there is no codec stays, and is named."""
    array = np.zeros(shape)
    plain = to_plain([array], [])
    assert plain[0] is array
    assert ['numpy.ndarray'] == foreign(plain)


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


def test_tensors_stay():
    """Tensors are not copied: those that are shared stay so."""
    tensor = torch.ones(2)
    plain = to_plain({'a': tensor, 'b': [tensor]}, CODECS)
    assert plain['a'] is plain['b'][0] is tensor


def test_the_value_stays():
    """Making a value plain changes nothing in it."""
    inner = [np.float64(1.0), Point(1, 2)]
    value = {'a': inner}
    to_plain(value, CODECS)
    assert value == {'a': inner}
    assert isinstance(inner[0], np.float64)


def test_unknown_tag():
    """A value under the tag of an unknown type stays as it is."""
    plain = to_plain({'a': Point(1, Fraction(1, 2))}, CODECS)
    back = from_plain(plain, [FRACTION])
    assert back['a']['x'] == 1
    assert Fraction(1, 2) == back['a']['y']


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
import sys, torch
value = torch.load(sys.argv[1], weights_only=True)
assert not {'mmdet_ema', 'mmengine', 'mmdet', 'mmcv'} & set(sys.modules)
print(value['history'], len(value['plain']), value['array']['tensor'].tolist())
"""


def reads(value):
    """Return whether this torch reads a value with ``weights_only=True``."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    try:
        return value == torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        return False


# torch 1.13 refuses floats, torch before 2.6 some other plain values
LATER = (float, complex, bytes, set, torch.device, torch.dtype)
READS_ALL = all(map(reads, (0.5, 1j, b'x', {1}, torch.float32)))
TOO_OLD = 'this torch reads fewer plain values with weights_only=True'


@pytest.mark.skipif(not READS_ALL, reason=TOO_OLD)
def test_file(tmp_path):
    """A plain file loads with ``weights_only=True`` in a bare process."""
    value = {
        'history': {'loss': np.float64(0.5), 'n': np.int64(3)},
        'plain': PLAIN,
        'array': np.arange(3),
        'point': Point(1, 2),
    }
    plain = to_plain(value, CODECS)
    assert [] == foreign(plain)
    torch.save(plain, tmp_path / 'a.pth')
    run = run_python(READ, tmp_path / 'a.pth', OMP_NUM_THREADS='1')
    assert 0 == run.returncode, run.stderr
    expected = f"{{'loss': 0.5, 'n': 3}} {len(PLAIN)} [0, 1, 2]"
    assert expected == run.stdout.strip()


@pytest.mark.parametrize('value', PLAIN, ids=lambda v: type(v).__name__)
def test_what_is_plain_loads(value, tmp_path):
    """Everything that is not foreign loads with ``weights_only=True``."""
    assert [] == foreign(value)
    if isinstance(value, LATER) and not reads(value):
        pytest.skip(TOO_OLD)
    torch.save({'a': value}, tmp_path / 'a.pth')
    found = torch.load(tmp_path / 'a.pth', weights_only=True)['a']
    assert type(value) is type(found)


@pytest.mark.parametrize(
    'value',
    [Fraction(1), np.float32(1), slice(3), frozenset([1]), Point(1, 2)],
    ids=['fraction', 'numpy', 'slice', 'frozenset', 'point'],
)
def test_what_is_foreign_does_not_load(value, tmp_path):
    """What is called foreign is refused by ``weights_only=True``."""
    assert [] != foreign(value)
    path = tmp_path / 'a.pth'
    torch.save({'a': value}, path)
    code = 'import sys, torch; torch.load(sys.argv[1], weights_only=True)'
    run = run_python(code, path, OMP_NUM_THREADS='1')
    assert 0 != run.returncode
    assert 'Weights only load failed' in run.stderr


def test_deep_nesting():
    """A nesting of a few hundred levels is no problem."""
    value = []
    for _ in range(min(300, sys.getrecursionlimit() // 8)):
        value = [value]
    assert value == from_plain(to_plain(value, CODECS), CODECS)
