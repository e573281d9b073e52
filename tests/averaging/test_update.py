"""One update: its numbers, and the verdict on the host or on the device."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmdet_ema.averaging import NonFiniteError, WeightAverager
from mmdet_ema.averaging import averager as averager_module
from mmdet_ema.averaging import update as module
from mmdet_ema.averaging.averages import Averages
from mmdet_ema.averaging.tensors import select
from mmdet_ema.averaging.update import DeviceVerdict, UpdatePlan, all_finite
from tests import oracle
from tests.averaging.models import (
    FLOAT8,
    Mixed,
    averages_of,
    holder,
    numpy64,
    odd_tensors,
    perturb,
    raw_bytes,
)

NAN, INF = float('nan'), float('inf')
BAD = (NAN, INF, -INF)
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
)
needs_fused = pytest.mark.skipif(
    not module._trial(module._try_fused, torch.device('cpu'), torch.float32),
    reason='this torch has no fused step on the host',
)


# units in the last place of numbers up to 1, halved: one rounding
HALF_ULP = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES[:4]),
    shape=st.sampled_from([(), (3,), (4, 5), (2, 3, 4, 4), (90, 60)]),
    layout=st.sampled_from(['plain', 'turned', 'sliced']),
    decays=st.lists(
        st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.9998, 1.0]), min_size=1
    ),
    seed=st.integers(0, 99),
)
def test_every_decay(dtype, shape, layout, decays, seed):
    """Whatever lies in memory how: the formula, to a few roundings a step."""
    torch.manual_seed(seed)
    tensor = torch.randn(*shape[:-1], 2 * shape[-1] if shape else 1)
    tensor = tensor.reshape(shape) if not shape else tensor
    if layout == 'sliced' and shape:
        tensor = tensor[..., ::2]
    elif shape:
        tensor = tensor[..., : shape[-1]].contiguous()
    if layout == 'turned' and len(shape) > 1:
        tensor = tensor.transpose(0, 1)
    model = holder(tensor.to(dtype))
    steps = iter(decays)
    averager = WeightAverager(model, lambda n: decays[min(n, len(decays)) - 1])
    start, seen = numpy64(model.p0).copy(), []
    for _ in steps:
        with torch.no_grad():
            model.p0.copy_(torch.randn(model.p0.shape).clamp(-1, 1))
        seen.append(numpy64(model.p0).copy())
        assert averager.update()
    average = averages_of(averager)['p0']
    assert average.shape == model.p0.shape
    wanted = oracle.average(start, seen, lambda n: decays[n - 1])
    unit = HALF_ULP[average.dtype] * max(1, np.abs(wanted).max(initial=0))
    error = np.abs(numpy64(average) - wanted).max(initial=0)
    # lerp rounds a difference, a product and a sum
    assert error <= 6 * unit * len(decays)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, *FLOAT8])
@pytest.mark.parametrize('size', [3, 5000])
def test_gain_of_low_precision(dtype, size):
    """Averages of few bits are float32 and tend to the weights, unbiased."""
    model = holder(torch.zeros(size).to(dtype))
    averager = WeightAverager(model, 'constant', decay=0.9995)
    model.p0.data = torch.ones(size).to(dtype)
    for _ in range(2000):
        averager.update()
    average = averages_of(averager)['p0']
    assert average.dtype == torch.float32
    wanted = 1 - 0.9995**2000
    assert average[0].item() == pytest.approx(wanted, rel=1e-4)
    assert (average == average[0]).all()


def test_without_the_calls_for_many_tensors(monkeypatch):
    """A torch that lacks them gives the same bits."""

    def run():
        torch.manual_seed(0)
        model, generator = Several(), seeded()
        averager = WeightAverager(model, 'constant', decay=0.7)
        for _ in range(20):
            perturb(model, generator)
            averager.update()
        return bits(averages_of(averager))

    expected = run()
    for name in ('_foreach_lerp_', '_foreach_copy_', '_fused_sgd_'):
        monkeypatch.delattr(torch, name, raising=False)
    assert expected == run()


@pytest.mark.parametrize('update_buffers', [True, False])
def test_copies_are_exact(update_buffers):
    """Every bit of what is copied: of NaN, -0.0, integers, in all layouts."""
    model = nn.Module()
    for k, tensor in enumerate(odd_tensors()):
        model.register_buffer(f'b{k}', tensor)
    averager = WeightAverager(
        model, update_buffers=update_buffers, copied=['*']
    )
    for buffer in model.buffers():
        if buffer.dtype not in FLOAT8:
            buffer.copy_(buffer.flip(0) if buffer.dim() else buffer + 1)
    averager.update()
    expected = bits(model.state_dict())
    assert expected == bits(averages_of(averager))


def test_data_that_is_replaced():
    """An update reads what ``.data`` is now, wherever and however it lies."""
    model = holder(torch.zeros(80, 80), torch.zeros(3, 3))
    averager = WeightAverager(model, 'constant', decay=0.0)
    for change in (
        lambda x: torch.randn(x.shape),
        lambda x: torch.randn(x.shape).t(),
        lambda x: torch.randn(1, x.shape[1]).expand(x.shape),
        lambda x: torch.randn(x.shape[0], 2 * x.shape[1])[:, ::2],
    ):
        for parameter in model.parameters():
            parameter.data = change(parameter)
        averager.update()
        found = averages_of(averager)
        assert torch.equal(found['p0'], model.p0)
        assert torch.equal(found['p1'], model.p1)


@pytest.mark.parametrize('size', [(2, 3), (80, 90)])
def test_data_of_another_size(size):
    """Weights that do not fit are named; nothing is changed or counted."""
    model = holder(torch.zeros(9), torch.ones(size))
    averager = WeightAverager(model, 'constant', decay=0.5)
    before = bits(averages_of(averager))
    good = model.p1.data
    model.p0.data.fill_(1)
    for other in (good[:1], torch.ones(()), torch.ones(size[0] + 1, size[1])):
        model.p1.data = other
        message = r'^p1, .* give it back .* refresh\(\)'
        with pytest.raises(RuntimeError, match=message):
            averager.update()
        assert 0 == averager.num_steps
    model.p1.data = good
    assert before == bits(averages_of(averager))
    assert averager.update()
    model.p1.data = torch.ones(5, 3)
    averager.refresh()
    assert averager.update()
    assert (5, 3) == averages_of(averager)['p1'].shape


def test_many_tensors():
    """Five thousand tensors are averaged, each by its own raw tensor."""
    model = holder(*(torch.zeros(k % 5) for k in range(5000)))
    averager = WeightAverager(model, 'constant', decay=0.5)
    for k, parameter in enumerate(model.parameters()):
        parameter.data.fill_(k)
    averager.update()
    for k, average in enumerate(averages_of(averager).values()):
        assert average.tolist() == [k / 2] * (k % 5)


class Wide(nn.Module):
    """Tensors that one fused kernel updates, and others that are copied."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer('mask', torch.tensor([True, False]))
        self.register_buffer('counts', torch.tensor([1, 2**40]))
        self.register_buffer('bias', torch.tensor([0.0, -INF]))
        self.to(dtype)


