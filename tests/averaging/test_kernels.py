"""The fast plan, its plain twin and NumPy float64, step by step."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_ema.averaging import capabilities
from mmdet_ema.averaging.copying import CopyPlan
from mmdet_ema.averaging.kernels import (
    UpdatePlan,
    _add_weighted,
    average_dtype,
    reference_update,
)
from tests.averaging.models import FLOAT8, raw_bytes, storage_of

DECAYS = (0.0, 0.0005, 0.3, 0.5, 0.9, 0.9999, 1.0)
NARROW = (torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.float32, torch.complex64, torch.complex128)
SHAPES = ((3, 4), (), (0,), (5,), (2, 0, 3), (33,))


def draw(shapes, dtype, generator):
    """Draw tensors near 1 in magnitude, exact in ``dtype``."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [
        torch.randn(shape, dtype=wide, generator=generator).to(dtype)
        for shape in shapes
    ]


def exact(tensors):
    """Return tensors as NumPy arrays of double precision, exactly."""
    return [
        t.to(torch.complex128 if t.is_complex() else torch.float64)
        .numpy()
        .copy()
        for t in tensors
    ]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('dtype', WIDE + NARROW, ids=str)
def test_thousand_steps(dtype):
    """Each of 1000 steps is the formula, to a few roundings of the dtype.

    The decay changes at every step; the plain twin takes the same steps and
    ends with the same bits.
    """
    generator = seeded()
    raws = draw(SHAPES, dtype, generator)
    fast = [raw.to(average_dtype(dtype), copy=True) for raw in raws]
    plain = [average.clone() for average in fast]
    plan = UpdatePlan(fast, raws)
    eps = torch.finfo(average_dtype(dtype)).eps
    choices = np.random.default_rng(0)
    for step in range(1000):
        before = exact(fast)
        for raw, new in zip(raws, draw(SHAPES, dtype, generator)):
            raw.copy_(new)
        decay = float(choices.choice([*DECAYS, choices.random()]))
        plan.update(decay)
        for average, raw in zip(plain, raws):
            reference_update(average, raw, decay)
        for old, raw, average in zip(before, exact(raws), exact(fast)):
            expected = decay * old + (1 - decay) * raw
            # Three roundings of numbers as large as the inputs, plus those
            # of the decay itself: at most 4 ulps of the largest input.
            bound = 4 * eps * np.maximum(np.abs(old), np.abs(raw))
            assert (np.abs(average - expected) <= bound).all(), (step, decay)
    for average, other in zip(fast, plain):
        assert raw_bytes(other) == raw_bytes(average)


@pytest.mark.parametrize('decay', DECAYS)
@pytest.mark.parametrize('dtype', WIDE + NARROW, ids=str)
def test_every_decay(dtype, decay):
    """Fifty steps of one decay follow NumPy in double precision."""
    generator = seeded(1)
    raws = draw(SHAPES, dtype, generator)
    averages = [raw.to(average_dtype(dtype), copy=True) for raw in raws]
    plan = UpdatePlan(averages, raws)
    expected = exact(averages)
    steps = 50
    for _ in range(steps):
        for raw, new in zip(raws, draw(SHAPES, dtype, generator)):
            raw.copy_(new)
        plan.update(decay)
        pairs = zip(expected, exact(raws))
        expected = [decay * old + (1 - decay) * raw for old, raw in pairs]
    eps = torch.finfo(average_dtype(dtype)).eps
    for average, wanted in zip(exact(averages), expected):
        # 4 ulps a step of inputs that are below 5 in magnitude.
        bound = 4 * eps * 5 * steps
        assert (np.abs(average - wanted) <= bound).all()


@pytest.mark.parametrize('dtype', WIDE + NARROW, ids=str)
def test_decay_zero_copies(dtype):
    """A decay of 0 gives the raw values themselves."""
    raws = draw(SHAPES, dtype, seeded())
    averages = [torch.ones_like(r, dtype=average_dtype(dtype)) for r in raws]
    UpdatePlan(averages, raws).update(0.0)
    for average, raw in zip(averages, raws):
        assert torch.equal(raw.to(average.dtype), average)


