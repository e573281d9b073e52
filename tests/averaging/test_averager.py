"""The averager's numbers, against the NumPy float64 oracle."""

import copy
import io
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmdet_ema.averaging import NonFiniteError, OptionError, WeightAverager
from tests import oracle
from tests.averaging.models import (
    CountCalls,
    Mixed,
    averages_of,
    bits_of,
    numpy64,
    perturb,
    raw_bytes,
    state_of,
)
from tests.averaging.trees import changing, trees

# What has to be kept: float32 keeps 200 steps within 17 half ulps.
TOLERANCE = 1e-6
BAD = (float('nan'), float('inf'), float('-inf'))


def record(model, averager, steps, seed=0, size=0.1):
    """Take steps; return the states after each."""
    generator = torch.Generator().manual_seed(seed)
    states = []
    for _ in range(steps):
        perturb(model, generator, size)
        states.append(state_of(model))
        assert averager.update() is True
    return states


def check_averages(averager, start, states, decay_of, interval=1, phase=0):
    """Compare every average with the oracle, integers exactly."""
    for name, average in averager.named_averages():
        if start[name].is_floating_point():
            expected = oracle.average_every(
                numpy64(start[name]),
                [numpy64(state[name]) for state in states],
                decay_of,
                interval,
                phase,
            )
            error = oracle.relative_error(numpy64(average), expected)
            assert error <= TOLERANCE, (name, error)
        else:
            assert torch.equal(states[-1][name], average), name


@pytest.mark.parametrize(
    ('schedule', 'options', 'decay_of'),
    [
        ('exponential', {}, oracle.ramp),
        (
            'exponential',
            dict(decay=0.99, tau=30),
            lambda n: oracle.ramp(n, 0.99, 30),
        ),
        (
            'exponential',
            dict(decay=0.99, tau=30, init_updates=45),
            lambda n: oracle.ramp(45 + n, 0.99, 30),
        ),
        ('constant', dict(decay=0.9), lambda n: 0.9),
        ('constant', dict(decay=0.9999), lambda n: 0.9999),
        ('constant', dict(decay=0.0), lambda n: 0.0),
        ('mean', {}, lambda n: 1 - 1 / n),
        (lambda n: 0.5 if n % 2 else 1.0, {}, lambda n: (1.0, 0.5)[n % 2]),
    ],
)
def test_two_hundred_steps(schedule, options, decay_of):
    """The averages are the formula, in every tensor of every dtype."""
    model = Mixed()
    start = state_of(model)
    averager = WeightAverager(model, schedule, **options)
    states = []
    for steps in (1, 1, 8, 90, 100):
        states += record(model, averager, steps, seed=steps)
        check_averages(averager, start, states, decay_of)
    assert (200, 200, 0) == (
        averager.num_steps,
        averager.num_updates,
        averager.num_skipped,
    )


def test_defaults():
    """Without options the decay is that of YOLOv5's ramp."""
    averager = WeightAverager(nn.Linear(1, 1))
    assert 0.0 == averager.decay
    for n in range(1, 5):
        averager.update()
        # exp and expm1 differ in the last digits for small n / tau.
        assert pytest.approx(oracle.ramp(n), rel=1e-12) == averager.decay


@pytest.mark.parametrize(
    ('raw', 'average'),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.complex64, torch.complex64),
    ],
    ids=str,
)
def test_dtypes(raw, average):
    """Averages of half precision are float32, others keep their dtype."""
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(3, dtype=raw))
    averager = WeightAverager(model, 'constant', decay=0.5)
    with torch.no_grad():
        model.w.fill_(2)
    averager.update()
    found = dict(averager.named_averages())['w']
    assert average == found.dtype
    assert torch.equal(torch.full((3,), 1.5, dtype=average), found)


@pytest.mark.parametrize('done', [0, 6])
@pytest.mark.parametrize(
    ('interval', 'phase'),
    [(2, 0), (3, 0), (4, 0), (7, 0), *((3, phase) for phase in range(1, 5))],
)
def test_interval(interval, phase, done):
    """Every k steps the average takes the product of the k decays.

    The phase chooses the step; integers are exact between updates, too.
    """
    model = Mixed()
    start = state_of(model)
    ramp = dict(decay=0.9, tau=9, init_updates=done)
    averager = WeightAverager(model, interval=interval, phase=phase, **ramp)
    states = record(model, averager, 29)
    check_averages(
        averager,
        start,
        states,
        lambda n: oracle.ramp(done + n, 0.9, 9),
        interval,
        phase,
    )
    updates = [n for n in range(1, 30) if (n - phase) % interval == 0]
    assert (29, len(updates)) == (averager.num_steps, averager.num_updates)