def planned(model, deferred, **options):
    """Return a plan, and its averages by name."""
    entries = select(model, **options)
    averages = Averages(entries, None)
    plan = UpdatePlan(entries, [averages.tensors], deferred)
    return plan, {entries[i].name: a for i, a in averages.tensors.items()}


@torch.no_grad()
def take_in(plan, decay=None, rule=None, check=True):
    plan.read()
    if rule is not None:
        return plan.run_rule(rule, 1, check)
    return plan.run([decay], check)


def bits(averages):
    return {name: raw_bytes(average) for name, average in averages.items()}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@needs_fused
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_verdict_on_the_device_leaves_the_same_bits(dtype):
    """Over 300 random steps, some bad, both verdicts give the same."""
    model, generator = Wide(dtype), seeded()
    first, deferred = planned(model, True)
    second, plain = planned(model, False)
    draws = torch.rand(300, generator=generator).tolist()
    for n, draw in enumerate(draws, start=1):
        perturb(model, generator)
        weights = model.head.weight.data
        kept, bad = weights[0, 0].item(), draw < 0.2
        if bad:
            weights[0, 0] = BAD[n % 3]
        decay = None if draw > 0.9 else 0.5 + draw / 2
        found = take_in(first, decay=decay)
        assert isinstance(found, DeviceVerdict) == (decay is not None)
        # Between updates only what is copied is looked at: no floats here.
        expected = not bad or decay is None
        assert expected == bool(found)
        assert expected == take_in(second, decay=decay)
        assert bits(plain) == bits(deferred), n
        weights[0, 0] = kept


