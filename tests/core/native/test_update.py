"""The compiled update: torch's bits, and nothing written of a bad step."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdet_ema.core.native import loader
from mmdet_ema.core.native import update as native_update
from mmdet_ema.core.native.update import NativeUpdate, can_update
from tests.core.models import raw_bytes
from tests.core.switches import switch_off

pytestmark = pytest.mark.skipif(
    loader.load() is None,
    reason='not built here, or not for this processor',
)

NAN, INF = float('nan'), float('inf')
# at and around 1 / 512 the way of guarding changes, at 0.5 the formula
WEIGHTS = (0.0, 1e-9, 2e-4, 1 / 512, 2.0**-8, 0.3, 0.4999999, 0.5, 0.9, 1.0)
KINDS = (torch.float32, torch.bfloat16, torch.float16)
# lines of 16, blocks of 64 and parts of 2**18 elements, and one more or less
SIZES = (1, 2, 15, 16, 17, 63, 64, 65, 79, 80, 127, 128, 129, 1000)
MANY = (*SIZES, 2**18 - 1, 2**18, 2**18 + 1, 300_007)


@pytest.fixture(params=['c', 'python'])
def layouts(request, monkeypatch):
    """Ask in C where tensors lie, where torch can, and then in Python."""
    if request.param == 'python':
        monkeypatch.setattr(native_update, 'note', lambda tensors: None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(sizes, generator, spread=1.0):
    return [torch.randn(n, generator=generator) * spread for n in sizes]


def bits(tensors):
    return [raw_bytes(tensor) for tensor in tensors]


def logged(update):
    """Return how many lines each part has in its log."""
    return update._parts.view(-1, 5)[:, 4].tolist()


def step(update, averages, raws, weight, gated=True):
    """Take a step that is finite; compare it with torch's bits."""
    twins = [average.clone() for average in averages]
    assert update.fits()
    assert update.update(weight, gated)
    for twin, raw in zip(twins, raws):
        expect(twin, raw, weight)
    assert bits(twins) == bits(averages), weight


def expect(average, raw, weight):
    """Take torch's step; a weight of 1 is a copy, signed zeros included."""
    if weight == 1:
        average.copy_(raw.detach())
    else:
        average.lerp_(raw.detach().float(), weight)


@pytest.mark.parametrize('dtype', [*KINDS, 'mixed'], ids=str)
@pytest.mark.parametrize('gated', [True, False])
def test_thousand_steps(gated, dtype):
    """Each of 1000 random steps has the bits of ``lerp_`` in float32.

    Some raw values stay near their averages, some jump by a thousand.
    """
    generator, choices = seeded(), np.random.default_rng(0)
    kinds = KINDS * len(SIZES) if dtype == 'mixed' else [dtype] * len(SIZES)
    raws = [raw.to(k) for raw, k in zip(draw(SIZES, generator), kinds)]
    averages = [raw.float().clone() for raw in raws]
    update = NativeUpdate(averages, raws)
    for _ in range(1000):
        for raw in raws:
            spread = float(choices.choice([0.0, 1e-6, 0.1, 1.0, 1e3]))
            noise = torch.randn(raw.shape, generator=generator) * spread
            raw.mul_(0.9).add_(noise.to(raw.dtype))
        weight = float(choices.choice([*WEIGHTS, choices.random()]))
        step(update, averages, raws, weight, gated)


@pytest.mark.parametrize('weight', WEIGHTS)
def test_formula(weight):
    """One step is the formula in double precision, to two roundings."""
    raws = draw(MANY, seeded(1))
    averages = draw(MANY, seeded(2))
    before = [average.double().numpy() for average in averages]
    update = NativeUpdate(averages, raws)
    assert update.update(weight, gated=True)
    for old, raw, average in zip(before, raws, averages):
        expected = (1 - weight) * old + weight * raw.double().numpy()
        largest = np.maximum(np.abs(old), np.abs(raw.numpy()))
        # one rounding of the difference of two such numbers, one of the
        # weight times it, one of the sum: each half a unit, 2**-24
        bound = 4 * 2.0**-24 * largest
        assert (np.abs(average.numpy() - expected) <= bound).all()


