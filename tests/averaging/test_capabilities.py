"""What torch can do is tried before it is relied on."""

import functools

import pytest
import torch

from mmdet_ema.averaging import capabilities
from mmdet_ema.averaging.capabilities import can_fuse, fused_lerp, norm_order
from tests.averaging.models import numpy64, raw_bytes

CPU = torch.device('cpu')
WIDE = (torch.float32, torch.float64)
BAD = (float('nan'), float('inf'), float('-inf'))
needs_fused = pytest.mark.skipif(
    not can_fuse(CPU, torch.float32),
    reason='this torch has no fused step on the host',
)


@pytest.fixture
def untried():
    """Forget what was found out, before the test and after it."""
    capabilities._remembered.cache_clear()
    yield
    capabilities._remembered.cache_clear()


def draw(dtype, *shapes):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    ]


SHAPES = ((3, 4), (), (1,), (33,), (4097,))


@needs_fused
@pytest.mark.parametrize('dtype', WIDE, ids=str)
@pytest.mark.parametrize('weight', [0.0, 1e-4, 0.3, 0.75, 1.0])
@pytest.mark.parametrize('flag', [None, 0.0])
def test_fused_step_is_the_formula(dtype, weight, flag):
    """The fused SGD step takes every average towards its raw tensor."""
    averages, raws = draw(dtype, *SHAPES), draw(dtype, *reversed(SHAPES))[::-1]
    expected = [
        old + weight * (raw - old)
        for old, raw in zip(map(numpy64, averages), map(numpy64, raws))
    ]
    skip = None if flag is None else torch.tensor(flag)
    fused_lerp(averages, raws, weight, skip)
    eps = torch.finfo(dtype).eps
    for average, wanted, raw in zip(averages, expected, raws):
        # Three roundings of numbers as large as the inputs, below 5 here.
        assert (abs(numpy64(average) - wanted) <= 3 * eps * 5).all()
        assert raw.shape == average.shape


@needs_fused
@pytest.mark.parametrize('dtype', WIDE, ids=str)
@pytest.mark.parametrize('bad', BAD)
def test_skip_keeps_every_bit(dtype, bad):
    """With the flag set no bit changes: not of -0.0, of NaN, of anything."""
    averages = draw(dtype, *SHAPES)
    averages[3][:3] = torch.tensor([-0.0, float('nan'), float('inf')])
    before = [raw_bytes(average) for average in averages]
    raws = [torch.full_like(average, bad) for average in averages]
    fused_lerp(averages, raws, 0.5, torch.ones(()))
    assert before == [raw_bytes(average) for average in averages]


@needs_fused
def test_raws_are_not_written():
    """The raw tensors keep bits and version: autograd notices nothing.

    Torch declares an optimizer's gradients as changed, which would spoil a
    backward pass that the update runs beside.
    """
    raw = torch.nn.Parameter(torch.randn(50))
    before, version = raw_bytes(raw), raw._version
    loss = (raw * raw).sum()
    with torch.no_grad():
        fused_lerp([torch.zeros(50)], [raw], 0.5)
        fused_lerp([torch.zeros(50)], [raw], 0.5, torch.zeros(()))
    loss.backward()
    assert before == raw_bytes(raw)
    assert version == raw._version


@pytest.mark.parametrize(
    'dtype',
    [torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.bool],
    ids=str,
)
def test_no_fused_step_for_other_dtypes(dtype):
    """Only float32 and float64 take the fused step."""
    assert can_fuse(CPU, dtype) is False


def test_torch_without_the_fused_step(monkeypatch, untried):
    """Where torch lacks the step, it is not used."""
    monkeypatch.delattr(torch, '_fused_sgd_', raising=False)
    assert can_fuse(CPU, torch.float32) is False


def refuses(*args, **kwargs):
    raise RuntimeError('not compiled')


def other_signature(params, grads):
    raise AssertionError('not reached')


def ignores_the_flag(params, grads, momenta, *, lr, found_inf, **more):
    for param, grad in zip(params, grads):
        param.lerp_(grad, lr)


def ignores_the_weight(params, grads, momenta, *, found_inf, **more):
    for param, grad in zip(params, grads):
        param.copy_(torch.where(found_inf > 0, param, grad))


@pytest.mark.parametrize(
    'kernel', [refuses, other_signature, ignores_the_flag, ignores_the_weight]
)
def test_fused_step_that_does_something_else(monkeypatch, untried, kernel):
    """A step that fails, or gives other numbers, is not used."""
    monkeypatch.setattr(torch, '_fused_sgd_', kernel, raising=False)
    assert can_fuse(CPU, torch.float32) is False


def test_one_trial(monkeypatch, untried):
    """A device and a dtype are tried once; float64 apart from float32."""
    trials = []

    def trial(kind):
        trials.append(kind['dtype'])
        return True

    monkeypatch.setattr(torch, '_fused_sgd_', refuses, raising=False)
    monkeypatch.setattr(capabilities, '_try_fused', trial)
    for dtype in (*WIDE, *WIDE):
        assert can_fuse(CPU, dtype)
    assert trials == list(WIDE)


@needs_fused
def test_trial_in_inference_mode(untried):
    """The answer is the same if inference mode happens to be on."""
    with torch.inference_mode():
        assert can_fuse(CPU, torch.float32)


@pytest.mark.parametrize(
    'dtype',
    [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
    ],
    ids=str,
)
def test_norm_order(dtype):
    """The largest magnitude shows NaN and Inf, and nothing else."""
    if norm_order(CPU, dtype) == 2.0:
        # its magnitude of large complex numbers overflows
        assert dtype.is_complex
        assert not can_fuse(CPU, torch.float32), 'a torch after 2.3'
        return
    largest = torch.full((70_000,), torch.finfo(dtype).max, dtype=dtype)
    for place in (0, 35_000, 69_999):
        for bad in BAD:
            tensor = largest.clone()
            tensor[place] = bad
            norms = torch._foreach_norm([largest, tensor], float('inf'))
            assert [True, False] == [bool(x.isfinite()) for x in norms]


def hides_nan(tensors, order):
    return [torch.nan_to_num(t.float()).abs().max() for t in tensors]


def overflows(tensors, order):
    return [(t.float() ** 2).sum().sqrt() for t in tensors]


@pytest.mark.parametrize('norm', [refuses, hides_nan, overflows])
def test_norm_that_does_something_else(monkeypatch, untried, norm):
    """A norm that would hide NaN, or overflow, is not used."""
    monkeypatch.setattr(torch, '_foreach_norm', norm)
    assert norm_order(CPU, torch.float32) == 2.0


def test_trials_leave_no_graph(untried):
    """A trial works while gradients are recorded, too."""
    with torch.enable_grad():
        found = functools.partial(norm_order, CPU)
        assert found(torch.float32) == float('inf')
