"""One step into the averages, with the verdict on the host or the device."""

import copy

import pytest
import torch
from torch import nn

from mmdet_ema.averaging import NonFiniteError, WeightAverager, intake
from mmdet_ema.averaging.capabilities import can_fuse
from mmdet_ema.averaging.kernels import average_dtype
from mmdet_ema.averaging.tensors import Role, select
from mmdet_ema.averaging.update import DeviceVerdict, Step, StepPlan
from tests.averaging.models import Mixed, averages_of, perturb, raw_bytes

NAN, INF = float('nan'), float('inf')
BAD = (NAN, INF, -INF)
needs_fused = pytest.mark.skipif(
    not can_fuse(torch.device('cpu'), torch.float32),
    reason='this torch has no fused step on the host',
)


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
    entries = [
        entry
        for entry in select(model, **options)
        if entry.role is not Role.SHARED
    ]
    averages = [
        entry.raw.detach().to(
            average_dtype(entry.raw.dtype)
            if entry.role is Role.AVERAGED
            else entry.raw.dtype,
            copy=True,
        )
        for entry in entries
    ]
    raws = [entry.raw for entry in entries]
    plan = StepPlan(entries, averages, raws, deferred)
    return plan, {e.name: a for e, a in zip(entries, averages)}


def take_in(plan, **step):
    with torch.no_grad():
        return plan.take_in(Step(**step))


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
        found = take_in(first, number=n, decay=decay)
        assert isinstance(found, DeviceVerdict) == (decay is not None)
        # Between updates only what is copied is looked at: no floats here.
        expected = not bad or decay is None
        assert expected == bool(found)
        assert expected == take_in(second, number=n, decay=decay)
        assert bits(plain) == bits(deferred), n
        weights[0, 0] = kept


@needs_fused
@pytest.mark.parametrize('bad', BAD)
@pytest.mark.parametrize('decay', [1e-9, 0.0005, 0.3, 0.5, 0.9999])
def test_bad_step_changes_no_bit(bad, decay):
    """A bad step leaves averages, integers and booleans as they are."""
    model = Wide()
    plan, averages = planned(model, True)
    before = bits(averages)
    perturb(model, seeded())
    for tensor in (model.conv.weight, model.head.bias, model.norm.bias):
        tensor.data[-1] = bad
        found = take_in(plan, number=1, decay=decay)
        assert isinstance(found, DeviceVerdict)
        assert not found
        assert before == bits(averages)
        tensor.data[-1] = 0
    assert take_in(plan, number=1, decay=decay)
    assert before != bits(averages)