@pytest.mark.parametrize('stop', [1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize('interval', [1, 4])
def test_resume(interval, stop):
    """A resumed average equals one that was not stopped, bit for bit."""

    def run(model, averager, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            perturb(model, generator)
            averager.update()

    options = dict(decay=0.9, tau=5, interval=interval)
    whole = Mixed()
    expected = WeightAverager(whole, **options)
    run(whole, expected, 0, 12)
    model = Mixed()
    averager = WeightAverager(model, **options)
    run(model, averager, 0, stop)
    state = copy.deepcopy(averager.state_dict())
    assert 'exponential(decay=0.9, tau=5.0)' == state['schedule']
    resumed = Mixed(seed=7)
    resumed.load_state_dict(model.state_dict())
    averager = WeightAverager(resumed, **options)
    averager.load_state_dict(state)
    run(resumed, averager, stop, 12)
    raw, expected_raw = state_of(resumed), state_of(whole)
    for name in raw:
        assert raw_bytes(expected_raw[name]) == raw_bytes(raw[name]), name
    assert expected.progress() == averager.progress()
    found = averages_of(averager)
    for name, average in averages_of(expected).items():
        assert raw_bytes(average) == raw_bytes(found[name]), name


@settings(max_examples=150, deadline=None)
@given(model=trees(), interval=st.integers(1, 3))
def test_random_trees(model, interval):
    """Random trees with random ties: every name follows the formula.

    A tied tensor is averaged once, and the raw values survive a swap.
    """
    averager = WeightAverager(model, 'constant', decay=0.75, interval=interval)
    start, states = state_of(model), []
    generator = torch.Generator().manual_seed(0)
    moving = {id(t): t for t in changing(model).values()}
    for _ in range(4):
        shift = float(torch.randn((), generator=generator))
        with torch.no_grad():
            for tensor in moving.values():
                tensor.mul_(2).add_(int(shift * 9))
        states.append(state_of(model))
        averager.update()
    check_averages(averager, start, states, lambda n: 0.75, interval)
    before = bits_of(model)
    with averager.applied():
        live = state_of(model)
        for name, average in averager.named_averages():
            assert torch.equal(average.to(live[name].dtype), live[name])
    assert before == bits_of(model)


# Steps that leave NaN or Inf


def spoil(model, bad=float('nan')):
    with torch.no_grad():
        model.conv.weight.view(-1)[3] = bad


def test_skip_does_not_advance_the_decay():
    """After skips the averages are those of a run without them."""
    model, plain = Mixed(), Mixed()
    averager = WeightAverager(model, decay=0.9, tau=5)
    expected = WeightAverager(plain, decay=0.9, tau=5)
    for step in range(10):
        perturb(model, torch.Generator().manual_seed(step))
        perturb(plain, torch.Generator().manual_seed(step))
        good = state_of(model)
        for bad in BAD[: step % 3]:
            with torch.no_grad():
                model.norm.bias[0] = bad
            averager.update()
        model.load_state_dict(good)
        averager.update()
        expected.update()
    found = averages_of(averager)
    for name, average in averages_of(expected).items():
        assert torch.equal(average, found[name])
    counts = dict(num_steps=10, num_updates=10, averaged_steps=10)
    assert dict(counts, num_skipped=9) == averager.progress()


def test_raise():
    """Under 'raise' the tensor is named and nothing is changed."""
    model = Mixed()
    averager = WeightAverager(model, nonfinite='raise')
    record(model, averager, 2)
    before = averages_of(averager)
    spoil(model)
    with pytest.raises(NonFiniteError, match=r'conv\.weight .* 2 steps'):
        averager.update()
    after = averages_of(averager)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert (2, 0) == (averager.num_steps, averager.num_skipped)
    assert 'conv.weight' == averager.first_nonfinite()


def test_ignore():
    """Under 'ignore' NaN goes into the average."""
    model = Mixed()
    averager = WeightAverager(model, nonfinite='ignore')
    spoil(model)
    assert averager.update() is True
    assert bool(averages_of(averager)['conv.weight'].isnan().any())
    assert 1 == averager.num_steps


@pytest.mark.parametrize('bad', BAD)
def test_nan_between_updates(bad):
    """With an interval, NaN in a step that is not read is passed over."""
    model = Mixed()
    averager = WeightAverager(model, 'constant', decay=0.5, interval=2)
    good = state_of(model)
    spoil(model, bad)
    assert averager.update() is True
    model.load_state_dict(good)
    assert averager.update() is True
    assert averager.first_nonfinite() is None
    values = dict(averager.named_averages()).values()
    assert all(bool(torch.isfinite(value).all()) for value in values)


# Options


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(interval=0), ('interval=0', 'at least 1')),
        (dict(interval=2.0), ('interval=2.0', 'at least 1')),
        (dict(phase=-1), ('phase=-1', 'at least 0')),
        (dict(nonfinite='skp'), ("'skp'", "Did you mean 'skip'?")),
        (dict(update_buffers=1), ('update_buffers=1', 'True or False')),
        (dict(device='gpu'), ("device='gpu'", "'cpu'")),
        (dict(device='cuda:977'), ("device='cuda:977'", 'this machine')),
        (dict(device=[]), ('device=[]', "'cpu'")),
        (dict(device='meta'), ("device='meta'", "'cpu'")),
        (dict(decay=1), ('decay=1', '[0, 1)')),
        (dict(taw=1), ("'taw'", "Did you mean 'tau'?")),
        (dict(schedule='linear'), ("'linear'", "'exponential'")),
        (dict(schedule=lambda n: 0.9, decay=0.5), ('decay',)),
    ],
)
def test_bad_options(options, words):
    """A bad option is one clear line with value, range and remedy."""
    with pytest.raises(OptionError) as error:
        WeightAverager(nn.Linear(1, 1), **options)
    assert [] == [word for word in words if word not in str(error.value)]
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('device', ['cpu', torch.device('cpu'), None])
def test_device(device):
    """The averages live where they were asked to."""
    averager = WeightAverager(Mixed(), device=device)
    devices = {str(t.device) for _, t in averager.named_averages()}
    assert {'cpu'} == devices