@pytest.mark.parametrize('dtype', KINDS, ids=str)
@pytest.mark.parametrize('bad', [NAN, INF, -INF])
@pytest.mark.parametrize('weight', WEIGHTS[1:])
def test_bad_step_changes_nothing(weight, bad, dtype):
    """Wherever NaN or Inf is, no bit of any average changes."""
    raws = [raw.to(dtype) for raw in draw(SIZES, seeded(3))]
    averages = draw(SIZES, seeded(4))
    update = NativeUpdate(averages, raws)
    before = bits(averages)
    for raw in raws:
        for place in {0, 1, 15, 16, 63, 64, len(raw) // 2, len(raw) - 1}:
            if place < len(raw):
                kept, raw[place] = raw[place].item(), bad
                assert not update.update(weight, gated=True)
                assert before == bits(averages)
                raw[place] = kept
    step(update, averages, raws, weight)


@pytest.mark.parametrize('threads', [1, 2, 4])
@pytest.mark.parametrize('weight', [2e-4, 0.3])
def test_bad_step_of_many_parts(weight, threads):
    """A part that ended well is taken back where a later one is bad."""
    raws, averages = draw(MANY, seeded(3)), draw(MANY, seeded(4))
    update = NativeUpdate(averages, raws)
    before, number = bits(averages), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for tensor, place in ((0, 0), (-4, 7), (-1, -1), (-1, 2**18)):
            kept = raws[tensor][place].item()
            raws[tensor][place] = NAN
            assert not update.update(weight, gated=True)
            assert before == bits(averages), (tensor, place)
            raws[tensor][place] = kept
        step(update, averages, raws, weight)
    finally:
        torch.set_num_threads(number)


@pytest.mark.parametrize('dtype', KINDS[1:], ids=str)
def test_every_number_of_a_short_dtype(dtype):
    """All 65,536 patterns are read as torch reads them."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    raw = patterns.view(dtype)
    average = torch.zeros(2**16)
    assert NativeUpdate([average], [raw]).update(1.0, gated=False)
    assert torch.allclose(raw.float(), average, 0, 0, equal_nan=True)
    finite = raw.isfinite()
    assert raw_bytes(raw[finite].float()) == raw_bytes(average[finite])
    bad = raw[~finite]
    assert len(bad) > 100
    for i in range(len(bad)):
        update = NativeUpdate([torch.zeros(1)], [bad[i : i + 1]])
        assert not update.update(2e-4, gated=True)
    good = raw[finite].clone()
    average = torch.ones(len(good))
    step(NativeUpdate([average], [good]), [average], [good], 2e-4)


def test_ungated_step_takes_everything_in():
    """Without the gate NaN and Inf reach the averages, as in ``lerp_``."""
    raws = [torch.tensor([1.0, NAN, INF, -INF, 2.0])]
    averages = [torch.ones(5)]
    update = NativeUpdate(averages, raws)
    for weight in (2e-4, 0.9):
        assert update.update(weight, gated=False)
    expected = torch.tensor([False, True, True, True, False])
    assert torch.equal(expected, ~averages[0].isfinite())


def test_log_is_used_and_put_back():
    """Averages that do not follow from the new ones come back as well."""
    raws = draw(MANY, seeded(5))
    averages = [torch.randn(n, generator=seeded(6)) * 1e-3 for n in MANY]
    averages[-1][::2] = 0
    averages[-2][5] = -0.0
    update = NativeUpdate(averages, raws)
    before = bits(averages)
    raws[-1][-1] = NAN
    assert not update.update(2e-4, gated=True)
    assert before == bits(averages)
    assert sum(logged(update)) > 100
    raws[-1][-1] = 0.5
    step(update, averages, raws, 2e-4)


def test_full_log():
    """Where no line follows, the rest is looked at first."""
    n = 2**20
    raws, averages = draw([n], seeded(7)), [torch.zeros(n)]
    update = NativeUpdate(averages, raws)
    before = bits(averages)
    for place in (0, n // 2, n - 1):
        kept, raws[0][place] = raws[0][place].item(), INF
        assert not update.update(2e-4, gated=True)
        assert before == bits(averages)
        raws[0][place] = kept
    room = update._plan.room
    step(update, averages, raws, 2e-4)
    assert [room] * len(logged(update)) == logged(update)


def test_extreme_values():
    """Subnormal, huge and signed zero values go by ``lerp_``, and back."""
    special = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-30, 3.4e38, -3.4e38, 1.0]
    values = torch.tensor(special)
    average, raw = torch.meshgrid(values, values, indexing='ij')
    average = average.flatten().repeat(3).clone()
    raw = raw.flatten().repeat(3).clone()
    update = NativeUpdate([average], [raw])
    for weight in WEIGHTS:
        before = average.clone()
        raw[-1], kept = NAN, raw[-1].item()
        assert not update.update(weight, gated=True)
        assert raw_bytes(before) == raw_bytes(average)
        raw[-1] = kept
        step(update, [average], [raw], weight)
        average.copy_(before)


def test_average_that_is_not_finite():
    """NaN in an average, of a step without the gate, hides no other."""
    for payload in (0x7FC00000, 0x7FC00001, -1):
        pattern = torch.tensor([payload], dtype=torch.int32)
        average = torch.ones(200)
        average[3:4] = pattern.view(torch.float32)
        raw = torch.ones(200)
        raw[3:4] = pattern.view(torch.float32)
        update = NativeUpdate([average], [raw])
        before = raw_bytes(average)
        assert not update.update(2e-4, gated=True)
        assert before == raw_bytes(average)


def test_flushed_subnormal_numbers():
    """The caller's setting for subnormal numbers plays no part."""
    raws, averages = [torch.full((99,), 3e-39)], [torch.full((99,), 2e-39)]
    update = NativeUpdate(averages, raws)
    plain = [average.clone() for average in averages]
    small = torch.tensor([1e-39])
    assert torch.set_flush_denormal(True)
    try:
        assert update.update(0.25, gated=True)
        # ... and is as it was
        assert 0 == (small * 2).item()
    finally:
        torch.set_flush_denormal(False)
    assert 0 < (small * 2).item()
    plain[0].lerp_(raws[0], 0.25)
    assert bits(plain) == bits(averages)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_values(data):
    """Any bits in averages and weights: ``lerp_``'s, or none changed."""
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
    anything = st.one_of(floats, st.sampled_from([NAN, INF, 1.0, 1.0, 1.0]))
    size = data.draw(st.integers(1, 90))
    average = torch.tensor(
        data.draw(st.lists(floats, min_size=size, max_size=size))
    )
    raw = torch.tensor(
        data.draw(st.lists(anything, min_size=size, max_size=size))
    )
    weight = data.draw(st.sampled_from(WEIGHTS[1:]))
    expected = average.clone()
    finite = bool(raw.isfinite().all())
    if finite:
        expect(expected, raw, weight)
    assert finite == NativeUpdate([average], [raw]).update(weight, True)
    assert raw_bytes(expected) == raw_bytes(average)


@pytest.mark.parametrize('threads', [2, 3, 16])
def test_threads(threads):
    """Any number of threads gives the bits of one."""
    number = torch.get_num_threads()

    def run(count):
        torch.set_num_threads(count)
        raws, averages = draw(MANY, seeded(8)), draw(MANY, seeded(9))
        update = NativeUpdate(averages, raws)
        for weight in (2e-4, 0.3, 0.75):
            assert update.update(weight, gated=True)
        return bits(averages)

    try:
        assert run(1) == run(threads)
    finally:
        torch.set_num_threads(number)


def test_without_openmp(monkeypatch):
    """Where its threads are not found, the calling thread does it all."""
    monkeypatch.setattr(native_update, 'parallel', lambda: None)
    number = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        raws, averages = draw(MANY, seeded(1)), draw(MANY, seeded(2))
        step(NativeUpdate(averages, raws), averages, raws, 2e-4)
    finally:
        torch.set_num_threads(number)


def test_replaced_memory_is_followed(layouts):
    """``.data = ...`` is read at the next update, and old memory kept."""
    raws = [torch.nn.Parameter(torch.randn(9, 7)) for _ in range(3)]
    raws.append(torch.nn.Parameter(torch.tensor(2.0)))
    averages = [raw.detach().clone() for raw in raws]
    update = NativeUpdate(averages, raws)
    with torch.no_grad():
        for weight in (2e-4, 0.5):
            for raw in raws:
                raw.data = raw.data + 1
            step(update, averages, raws, weight)


def test_another_kind_is_followed(layouts):
    """Weights that became half precision are read as such."""
    raws = [torch.nn.Parameter(torch.randn(9, 7)) for _ in range(3)]
    averages = [torch.randn(9, 7) for _ in raws]
    update = NativeUpdate(averages, raws)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            raws[1].data = raws[1].data.to(dtype)
            step(update, averages, raws, 2e-4)


def test_pickles_go_where_there_are_no_kernels(monkeypatch):
    """What was pickled with the kernels goes torch's way without them."""
    pickled = pickle.dumps(NativeUpdate([torch.zeros(3)], [torch.ones(3)]))
    switch_off(monkeypatch)
    assert not pickle.loads(pickled).fits()


def test_what_no_longer_fits(layouts):
    """Another layout, dtype or size is seen before anything is read."""

    def fits(replace):
        raw = torch.nn.Parameter(torch.zeros(4, 4))
        update = NativeUpdate([torch.zeros(4, 4)], [raw])
        assert update.fits()
        raw.data = replace(raw.data)
        return update.fits()

    assert fits(lambda data: data.clone())
    assert fits(lambda data: data)
    assert not fits(lambda data: data.t())
    assert not fits(lambda data: torch.zeros(5, 5)[:4, :4])
    assert not fits(lambda data: data.double())
    assert not fits(lambda data: torch.zeros(3, 3))
    assert not fits(lambda data: torch.zeros(0))
    assert not fits(lambda data: data[:3])
    assert not fits(lambda data: data.view(2, 8))


def test_vectors_that_no_longer_fit(layouts):
    """So it is for vectors; other strides show within 16 updates."""

    def fits(replace):
        base = torch.zeros(40)
        raw = torch.nn.Parameter(base[:20])
        update = NativeUpdate([torch.zeros(20)], [raw])
        raw.data = replace(base)
        return all(update.fits() for _ in range(16))

    assert fits(lambda base: base[:20])
    assert fits(lambda base: base[20:])
    assert not fits(lambda base: base[:19])
    assert not fits(lambda base: base[::2])
    assert not fits(lambda base: base[1::2])


def test_what_it_takes():
    """Dense tensors of the three dtypes, whose averages lie the same way."""
    one = torch.zeros(2, 3, 4, 5)
    last = one.contiguous(memory_format=torch.channels_last)
    assert can_update(one.clone(), one)
    assert can_update(last.clone(), last)
    assert can_update(torch.zeros(()), torch.zeros(()))
    assert not can_update(one, last)
    assert not can_update(one[:, :, :, :4], one[:, :, :, :4])
    assert not can_update(torch.zeros(0), torch.zeros(0))
    for dtype in (torch.float64, torch.bfloat16, torch.complex64):
        assert not can_update(one.to(dtype), one.to(dtype))
    for dtype in KINDS[1:]:
        assert can_update(one.clone(), one.to(dtype))
        assert not can_update(one.double(), one.to(dtype))
    assert not can_update(one.clone(), one.double())
    assert not can_update(one.to('meta'), one.to('meta'))
    row = torch.zeros(1, 4).expand(3, 4)
    assert not can_update(row, row)
    negated = torch._neg_view(torch.zeros(3))
    assert not can_update(negated, negated)

    class Subclass(torch.Tensor):
        pass

    special = torch.zeros(3).as_subclass(Subclass)
    assert not can_update(torch.zeros(3), special)


@pytest.mark.parametrize('numel', [1, 15, 16, 2**18, 2**20 + 5, 2**27 + 1])
def test_parts_cover_everything(numel):
    """Parts follow each other, in whole lines, to the last element."""
    bounds = native_update._bounds(numel)
    assert 1 <= len(bounds) <= 256
    assert 0 == bounds[0][0]
    assert numel == bounds[-1][1]
    for (_, stop), (start, _) in zip(bounds, bounds[1:]):
        assert stop == start
        assert 0 == stop % 16


def test_log_of_the_step_before():
    """A bad step brings back what was before it, not before an earlier one."""
    raws, averages = draw([4000], seeded(1)), [torch.zeros(4000)]
    averages[0][::50] = 1
    update = NativeUpdate(averages, raws)
    step(update, averages, raws, 2e-4)
    assert sum(logged(update)) > 10
    averages[0].fill_(1.0)
    raws[0].fill_(1.0)
    raws[0][-1] = NAN
    assert not update.update(2e-4, gated=True)
    assert torch.equal(torch.ones(4000), averages[0])


def test_threshold_of_the_two_ways():
    """Up to 1 / 512 a step is logged, above it is looked at first."""
    raws, averages = draw([2**16], seeded(1)), draw([2**16], seeded(2))
    update = NativeUpdate(averages, raws)
    step(update, averages, raws, 1 / 512)
    assert 10 < sum(logged(update)) < 2**16 / 16 / 8
    step(update, averages, raws, 1.001 / 512)
    assert 0 == sum(logged(update))


def moved_by_data(average):
    average.data = average.data.clone()


def moved_by_set(average):
    average.set_(average.clone())


def moved_to_shared_memory(average):
    average.share_memory_()


@pytest.mark.parametrize(
    'move',
    [
        moved_by_data,
        moved_by_set,
        moved_to_shared_memory,
    ],
)
def test_averages_that_are_moved(move, layouts):
    """Averages that somebody moved elsewhere are updated there."""
    raws, averages = draw(SIZES, seeded(1)), draw(SIZES, seeded(2))
    update = NativeUpdate(averages, raws)
    for average in averages:
        step(update, averages, raws, 2e-4)
        move(average)
        step(update, averages, raws, 0.3)


def test_copies_and_pickles(layouts):
    """A copy has addresses of its own, and so has what was pickled."""
    raws, averages = draw(SIZES, seeded(1)), draw(SIZES, seeded(2))
    update = NativeUpdate(averages, raws)
    before = bits(averages)
    pickled = pickle.loads(pickle.dumps(update))
    for other in (copy.deepcopy(update), copy.copy(pickled), pickled):
        lists = other._lists
        step(other, *lists, 2e-4)
        assert bits(lists[0]) != before == bits(averages)