@pytest.mark.parametrize('dtype', WIDE + NARROW, ids=str)
def test_decay_one_keeps(dtype):
    """A decay of 1 leaves the averages as they are."""
    raws = draw(SHAPES, dtype, seeded())
    averages = [torch.ones_like(r, dtype=average_dtype(dtype)) for r in raws]
    UpdatePlan(averages, raws).update(1.0)
    for average in averages:
        assert torch.equal(torch.ones_like(average), average)


@pytest.mark.parametrize('dtype', NARROW, ids=str)
def test_gain_of_low_precision(dtype):
    """The average of constant raw weights tends to them, without a bias.

    float32 rounds 0.9999 so that ``avg * d + w * raw`` settles 1.7e-4 below
    the weights; half of the averages come from above, half from below, so
    that the standstill of float32 itself cancels in the mean.
    """
    raw = (1 + torch.rand(4000, generator=seeded())).to(dtype)
    average = raw.float() * torch.tensor([0.9, 1.1]).repeat(2000)
    plan = UpdatePlan([average], [raw])
    steps = 20_000
    for _ in range(steps):
        plan.update(0.9999)
    ratio = average.double() / raw.double()
    # What the formula leaves of 0.9 and 1.1 has the mean 0, too.
    assert abs(float(ratio.mean()) - 1) < 2e-5
    left = np.float64(0.9999) ** steps * 0.1
    # float32 stands still where a step is below half an ulp of 1..2:
    # 6e-8 / 1e-4, at either end.
    assert float((ratio - 1).abs().max()) <= left + 1.3e-3


@pytest.mark.parametrize('decay', [0.0005, 0.5, 0.9999, 1 - 2**-20])
@pytest.mark.parametrize('dtype', WIDE + NARROW, ids=str)
def test_equal_weights_stay(dtype, decay):
    """An average that equals its raw weights does not drift."""
    raws = draw(SHAPES, dtype, seeded())
    averages = [raw.to(average_dtype(dtype), copy=True) for raw in raws]
    plan = UpdatePlan(averages, raws)
    for _ in range(2000):
        plan.update(decay)
    eps = torch.finfo(average_dtype(dtype)).eps
    for average, raw in zip(exact(averages), exact(raws)):
        # A rounding a step in the mixed case is pulled back by 1 - d:
        # at rest at most half an ulp over 1 - d, below 2000 half ulps.
        drift = 0 if dtype in WIDE else min(2000, 1 / (1 - decay)) * eps
        assert (np.abs(average - raw) <= drift * np.abs(raw)).all()


@pytest.mark.parametrize('dtype', NARROW, ids=str)
@pytest.mark.parametrize('decay', [1e-300, 1e-30, 1e-9, 0.0005, 0.49, 0.9])
def test_large_weights_do_not_overflow(dtype, decay):
    """Weights near the largest number of their dtype are averaged."""
    value = torch.finfo(dtype).max / 4
    raw = torch.full((9,), value).to(dtype)
    average = torch.zeros(9)
    UpdatePlan([average], [raw]).update(decay)
    expected = (1 - decay) * raw.double()
    # Three roundings in float32.
    torch.testing.assert_close(average.double(), expected, rtol=4e-7, atol=0)


def test_channels_last():
    """Memory formats may differ, and each tensor keeps its own."""
    generator = seeded()
    raw = torch.randn(2, 3, 4, 5, generator=generator)
    last = raw.to(memory_format=torch.channels_last)
    for first, second in ((raw, last), (last, raw), (last, last)):
        for dtype in (torch.float32, torch.bfloat16):
            other = second.to(dtype)
            average = first.clone()
            strides = average.stride()
            UpdatePlan([average], [other]).update(0.75)
            expected = 0.75 * first.double() + 0.25 * other.double()
            # Three roundings of float32.
            torch.testing.assert_close(
                average.double(), expected, rtol=4e-7, atol=1e-7
            )
            assert strides == average.stride()