class Several(Wide):
    """Weights for the compiled kernels beside weights for others."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.low = nn.Parameter(torch.ones(70, dtype=torch.bfloat16))
        self.sliced = nn.Parameter(torch.ones(4, 6)[:, :3])


@needs_fused
@pytest.mark.parametrize('decay', [1e-9, 0.0005, 0.3, 0.5])
def test_small_decay(decay):
    """With a small decay, too, the verdicts agree to three roundings."""
    model = Wide()
    (first, deferred), (second, plain) = (
        planned(model, True),
        planned(model, False),
    )
    perturb(model, seeded(), 1.0)
    assert take_in(first, decay=decay)
    assert take_in(second, decay=decay)
    for name, average in plain.items():
        if average.is_floating_point():
            # Halves of units in the last place of numbers below 4.
            torch.testing.assert_close(
                deferred[name], average, rtol=0, atol=1.5 * 4 * 2.0**-23
            )
        else:
            assert torch.equal(average, deferred[name])


@needs_fused
def test_huge_values_are_finite():
    """Weights of 1e30, whose squares overflow, are averaged."""
    model = Wide()
    model.bias.data.zero_()
    plan, averages = planned(model, True)
    for tensor in (*model.parameters(), model.norm.running_var):
        tensor.data.fill_(1e30)
    assert take_in(plan, decay=0.75)
    average = averages['head.weight']
    assert torch.allclose(torch.full_like(average, 0.25e30), average)


DEFERRED = [pytest.param(True, marks=needs_fused), False]


@pytest.mark.parametrize('bad', BAD)
@pytest.mark.parametrize('update_buffers', [True, False])
@pytest.mark.parametrize('decay', [0.0, 1e-9, 0.0005, 0.3, 0.9999])
@pytest.mark.parametrize('deferred', DEFERRED)
def test_bad_step_changes_no_bit(deferred, decay, update_buffers, bad):
    """Whichever weight holds NaN or Inf, every average stays as it was.

    So do copies of integers and booleans, and buffers, finite or not.
    """
    model = Wide() if deferred else Several()
    plan, averages = planned(model, deferred, update_buffers=update_buffers)
    perturb(model, seeded())
    model.norm.running_var[1] = NAN
    before = bits(averages)
    tensors = [model.conv.weight, model.norm.weight, model.head.bias]
    if not deferred:
        tensors += [model.wide, model.low, model.sliced]
    for tensor in tensors:
        kept = tensor.data[-1].clone()
        tensor.data[-1] = bad
        found = take_in(plan, decay=decay)
        assert isinstance(found, DeviceVerdict) == (deferred and decay > 0)
        assert not found
        assert before == bits(averages)
        tensor.data[-1] = kept
    assert take_in(plan, decay=decay)
    after = bits(averages)
    assert all(after[name] != before[name] for name in ('counts', 'mask'))
    assert after['head.bias'] != before['head.bias']


@pytest.mark.parametrize('bad', BAD)
@pytest.mark.parametrize('decay', [None, 0.0, 0.3, 0.9999])
@pytest.mark.parametrize('update_buffers', [True, False])
@pytest.mark.parametrize('deferred', DEFERRED)
def test_buffer_with_nan_is_left_out_alone(
    deferred, update_buffers, decay, bad
):
    """Its average stays, bit for bit; every other one moves on as ever."""
    model = Several()
    twin = copy.deepcopy(model)
    plan, averages = planned(model, deferred, update_buffers=update_buffers)
    other, expected = planned(twin, deferred, update_buffers=update_buffers)
    stays = bits(averages)['norm.running_var']
    for each in (model, twin):
        perturb(each, seeded())
        each.counts.add_(1)
    model.norm.running_var[1] = bad
    assert take_in(plan, decay=decay)
    assert take_in(other, decay=decay)
    found, wanted = bits(averages), bits(expected)
    assert stays == found.pop('norm.running_var')
    # where all are finite the statistics move with everything else
    moves = decay is not None or not update_buffers
    assert moves == (stays != wanted.pop('norm.running_var'))
    assert wanted == found


@pytest.mark.parametrize('deferred', DEFERRED)
def test_rule_passes_over_a_buffer_with_nan(deferred):
    """A rule of the user's own does not see a buffer that is not finite."""
    model, seen = nn.BatchNorm1d(2), []
    plan, averages = planned(model, deferred)
    model.running_mean.fill_(3.0)
    model.running_var[0] = INF

    def rule(average, raw, step):
        seen.append(raw.tolist())
        average.copy_(raw)

    assert take_in(plan, rule=rule)
    assert [[1, 1], [0, 0], [3, 3]] == seen
    assert [1, 1] == averages['running_var'].tolist()