# Copies


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize('copied', [copy.deepcopy, pickled, saved])
def test_copies_go_on_alike(copied):
    """A copy has a model of its own, and the same averages from then on."""
    options = dict(averages=dict(fast=dict(decay=0.5)), nonfinite='ignore')
    averager = WeightAverager(Mixed(), decay=0.9, tau=3, **options)
    other = None
    for step in range(6):
        if step == 3:
            other = copied(averager)
            assert other.model is not averager.model
        for one in filter(None, (averager, other)):
            perturb(one.model, torch.Generator().manual_seed(step))
            one.update()
    assert 6 == other.num_updates
    for name in averager.names:
        expected = dict(averager.named_averages(name=name))
        for key, value in other.named_averages(name=name):
            assert torch.equal(expected[key], value), key
    with averager.applied(), other.applied():
        expected = averager.model.state_dict()
        for key, value in other.model.state_dict().items():
            assert torch.equal(expected[key], value), key


def test_copy_of_what_is_applied():
    """The raw weights come back in both."""
    model = Mixed()
    averager = WeightAverager(model, 'constant', decay=0.5)
    perturb(model, torch.Generator().manual_seed(0))
    averager.update()
    raw = state_of(model)
    with averager.applied():
        other = copy.deepcopy(averager)
    other.restore()
    for one in (averager, other):
        state = one.model.state_dict()
        assert all(torch.equal(raw[key], state[key]) for key in raw)


# Cost


def test_module_that_cannot_be_copied():
    """The module itself is never deep-copied or pickled."""

    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError('no copy')

        def __reduce_ex__(self, protocol):
            raise RuntimeError('no pickle')

    model = nn.Sequential(Stubborn(2, 2))
    averager = WeightAverager(model)
    averager.update()
    with averager.applied():
        pass
    averager.refresh()
    averager.load_state_dict(averager.state_dict())


def calls_of(layers, **options):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))
    averager = WeightAverager(model, **options)
    averager.update()
    with CountCalls() as count:
        averager.update()
    return count.calls


def test_calls_of_an_update():
    """The calls of an update do not grow with the model."""
    small, many = calls_of(1), calls_of(100)
    lerp = '_foreach_lerp_' if hasattr(torch, '_foreach_lerp_') else 'lerp_'
    assert ['cat', lerp] == calls_of(100, nonfinite='ignore')
    assert small == many
    assert len(many) <= 10


def test_copies_go_on_by_themselves():
    """A copy of an average, with its model, leaves the first alone."""
    model = Mixed()
    averager = WeightAverager(model, 'constant', decay=0.5)
    averager.update()
    other = copy.deepcopy(averager)
    assert other.model is not model
    before = {k: v.clone() for k, v in averager.named_averages()}
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1)
    assert other.update()
    assert 2 == other.num_updates
    assert 1 == averager.num_updates
    changed = 0
    for name, average in averager.named_averages():
        assert torch.equal(before[name], average)
        changed += not torch.equal(dict(other.named_averages())[name], average)
    assert changed > 3