def test_raws_stay():
    """An update changes no raw tensor."""
    raws = [t for d in WIDE + NARROW for t in draw(SHAPES, d, seeded())]
    before = [raw.clone() for raw in raws]
    averages = [
        torch.zeros_like(r, dtype=average_dtype(r.dtype)) for r in raws
    ]
    UpdatePlan(averages, raws).update(0.4)
    UpdatePlan(averages, raws).update(0.6)
    assert all(torch.equal(b, r) for b, r in zip(before, raws))


def test_raws_are_read_anew():
    """A plan follows in-place changes and ``.data = ...`` of the raws."""
    raw = torch.nn.Parameter(torch.zeros(3))
    average = torch.zeros(3)
    plan = UpdatePlan([average], [raw])
    with torch.no_grad():
        raw.add_(4)
        plan.update(0.5)
        assert torch.equal(torch.full((3,), 2.0), average)
        raw.data = torch.full((3,), 8.0)
        plan.update(0.5)
    assert torch.equal(torch.full((3,), 5.0), average)


def test_empty_plans():
    """Without tensors nothing happens."""
    UpdatePlan([], []).update(0.5)
    CopyPlan([], []).copy()


def test_copy_plan_is_exact():
    """Integers, booleans and floats, NaN included, are copied exactly."""
    raws = [
        torch.tensor([2**62, -1]),
        torch.tensor([True, False]),
        torch.tensor(3, dtype=torch.uint8),
        torch.tensor([float('nan'), float('-inf'), -0.0]),
        torch.tensor([1.5, 3e38], dtype=torch.bfloat16),
        torch.zeros(0),
    ]
    copies = [torch.zeros_like(raw) for raw in raws]
    CopyPlan(copies, raws).copy()
    assert [raw_bytes(r) for r in raws] == [raw_bytes(c) for c in copies]


@pytest.mark.parametrize(
    ('dtype', 'expected'),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        *((dtype, torch.float32) for dtype in FLOAT8),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex64),
        (torch.complex128, torch.complex128),
        (torch.int64, torch.int64),
        (torch.uint8, torch.uint8),
        (torch.bool, torch.bool),
    ],
)
def test_average_dtype(dtype, expected):
    """Averages of less than 32 bits are float32; the rest keep theirs."""
    assert expected == average_dtype(dtype)


@pytest.mark.parametrize('dtype', FLOAT8, ids=str)
def test_eight_bits(dtype):
    """8-bit floats are averaged in float32, as ``average_dtype`` says."""
    raw = torch.tensor([0.5, 2.0, -4.0]).to(dtype)
    average = torch.zeros(3)
    UpdatePlan([average], [raw]).update(0.25)
    assert torch.equal(torch.tensor([0.375, 1.5, -3.0]), average)