@pytest.mark.parametrize('deferred', DEFERRED)
def test_buffer_of_the_lowest_number(deferred):
    """A constant mask of the lowest finite number keeps its bits."""
    model = nn.Module()
    lowest = torch.finfo(torch.float32).min
    model.register_buffer('mask', torch.tensor([0.0, lowest, lowest]))
    model.register_buffer('narrow', torch.full((5,), 6e4, dtype=torch.float16))
    plan, averages = planned(model, deferred)
    for _ in range(200):
        assert take_in(plan, decay=0.99)
    assert [0, lowest, lowest] == averages['mask'].tolist()
    assert [60000.0] * 5 == averages['narrow'].tolist()


class OnlyEmpty(nn.Module):
    def __init__(self):
        super().__init__()
        self.none = nn.Parameter(torch.zeros(0))
        self.register_buffer('nothing', torch.zeros(2, 0))


@pytest.mark.parametrize('deferred', [True, False])
@pytest.mark.parametrize('buffers', [True, False])
@pytest.mark.parametrize('make', [OnlyEmpty, nn.Identity])
def test_nothing_to_look_at(make, buffers, deferred):
    """A model without elements takes steps; there is no verdict to make."""
    plan, _ = planned(make(), deferred, update_buffers=buffers)
    for decay in (0.9, 0.0, None):
        assert take_in(plan, decay=decay) is True


@pytest.mark.parametrize('bad', [None, NAN])
def test_other_dtypes_get_their_verdict_on_the_host(bad):
    """Where a large average is of another dtype, the host decides at once."""
    model = Mixed()
    model.large = nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
    plan, averages = planned(model, True)
    before = bits(averages)
    perturb(model, seeded())
    if bad is not None:
        model.scale.data.fill_(bad)
    found = take_in(plan, decay=0.9)
    assert found is (bad is None)
    assert (before == bits(averages)) == (bad is not None)


@needs_fused
@pytest.mark.parametrize(
    'step', [dict(decay=0.0), dict(rule=lambda average, raw, n: None)]
)
def test_steps_that_cannot_be_left_out_later(step):
    """A decay of 0, and a rule, wait for the verdict."""
    model = Wide()
    plan, averages = planned(model, True)
    assert take_in(plan, **step) is True
    before = bits(averages)
    model.head.weight.data[0] = NAN
    assert take_in(plan, **step) is False
    assert before == bits(averages)


def test_without_a_gate():
    """A step that is not gated takes NaN in."""
    for deferred in (True, False):
        model = Wide()
        plan, averages = planned(model, deferred)
        model.head.weight.data[0] = NAN
        assert take_in(plan, decay=0.9, check=False) is True
        assert averages['head.weight'][0].isnan().all()


@pytest.fixture
def on_device(monkeypatch):
    """Let averagers keep their verdict on the device, here the host."""

    def deferred(entries, sets, **options):
        return UpdatePlan(entries, sets, deferred=True, **options)

    monkeypatch.setattr(averager_module, 'UpdatePlan', deferred)


def averager_of(model, **options):
    return WeightAverager(model, 'constant', decay=0.75, **options)


@needs_fused
def test_counters(on_device):
    """What is skipped shows when it is asked for, not before."""
    model = nn.Linear(2, 2)
    averager = averager_of(model)
    before = averages_of(averager)
    model.weight.data[0] = NAN
    assert averager.update() is True
    assert 0 == averager.known_skipped
    assert averager.wait() is False
    assert 1 == averager.known_skipped
    assert averager.wait() is True
    assert (0, 0, 1) == (
        averager.num_steps,
        averager.num_updates,
        averager.num_skipped,
    )
    for name, average in averager.named_averages():
        assert torch.equal(before[name], average)
    model.weight.data.fill_(1)
    assert averager.update() is True
    assert (1, 1, 1) == (
        averager.num_steps,
        averager.num_updates,
        averager.num_skipped,
    )


@needs_fused
@pytest.mark.parametrize('interval', [1, 3])
def test_averager_with_bad_steps(on_device, monkeypatch, interval):
    """An averager equals one whose verdicts are made on the host."""

    def run():
        torch.manual_seed(0)
        model, generator = Wide(), seeded(4)
        # three steps weigh the old average by 0.9 ** 3 > 0.5: the same bits
        averager = WeightAverager(
            model, 'constant', decay=0.9, interval=interval
        )
        draws = torch.rand(200, generator=generator).tolist()
        for draw in draws:
            perturb(model, generator)
            weights = model.head.weight.data
            kept = weights.clone()
            if draw < 0.3:
                weights[1] = NAN
            averager.update()
            weights.copy_(kept)
        state = averager.state_dict()
        return bits(state.pop('averages')), state

    found = run()
    monkeypatch.setattr(averager_module, 'UpdatePlan', UpdatePlan)
    assert run() == found
    assert found[1]['num_skipped'] > 10