def test_interrupt_of_an_update(monkeypatch):
    """Ctrl-C waits until averages, copies and counters agree."""
    model = Mixed()
    averager = WeightAverager(model, 'constant', decay=0.5)
    twin = WeightAverager(model, 'constant', decay=0.5)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1) if tensor.dtype != torch.bool else None
    assert twin.update()
    run = averager._plan.run

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return run(*arguments)

    monkeypatch.setattr(averager._plan, 'run', interrupted)
    with pytest.raises(KeyboardInterrupt):
        averager.update()
    assert 1 == averager.num_steps
    for (_, a), (_, b) in zip(
        averager.named_averages(), twin.named_averages()
    ):
        assert torch.equal(a, b)


def test_synchronisation():
    """Under 'ignore' an update never waits for the device, else once."""
    wait = '_local_scalar_dense'
    assert 0 == calls_of(5, nonfinite='ignore').count(wait)
    assert calls_of(5, nonfinite='skip').count(wait) <= 1


def test_inference_mode():
    """Averages that are applied in it go on, also of a replaced tensor."""
    model = Mixed()
    averager = WeightAverager(model, 'constant', decay=0.5)
    model.float_buffer = torch.ones(4)
    before = bits_of(model)
    with torch.inference_mode(), averager.applied():
        pass
    assert before == bits_of(model)
    assert averager.update() is True
    assert torch.equal(
        torch.full((4,), 0.5), averages_of(averager)['float_buffer']
    )


def test_no_graph():
    """Averages need no gradient, and updates record none."""
    model = Mixed()
    averager = WeightAverager(model)
    averager.update()
    tensors = [t for _, t in averager.named_averages()]
    tensors += [t for _, t in averager.named_raws()]
    assert not any(t.requires_grad or t.grad_fn for t in tensors)
    assert all(p.grad_fn is None for p in model.parameters())


def test_distance():
    """The distance is the relative L2 norm over trained parameters."""
    model = Mixed()
    averager = WeightAverager(model, 'constant', decay=0.5)
    assert 0.0 == averager.distance()
    record(model, averager, 3)
    averages, raws = averages_of(averager), state_of(model)
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    gaps = [numpy64(averages[n]) - numpy64(raws[n]) for n in names]
    gap = np.sqrt(sum((g**2).sum() for g in gaps))
    size = np.sqrt(sum((numpy64(raws[n]) ** 2).sum() for n in names))
    # Differences are rounded to float32; that is far below 1e-6.
    expected = pytest.approx(gap / size, rel=1e-6)
    assert expected == averager.distance()
    with averager.applied():
        assert expected == averager.distance()


def test_distance_of_large_tensors():
    """Large tensors, also in channels_last, are measured in pieces."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 128, 5), nn.Linear(300, 700))
    model = model.to(memory_format=torch.channels_last)
    averager = WeightAverager(model, 'constant', decay=0.5)
    before = [numpy64(p) for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    averager.update()
    raws = [numpy64(p) for p in model.parameters()]
    gap = sum(((b - r) ** 2).sum() / 4 for b, r in zip(before, raws))
    size = sum((r**2).sum() for r in raws)
    # Averages, differences and sums are rounded to float32.
    expected = pytest.approx(np.sqrt(gap / size), rel=1e-5)
    assert expected == averager.distance()


def test_distance_of_complex_weights():
    """The distance counts the imaginary parts."""
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([3j, 4j]))
    averager = WeightAverager(model, 'constant', decay=0.5)
    with torch.no_grad():
        model.w.mul_(2)
    averager.update()
    # Averages 1.5 times the start, raw weights 2 times.
    assert 0.25 == averager.distance()


def test_distance_without_weights():
    """A model without trained weights, or of zeros, has distance 0."""
    assert 0.0 == WeightAverager(nn.ReLU()).distance()
    frozen = nn.Linear(1, 1).requires_grad_(False)
    assert 0.0 == WeightAverager(frozen).distance()
    zero = nn.Linear(1, 1)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    assert 0.0 == WeightAverager(zero).distance()


def test_names():
    """Averages and raws come under every name of the ``state_dict``."""
    model = Mixed()
    averager = WeightAverager(model)
    names = list(model.state_dict())
    assert sorted(names) == sorted(dict(averager.named_averages()))
    assert sorted(names) == sorted(dict(averager.named_raws()))
    frozen = {'frozen.weight', 'frozen.bias'}
    stored = dict(averager.named_averages(stored=True))
    assert set(names) - frozen == set(stored)
    averages = dict(averager.named_averages())
    pointers = averages['first.weight'].data_ptr()
    assert pointers == averages['tied.weight'].data_ptr()