class CountCalls(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('decay', [0.0005, 0.9999])
@pytest.mark.parametrize('many', [1, 300])
def test_handful_of_calls(many, decay):
    """An update is a call a dtype, however many tensors.

    Before torch 2.0 there is no call for many float32 tensors on the host.
    """
    raws = [torch.ones(2) for _ in range(many)]
    raws += [torch.ones(2, dtype=torch.float64) for _ in range(many)]
    averages = [torch.zeros_like(raw) for raw in raws]
    plan = UpdatePlan(averages, raws)
    with CountCalls() as count:
        plan.update(decay)
    if not capabilities.HAS_FOREACH_LERP:
        assert ['lerp_'] * 2 * many == count.calls
        return
    assert len(count.calls) == 2, count.calls
    assert all(n.startswith(('_foreach', '_fused')) for n in count.calls)


def strided(dtype, generator):
    """Draw pairs of a start and a raw tensor, alike and unlike in memory."""
    image = draw([(2, 3, 4, 5)], dtype, generator)[0]
    matrix = draw([(6, 7)], dtype, generator)[0]
    last = image.contiguous(memory_format=torch.channels_last)
    columns = draw([(6, 9)], dtype, generator)[0][:, 1:8]
    every = draw([(80,)], dtype, generator)[0][::2]
    row = draw([(1, 7)], dtype, generator)[0].expand(6, 7)
    return [
        (last, last),
        (image, last),
        (last, image),
        (matrix.t(), matrix.t()),
        (matrix.t().contiguous(), matrix.t()),
        (columns, columns),
        (columns.contiguous(), columns),
        (every, every),
        (matrix, row),
        (matrix[0, 0], matrix[0, 0]),
        (image[:, :0], image[:, :0]),
        (last.permute(1, 0, 3, 2), last.permute(1, 0, 3, 2)),
    ]


def paired(pairs, dtype):
    """Return averages in the layout of the starts, and the raw tensors."""
    averages = []
    for start, _ in pairs:
        size = storage_of(start).nbytes() // start.element_size()
        room = torch.empty(size, dtype=average_dtype(dtype))
        laid = room.as_strided(
            start.shape, start.stride(), start.storage_offset()
        )
        averages.append(laid.copy_(start))
    return averages, [raw for _, raw in pairs]


def refill(raws, dtype, generator):
    """Give raw tensors new values, the rows of an expanded one the same."""
    for raw in raws:
        target = raw[:1] if 0 in raw.stride() and raw.dim() else raw
        target.copy_(draw([target.shape], dtype, generator)[0])


def check_last_place(average, old, raw, decay):
    """Check a step into float32 against the formula in double precision.

    Four roundings (two products, two sums; two where the processor fuses
    them), each of half a unit in the last place of the larger input.
    """
    expected = decay * old.double() + (1 - decay) * raw.double()
    largest = torch.maximum(old.abs(), raw.float().abs()).double()
    unit = 2.0**-23 * torch.exp2(torch.floor(torch.log2(largest)))
    assert ((average - expected).abs() <= 2 * unit).all(), decay


@pytest.mark.parametrize('dtype', [*WIDE, *NARROW, *FLOAT8], ids=str)
def test_thousand_steps_of_every_layout(dtype):
    """Whatever lies in memory how, 1000 steps are those of the plain twin.

    Bit for bit: channels last, transposed, sliced, expanded, zero-sized, alike
    and unlike on both sides.
    """
    generator = seeded(5)
    fast, raws = paired(strided(dtype, generator), dtype)
    slow = [average.clone() for average in fast]
    strides = [average.stride() for average in fast]
    plan = UpdatePlan(fast, raws)
    choices = np.random.default_rng(1)
    for step in range(1000):
        refill(raws, dtype, generator)
        decay = float(choices.choice([*DECAYS, choices.random()]))
        plan.update(decay)
        for average, other, raw in zip(fast, slow, raws):
            reference_update(other, raw, decay)
            assert torch.equal(other, average), (step, decay)
    assert strides == [average.stride() for average in fast]


@pytest.mark.parametrize('dtype', NARROW, ids=str)
def test_thousand_mixed_steps(dtype):
    """What a GPU does with half precision, done on the host.

    No float32 copies are made there, so the steps are not the twin's.
    """
    generator, choices = seeded(5), np.random.default_rng(1)
    raws = draw(SHAPES, dtype, generator)
    averages = [raw.float() for raw in raws]
    for _ in range(1000):
        refill(raws, dtype, generator)
        decay = float(choices.choice([*DECAYS, choices.random()]))
        before = [average.clone() for average in averages]
        _add_weighted(averages, raws, decay)
        for average, old, raw in zip(averages, before, raws):
            check_last_place(average, old, raw, decay)


@pytest.fixture
def two_threads():
    """Let torch use two threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize('dtype', WIDE + NARROW, ids=str)
def test_two_threads(dtype, two_threads):
    """Two threads give the bits of one, in tensors that they share."""
    shapes = [(300_007,), (3, 5), (512, 33, 3, 3), (40_000,)]

    def run(threads):
        torch.set_num_threads(threads)
        generator = seeded(6)
        raws = draw(shapes, dtype, generator)
        averages = [raw.to(average_dtype(dtype), copy=True) for raw in raws]
        plan = UpdatePlan(averages, raws)
        for decay in (0.9999, 0.3, 0.75, 0.0005):
            for raw in raws:
                raw.mul_(-0.75)
            plan.update(decay)
        return [raw_bytes(average) for average in averages]

    assert run(1) == run(2)


FUSED_DTYPES = (torch.float32, torch.float64)
needs_fused = pytest.mark.skipif(
    not capabilities.can_fuse(torch.device('cpu'), torch.float32),
    reason='this torch has no fused step on the host',
)


@needs_fused
@pytest.mark.parametrize('dtype', FUSED_DTYPES, ids=str)
def test_flag_that_is_not_set(dtype):
    """With a flag of 0, an update is the plain one.

    Bit for bit from a decay of 0.5 on; below it the plain one starts from the
    raw weights, and both are the formula to three roundings.
    """
    generator = seeded(7)
    raws = draw(SHAPES, dtype, generator)
    flagged = draw(SHAPES, dtype, generator)
    plain = [average.clone() for average in flagged]
    plans = (
        UpdatePlan(flagged, raws, fused=True),
        UpdatePlan(plain, raws, fused=True),
    )
    flag, eps = torch.zeros(()), torch.finfo(dtype).eps
    for decay in (1e-9, 0.0005, 0.3, 0.5, 0.5000001, 0.9, 0.9999, 1.0):
        for raw, new in zip(raws, draw(SHAPES, dtype, generator)):
            raw.copy_(new)
        assert plans[0].can_skip(decay)
        plans[0].update(decay, flag)
        plans[1].update(decay)
        for average, other in zip(flagged, plain):
            if decay > 0.5:
                assert raw_bytes(other) == raw_bytes(average)
            else:
                gap = (average - other).abs()
                assert (gap <= 3 * eps * 5).all(), decay
                other.copy_(average)


@needs_fused
def test_flag_that_is_set():
    """With a flag of 1, no bit of any average changes."""
    averages = draw(SHAPES, torch.float32, seeded())
    before = [raw_bytes(average) for average in averages]
    raws = [torch.full_like(a, float('nan')) for a in averages]
    plan = UpdatePlan(averages, raws, fused=True)
    for decay in (1e-9, 0.0005, 0.5, 0.9999, 1.0):
        assert plan.can_skip(decay)
        plan.update(decay, torch.ones(()))
    assert before == [raw_bytes(average) for average in averages]


@needs_fused
def test_what_cannot_skip():
    """A decay of 0, and tensors for other kernels, take no flag."""
    ones, low = torch.ones(3), torch.ones(3, dtype=torch.bfloat16)
    assert UpdatePlan([], [], fused=True).can_skip(0.5)
    assert UpdatePlan([ones.clone()], [ones], fused=True).can_skip(0.5)
    assert not UpdatePlan([ones.clone()], [ones], fused=True).can_skip(0.0)
    assert not UpdatePlan(
        [ones.clone(), ones], [ones, low], fused=True
    ).can_skip(0.5)
    sliced = torch.ones(4, 4)[:, :2]
    assert not UpdatePlan(
        [sliced.contiguous()], [sliced], fused=True
    ).can_skip(0.5)
    whole = torch.ones(3, dtype=torch.complex64)
    assert not UpdatePlan([whole.clone()], [whole], fused=True).can_skip(0.5)


def replaced_by_a_transposed_view(raw):
    raw.data = raw.data.t()


def replaced_by_other_strides(raw):
    raw.data = raw.data.t().contiguous().t()


def replaced_by_other_memory(raw):
    raw.data = raw.data.neg()


def replaced_by_a_slice(raw):
    raw.data = torch.cat([raw.data, raw.data], 1)[:, 2:6]


def replaced_by_an_expanded_row(raw):
    raw.data = raw.data[:1].neg().expand(4, 4)


def changed_in_place(raw):
    raw.data.neg_()


@pytest.mark.parametrize('decay', [0.25, 0.75])
@pytest.mark.parametrize(
    'replace',
    [
        replaced_by_a_transposed_view,
        replaced_by_other_strides,
        replaced_by_other_memory,
        replaced_by_a_slice,
        replaced_by_an_expanded_row,
        changed_in_place,
    ],
)
def test_data_that_is_replaced(replace, decay):
    """A plan reads what ``.data`` is now, wherever and however it lies."""
    raws = [
        torch.nn.Parameter(torch.arange(16.0).view(4, 4) + k) for k in (0, 1)
    ]
    averages = [torch.full((4, 4), float(k)) for k in (2, 3)]
    plan = UpdatePlan(averages, raws, fused=True)
    with torch.no_grad():
        for raw in raws[1:], raws[:1], raws:
            for tensor in raw:
                replace(tensor)
            before = [average.clone() for average in averages]
            plan.update(decay)
            for old, average, tensor in zip(before, averages, raws):
                expected = decay * old + (1 - decay) * tensor
                torch.testing.assert_close(average, expected)


@pytest.mark.parametrize('which', [0, 1])
def test_data_of_another_size(which):
    """Weights that do not fit any more are an error, not read past."""
    raws = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    averages = [torch.zeros(4, 4) for _ in raws]
    plan = UpdatePlan(averages, raws)
    raws[which].data = torch.ones(3, 5)
    with torch.no_grad(), pytest.raises(RuntimeError):
        plan.update(0.75)


@pytest.mark.parametrize('decay', [0.25, 0.75])
@pytest.mark.parametrize('which', [0, 1])
@pytest.mark.parametrize(
    ('dtype', 'other'),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
    ],
)
def test_data_of_another_dtype(dtype, other, which, decay):
    """Weights of another dtype are averaged by the formula, or refused."""
    raws = [torch.nn.Parameter(torch.full((3,), 4.0, dtype=dtype))] * 1
    raws.append(torch.nn.Parameter(torch.full((3,), 8.0, dtype=dtype)))
    averages = [torch.ones(3, dtype=average_dtype(dtype)) for _ in raws]
    plan = UpdatePlan(averages, raws)
    raws[which].data = raws[which].data.to(other)
    with torch.no_grad():
        try:
            plan.update(decay)
        except RuntimeError:
            return
    for average, value in zip(averages, (4.0, 8.0)):
        expected = torch.full_like(average, decay + (1 - decay) * value)
        # Three roundings in float32.
        torch.testing.assert_close(average, expected, rtol=4e-7, atol=0)


def test_only_zero_sized():
    """Tensors without elements need no kernel, and may take a flag."""
    pairs = [(torch.zeros(0), torch.zeros(0)), (torch.ones(2, 0),) * 2]
    plan, flag = UpdatePlan(*map(list, zip(*pairs))), torch.ones(())
    with CountCalls() as count:
        plan.update(0.5)
        assert plan.can_skip(0.5)
        plan.update(0.5, flag)
    assert [] == count.calls


def test_many_tensors():
    """Five thousand tensors are averaged, each by its own raw tensor."""
    raws = [torch.full((1 + k % 7,), float(k)) for k in range(5000)]
    averages = [torch.zeros_like(raw) for raw in raws]
    UpdatePlan(averages, raws).update(0.75)
    found = torch.stack([average[-1] for average in averages])
    assert torch.equal(torch.arange(5000.0) / 4, found)
    assert all(bool((average == average[0]).all()) for average in averages)


@pytest.mark.parametrize('default', [torch.float64, torch.float16], ids=str)
def test_default_dtype(default):
    """What torch makes by default plays no part."""
    before = torch.get_default_dtype()
    raws = [torch.ones(3), torch.ones(3, dtype=torch.bfloat16)]
    averages = [torch.zeros(3), torch.zeros(3)]
    try:
        torch.set_default_dtype(default)
        capabilities._remembered.cache_clear()
        UpdatePlan(averages, raws).update(0.75)
    finally:
        torch.set_default_dtype(before)
        capabilities._remembered.cache_clear()
    for average in averages:
        # Three roundings in float32.
        wanted = torch.full((3,), 0.25, dtype=torch.float32)
        torch.testing.assert_close(average, wanted, rtol=4e-7, atol=0)


@pytest.mark.parametrize('decay', [0.25, 0.75])
def test_raws_of_inference_mode(decay):
    """Raw tensors that were made in inference mode are averaged, too."""
    with torch.inference_mode():
        raws = [torch.full((3,), 4.0), torch.ones(3, dtype=torch.bfloat16)]
    averages = [torch.zeros(3), torch.zeros(3)]
    UpdatePlan(averages, raws).update(decay)
    for average, value in zip(averages, (4.0, 1.0)):
        assert torch.equal(torch.full((3,), (1 - decay) * value), average)


@pytest.mark.parametrize('missing', ['HAS_FOREACH_LERP', 'HAS_FOREACH_COPY'])
def test_without_a_kernel(monkeypatch, missing):
    """A torch that lacks multi-tensor calls gets the same bits."""

    def run():
        generator = seeded(8)
        averages, raws = paired(
            strided(torch.float32, generator), torch.float32
        )
        plan, copies = UpdatePlan(averages, raws), []
        for decay in (0.3, 0.75, 0.9999):
            refill(raws, torch.float32, generator)
            plan.update(decay)
        for raw in raws:
            copies.append(torch.zeros_like(raw, memory_format=None))
        CopyPlan(copies, raws).copy()
        return [raw_bytes(t) for t in (*averages, *copies)]

    there = run()
    monkeypatch.setattr(capabilities, missing, False)
    monkeypatch.setattr(capabilities, 'can_fuse', lambda *kind: False)
    assert there == run()


VECTORS = {
    'column': lambda raw: torch.randn(4, 3)[:, 1],
    'expanded': lambda raw: torch.randn(1).expand(4),
    'expanded in place': lambda raw: raw[:1].expand(4),
    'moved': lambda raw: torch.randn(4),
}


@pytest.mark.parametrize('kind', VECTORS)
def test_vectors_in_another_order(kind):
    """A vector that becomes a column is read as such from then on."""
    torch.manual_seed(0)
    raws = [torch.randn(4) for _ in range(40)]
    averages = [raw.clone() for raw in raws]
    twins = [raw.clone() for raw in raws]
    plan = UpdatePlan(averages, raws)
    raws[21].data = VECTORS[kind](raws[21])
    for _ in range(40):
        plan.update(0.9)
        for twin, raw in zip(twins, raws):
            reference_update(twin, raw, 0.9)
        assert all(torch.equal(a, b) for a, b in zip(twins, averages))


@needs_fused
@pytest.mark.parametrize('size', [3, 5, 1])
def test_vectors_of_another_size(size):
    """They are refused before anything is read or written."""
    raws = [torch.ones(4) for _ in range(40)]
    averages = [torch.zeros(4) for _ in raws]
    plan = UpdatePlan(averages, raws)
    raws[21].data = torch.ones(size)
    with pytest.raises(RuntimeError, match=rf'\(4,\).*\({size},\)'):
        plan.update(0.9)
    assert not any(average.any() for average in averages)