@needs_fused
def test_raise(on_device):
    """Under 'raise' the error comes from the update that was bad."""
    model = nn.Linear(2, 2)
    averager = averager_of(model, nonfinite='raise')
    assert averager.update() is True
    model.bias.data[0] = INF
    with pytest.raises(NonFiniteError, match='bias holds NaN or Inf'):
        averager.update()
    assert 1 == averager.num_steps
    model.bias.data[0] = 0
    assert averager.update() is True
    assert 2 == averager.num_steps


@needs_fused
def test_decay_of_zero(on_device):
    """The first step of a mean, whose decay is 0, is gated, too."""
    model = nn.Linear(2, 2)
    averager = WeightAverager(model, 'mean')
    start = averages_of(averager)
    model.weight.data[0] = NAN
    assert averager.update() is False
    assert torch.equal(start['weight'], averages_of(averager)['weight'])
    model.weight.data.fill_(2)
    assert averager.update() is True
    assert torch.equal(model.weight, averages_of(averager)['weight'])


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('bad', BAD)
def test_every_position(dtype, bad):
    """One bad element is found at every place of every tensor."""
    shapes = ((2, 3), (), (0,), (5,))
    tensors = [torch.ones(shape, dtype=dtype) for shape in shapes]
    assert all_finite(tensors)
    for tensor in tensors:
        for place in range(tensor.numel()):
            tensor.view(-1)[place] = bad
            assert not all_finite(tensors)
            tensor.view(-1)[place] = 1


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_huge_numbers(dtype):
    """Squares that overflow are no false alarm, and hide no bad number."""
    huge = torch.finfo(dtype).max
    tensors = [
        torch.full((100,), huge, dtype=dtype),
        torch.full((5,), -huge, dtype=dtype),
    ]
    assert all_finite(tensors)
    for bad in BAD:
        tensors[1][4] = bad
        assert not all_finite(tensors)


WITH_GAPS = torch.ones(4, 4)
WITH_GAPS[:, 1] = NAN


@pytest.mark.parametrize(
    ('tensors', 'finite'),
    [
        ([], True),
        ([torch.zeros(0), torch.zeros(2, 0).bfloat16()], True),
        # infinities of both signs do not hide each other
        *(([torch.tensor([INF, -INF, bad])], False) for bad in BAD),
        *(([torch.tensor([1, complex(1, bad)])], False) for bad in BAD),
        # what lies between the elements of a view does not count
        ([WITH_GAPS[:, 2], WITH_GAPS.t()[0], WITH_GAPS[::2, 2:]], True),
        ([WITH_GAPS[2]], False),
    ],
)
def test_odd_tensors(tensors, finite):
    """Empty ones, imaginary parts, views: all their elements, no others."""
    assert finite == all_finite(tensors)


def test_first_nonfinite():
    """The first bad weight in the model's order is named."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    averager = WeightAverager(model)
    assert averager.first_nonfinite() is None
    parameters = dict(model.named_parameters())
    for earlier, later in itertools.combinations(parameters, 2):
        with torch.no_grad():
            parameters[earlier].view(-1)[-1] = NAN
            parameters[later].view(-1)[0] = INF
        assert earlier == averager.first_nonfinite()
        for name in (earlier, later):
            nn.init.ones_(parameters[name])


@pytest.mark.parametrize('size', [5, 6000])
@pytest.mark.parametrize('place', [0, -1])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_bad_element_of_an_average(size, place, dtype):
    """Of small and large tensors: the step is skipped, whole."""
    model = holder(torch.ones(7), torch.ones(size, dtype=dtype))
    averager = WeightAverager(model, 'constant', decay=0.5)
    before = bits(averages_of(averager))
    for parameter in model.parameters():
        parameter.data.mul_(3)
    for bad in BAD:
        model.p1.data[place] = bad
        assert averager.update() is False
        assert before == bits(averages_of(averager))
    model.p1.data[place] = torch.finfo(dtype).max / 4
    assert averager.update() is True
    assert (0 + 1, 3) == (averager.num_updates, averager.num_skipped)
