"""The fast plan, its plain twin and NumPy float64, step by step."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_ema.core.copying import CopyPlan
from mmdet_ema.core.kernels import (
    UpdatePlan,
    average_dtype,
    reference_update,
)
from tests.core.models import FLOAT8, raw_bytes

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

    The decay changes at every step; the plain twin takes the same steps.
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
        if dtype in WIDE:
            assert raw_bytes(other) == raw_bytes(average)
        else:
            # Two ways to round float32, 4 ulps apart at most a step, and
            # the decays above forget a difference within a few steps.
            torch.testing.assert_close(average, other, rtol=0, atol=32 * eps)


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
    """An update is two calls a group at most, however many tensors."""
    raws = [torch.ones(2) for _ in range(many)]
    raws += [torch.ones(2, dtype=torch.bfloat16) for _ in range(many)]
    averages = [torch.zeros(2) for _ in raws]
    plan = UpdatePlan(averages, raws)
    with CountCalls() as count:
        plan.update(decay)
    assert len(count.calls) <= 3, count.calls
    assert all(n.startswith(('_foreach', '_fused')) for n in count.calls)