class Several(Wide):
    """Weights for the compiled kernels beside weights for others."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.low = nn.Parameter(torch.ones(70, dtype=torch.bfloat16))
        self.sliced = nn.Parameter(torch.ones(4, 6)[:, :3])


@pytest.mark.parametrize('bad', BAD)
@pytest.mark.parametrize('update_buffers', [True, False])
@pytest.mark.parametrize('decay', [0.0, 0.3, 0.9999])
def test_bad_step_of_any_tensor_changes_no_bit(bad, update_buffers, decay):
    """Whichever tensor holds NaN or Inf, every average stays as it was."""
    model = Several()
    plan, averages = planned(model, False, update_buffers=update_buffers)
    perturb(model, seeded())
    model.counts.add_(1)
    before = bits(averages)
    tensors = [
        *(model.conv.weight, model.norm.weight, model.head.bias),
        *(model.wide, model.low, model.sliced),
    ]
    for tensor in tensors:
        kept = tensor.data[-1].clone()
        tensor.data[-1] = bad
        assert take_in(plan, number=1, decay=decay) is False
        assert before == bits(averages)
        tensor.data[-1] = kept
    assert take_in(plan, number=1, decay=decay) is True
    after = bits(averages)
    assert all(after[name] != before[name] for name in ('counts', 'low'))


@pytest.mark.parametrize('decay', [0.3, 0.9999])
def test_memory_between_the_views_of_a_tensor(decay):
    """NaN in memory that no name of the model sees is no bad step."""
    base = torch.zeros(10)
    model = nn.Module()
    model.left = nn.Parameter(base.view(2, 5)[:, :2])
    model.right = nn.Parameter(base[5:8])
    plan, averages = planned(model, False)
    base.fill_(1.0)
    base[3] = NAN
    assert take_in(plan, number=1, decay=decay) is True
    (average,) = averages.values()
    assert average[0].item() == pytest.approx(1 - decay, rel=1e-3)
    base[7] = NAN
    assert take_in(plan, number=2, decay=decay) is False


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
    assert take_in(first, number=1, decay=decay)
    assert take_in(second, number=1, decay=decay)
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
    assert take_in(plan, number=1, decay=0.75)
    average = averages['head.weight']
    assert torch.allclose(torch.full_like(average, 0.25e30), average)


DEFERRED = [pytest.param(True, marks=needs_fused), False]


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
    assert take_in(plan, number=1, decay=decay)
    assert take_in(other, number=1, decay=decay)
    found, wanted = bits(averages), bits(expected)
    assert stays == found.pop('norm.running_var')
    # where all are finite the statistics move with everything else
    moves = decay is not None or not update_buffers
    assert moves == (stays != wanted.pop('norm.running_var'))
    assert wanted == found


@needs_fused
@pytest.mark.parametrize('update_buffers', [True, False])
def test_buffers_of_a_bad_step_stay(update_buffers):
    """With NaN in a weight no buffer moves, finite or not."""
    model = Wide()
    plan, averages = planned(model, True, update_buffers=update_buffers)
    before = bits(averages)
    perturb(model, seeded())
    model.norm.running_var[1] = NAN
    model.head.weight.data[0] = NAN
    assert not take_in(plan, number=1, decay=0.9)
    assert before == bits(averages)


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

    assert take_in(plan, number=1, rule=rule)
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
    for n in range(1, 200):
        assert take_in(plan, number=n, decay=0.99)
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
        assert take_in(plan, number=1, decay=decay) is True


@pytest.mark.parametrize('bad', [None, NAN])
def test_other_dtypes_get_their_verdict_on_the_host(bad):
    """Where an average is of another dtype, the host decides at once."""
    model = Mixed()
    plan, averages = planned(model, True)
    before = bits(averages)
    perturb(model, seeded())
    if bad is not None:
        model.scale.data.fill_(bad)
    found = take_in(plan, number=1, decay=0.9)
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
    assert take_in(plan, number=1, **step) is True
    before = bits(averages)
    model.head.weight.data[0] = NAN
    assert take_in(plan, number=1, **step) is False
    assert before == bits(averages)


def test_without_a_gate():
    """A step that is not gated takes NaN in."""
    for deferred in (True, False):
        model = Wide()
        plan, averages = planned(model, deferred)
        model.head.weight.data[0] = NAN
        assert take_in(plan, number=1, decay=0.9, gated=False) is True
        assert averages['head.weight'][0].isnan().all()


@needs_fused
def test_strides_that_change():
    """After ``.data`` got other strides the host decides, exactly."""
    model = nn.Linear(3, 3)
    plan, averages = planned(model, True)
    old = averages['weight'].clone()
    model.weight.data = model.weight.data.t() * 3
    assert take_in(plan, number=1, decay=0.75) is True
    expected = 0.75 * old + 0.25 * model.weight.detach()
    torch.testing.assert_close(averages['weight'], expected)


@pytest.fixture
def on_device(monkeypatch):
    """Let averagers keep their verdict on the device, here the host."""

    def deferred(entries, averages, sources):
        return StepPlan(entries, averages, sources, deferred=True)

    monkeypatch.setattr(intake, 'StepPlan', deferred)


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
    assert averager.settle() is False
    assert 1 == averager.known_skipped
    assert averager.settle() is True
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
    monkeypatch.setattr(intake, 'StepPlan', StepPlan)
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
