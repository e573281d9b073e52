"""Averages in and out of the model, bit for bit, whatever happens."""

import contextlib
import itertools
import os
import signal
import threading

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_ema.averaging import WeightAverager, swap
from mmdet_ema.averaging.update import DeferredInterrupts
from tests.averaging.models import (
    Mixed,
    OutOfMemoryError,
    averages_of,
    bits_of,
    perturb,
    raw_bytes,
    state_of,
    storage_of,
)


def averaged(model=None, **options):
    """Return a model, an averager a few steps on, and its averages."""
    model = Mixed() if model is None else model
    averager = WeightAverager(model, 'constant', decay=0.5, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        perturb(model, generator)
        averager.update()
    return model, averager, averages_of(averager)


def same_averages(averager, expected):
    """Return whether the averages are those, bit for bit."""
    found = averages_of(averager)
    return all(raw_bytes(expected[k]) == raw_bytes(found[k]) for k in expected)


def check_raw(model, averager, bits, averages):
    """Check that the model is raw and that everything goes on."""
    assert bits == bits_of(model)
    assert averager.is_applied is False
    assert same_averages(averager, averages)
    with averager.applied():
        assert same_averages(averager, averages)
    assert bits == bits_of(model)
    assert averager.update() is True


@contextlib.contextmanager
def raw_afterwards():
    """Give such an averager to a block that leaves the raw weights."""
    model, averager, averages = averaged()
    bits = bits_of(model)
    yield averager
    check_raw(model, averager, bits, averages)


def test_applied():
    """Inside, the model holds the averages; afterwards the raw weights."""
    with raw_afterwards() as averager:
        model = averager.model
        averages = averages_of(averager)
        with averager.applied() as inside:
            assert inside is model
            assert averager.is_applied is True
            for name, value in model.state_dict().items():
                expected = averages[name].to(value.dtype)
                assert raw_bytes(expected) == raw_bytes(value), name
            first, tied = model.first.weight, model.tied.weight
            assert raw_bytes(first) == raw_bytes(tied)


def test_names_while_applied():
    """Averages and raws are the same by name while they are applied."""
    model, averager, averages = averaged()
    raws = state_of(model)
    with averager.applied():
        assert same_averages(averager, averages)
        for name, raw in averager.named_raws():
            assert raw_bytes(raws[name]) == raw_bytes(raw), name
            assert raws[name].dtype == raw.dtype
        stored = dict(averager.named_averages(stored=True))
        assert all(torch.equal(averages[k], v) for k, v in stored.items())
        state = averager.state_dict()['averages']
        assert all(torch.equal(averages[k], v) for k, v in state.items())
    assert list(averages) == list(state)


def test_objects_stay():
    """A swap changes values only: objects, storage and strides stay."""
    model, averager, _ = averaged(nn.Conv2d(2, 3, 2))
    model.to(memory_format=torch.channels_last)
    before = [(id(p), p.data_ptr(), p.stride()) for p in model.parameters()]
    with averager.applied():
        inside = [
            (id(p), p.data_ptr(), p.stride()) for p in model.parameters()
        ]
    after = [(id(p), p.data_ptr(), p.stride()) for p in model.parameters()]
    assert before == inside == after


@pytest.mark.parametrize(
    'error', [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit]
)
def test_exception_inside(error):
    """The raw weights come back after any exception, which goes on."""
    strike = pytest.raises(error)
    with raw_afterwards() as averager, strike, averager.applied():
        raise error


def test_nested():
    """Only the outermost block takes the averages out again."""
    with raw_afterwards() as averager:
        model = averager.model
        bits = bits_of(model)
        with averager.applied():
            with averager.applied():
                pass
            with contextlib.suppress(ValueError), averager.applied():
                raise ValueError
            assert averager.is_applied is True
            assert bits != bits_of(model)


def test_apply_and_restore():
    """``apply`` and ``restore`` do nothing where nothing is to do."""
    with raw_afterwards() as averager:
        model = averager.model
        bits = bits_of(model)
        averager.restore()
        assert bits == bits_of(model)
        averager.apply()
        averager.apply()
        assert bits != bits_of(model)
        averager.restore()
        averager.restore()
        with averager.applied():
            averager.restore()
            assert bits == bits_of(model)


def test_tensors_that_are_replaced_inside():
    """What was computed from the averages does not stay in the model."""
    with raw_afterwards() as averager:
        model = averager.model
        buffer = model.norm.running_mean
        with averager.applied():
            model.norm.running_mean = model.norm.running_mean * 2
            model.scale = nn.Parameter(torch.ones(()))
        assert model.norm.running_mean is buffer


def test_update_inside():
    """An update inside is refused and changes nothing."""
    with raw_afterwards() as averager:
        averages = averages_of(averager)
        progress = averager.progress()
        with averager.applied():
            with pytest.raises(RuntimeError, match=r'applied\(\)'):
                averager.update()
            assert same_averages(averager, averages)
        assert progress == averager.progress()


def test_load_inside():
    """Loading inside is refused in words and changes nothing."""
    with raw_afterwards() as averager:
        state = averager.state_dict()
        with averager.applied(), pytest.raises(RuntimeError, match='applied'):
            averager.load_state_dict(state)


def test_changes_are_followed_inside():
    """A refresh, or a parameter that thaws, loses no raw weights."""
    with raw_afterwards() as averager:
        model = averager.model
        with averager.applied():
            averager.refresh()
            assert averager.is_applied is True
            model.frozen.requires_grad_(True)
            with contextlib.suppress(RuntimeError):
                averager.follow_changes()


@pytest.mark.parametrize(
    'value', [float('nan'), float('inf'), -0.0, 1e-45, 'max']
)
@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_odd_values(dtype, value):
    """NaN, infinities, -0.0 and denormals come back bit for bit."""
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(4, dtype=dtype))
    averager = WeightAverager(model, 'constant', decay=0.5)
    with torch.no_grad():
        model.w.fill_(torch.finfo(dtype).max if value == 'max' else value)
        if dtype == torch.float32:  # a NaN with a payload
            model.w.view(torch.int32)[0] = 0x7FC12345
    bits = bits_of(model)
    with averager.applied():
        assert torch.equal(torch.ones(4, dtype=dtype), model.w.detach())
    assert bits == bits_of(model)


def test_low_precision_does_not_round_the_average():
    """A float32 average is not rounded by a stay in a bfloat16 model."""
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    averager = WeightAverager(model, 'constant', decay=0.9999)
    with torch.no_grad():
        model.w.fill_(2)
    averager.update()
    before = averages_of(averager)['w']
    assert not torch.equal(before, before.bfloat16().float())
    with averager.applied():
        pass
    assert torch.equal(before, averages_of(averager)['w'])


def test_hook_handles_and_training_mode():
    """Training mode, gradients and ``requires_grad`` are left alone."""
    model, averager, _ = averaged()
    model(torch.ones(2, 2, 4, 4)).backward()
    grads = {
        k: p.grad.clone()
        for k, p in model.named_parameters()
        if p.grad is not None
    }
    flags = [p.requires_grad for p in model.parameters()]
    with averager.applied():
        assert model.training
    assert flags == [p.requires_grad for p in model.parameters()]
    for name, parameter in model.named_parameters():
        if name in grads:
            assert torch.equal(grads[name], parameter.grad)


class Merging(nn.Linear):
    """Adds its low rank to its weight in evaluation mode, as LoRA."""

    def __init__(self):
        super().__init__(4, 4)
        self.low_rank = nn.Parameter(torch.ones(4, 4))
        self.is_merged = False

    def train(self, mode):  # without a default
        super().train(mode)
        if mode is self.is_merged:
            self.weight.data += self.low_rank.data * (-1 if mode else 1)
            self.is_merged = not mode
        return self


class Frozen(nn.Sequential):
    """Stays in evaluation mode, but for what is trained in it."""

    def train(self, mode=True):
        super().train(False)
        for child in self:
            if isinstance(child, Merging):
                child.train(mode)
        return self


class Refusing(nn.Linear):
    """Is never trained, and says so."""

    def train(self, mode=True):
        if mode:
            raise RuntimeError('is not trained')
        return super().train(mode)


def parts(model):
    """The modes of modules, and what is merged."""
    return [
        (name, x.training, getattr(x, 'is_merged', None))
        for name, x in model.named_modules()
    ]


@pytest.mark.parametrize('evaluates', [False, True])
def test_modes_that_are_mixed(evaluates):
    """Each part is in the mode that it was in, and merged as it was."""
    refusing = Refusing(4, 4)
    refusing.training = False
    frozen = Frozen(nn.BatchNorm1d(4), Merging())
    model = nn.ModuleList([nn.Linear(4, 4), frozen, refusing])
    frozen.train(not evaluates)
    averager = WeightAverager(model)
    before, state = parts(model), state_of(model)
    with averager.applied():
        assert before == parts(model)
        frozen.train(evaluates)
    frozen.train(not evaluates)
    assert before == parts(model)
    for name, tensor in state_of(model).items():
        assert torch.allclose(tensor, state[name], atol=1e-6), name


# Something strikes at the n-th operator of a swap

ALLOCATING = frozenset(
    ['clone', '_to_copy', 'empty', 'empty_like', 'empty_strided', 'new_empty']
)


class StrikeAt(TorchDispatchMode):
    """Runs ``action`` before the n-th operator, or the n-th of some."""

    def __init__(self, number, action, names=None, forever=False):
        super().__init__()
        self.number, self.action = number, action
        self.names, self.forever = names, forever
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.names or func.overloadpacket.__name__ in self.names:
            self.calls += 1
            late = self.forever and self.calls > self.number
            if self.calls == self.number or late:
                self.action()
        return func(*args, **(kwargs or {}))


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def out_of_memory():
    raise OutOfMemoryError('out of memory')


def calls_of_swap(names=None):
    """Count the operators of a swap in, and of the swap out after it."""
    _, averager, _ = averaged()
    with StrikeAt(0, None, names) as entering:
        averager.apply()
    with StrikeAt(0, None, names) as leaving:
        averager.restore()
    assert entering.calls >= 1
    return entering.calls, leaving.calls


def test_interrupt_while_swapping_in():
    """Ctrl-C at any moment of the swap in leaves the raw weights."""
    entered, _ = calls_of_swap()
    for number in range(1, entered + 1):
        with raw_afterwards() as averager:
            reached = []
            strike = StrikeAt(number, interrupt)
            with strike, pytest.raises(KeyboardInterrupt), averager.applied():
                reached.append(number)
            assert [] == reached


def test_interrupt_while_swapping_out():
    """Ctrl-C at any moment of the swap out leaves the raw weights."""
    _, left = calls_of_swap()
    for number in range(1, left + 1):
        with raw_afterwards() as averager:
            averager.apply()
            strike = StrikeAt(number, interrupt)
            with strike, pytest.raises(KeyboardInterrupt):
                averager.restore()


def test_interrupt_after_a_tensor_was_replaced():
    """Ctrl-C in the swap out puts back what an evaluation has replaced."""
    model, averager, averages = averaged()
    bits, (name, own) = bits_of(model), next(iter(model.named_parameters()))
    *path, leaf = name.split('.')
    owner = model.get_submodule('.'.join(path))
    averager.apply()
    setattr(owner, leaf, nn.Parameter(torch.zeros_like(own)))
    with StrikeAt(1, interrupt), pytest.raises(KeyboardInterrupt):
        averager.restore()
    assert getattr(owner, leaf) is own
    check_raw(model, averager, bits, averages)


def test_state_that_is_taken_while_applied():
    """It holds the averages, also when the raw weights are back."""
    _, averager, averages = averaged()
    with averager.applied():
        state = averager.state_dict()['averages']
    assert {raw_bytes(x) for x in averages.values()} == {
        raw_bytes(x) for x in state.values()
    }
    assert all(raw_bytes(averages[k]) == raw_bytes(state[k]) for k in averages)


def test_interrupt_comes_through_once():
    """A deferred Ctrl-C is raised at the end of the body, once."""
    reached = []

    def body():
        with DeferredInterrupts():
            interrupt()
            interrupt()
            reached.append('end')

    with pytest.raises(KeyboardInterrupt):
        body()
    assert ['end'] == reached
    assert signal.default_int_handler is signal.getsignal(signal.SIGINT)


def test_no_interrupt():
    """Without Ctrl-C the handler of before is back, and nothing is raised."""
    before = signal.getsignal(signal.SIGINT)
    with DeferredInterrupts():
        assert before is not signal.getsignal(signal.SIGINT)
    assert before is signal.getsignal(signal.SIGINT)


def test_handler_of_the_user():
    """A handler that the user has set is called with the signal."""
    received = []
    before = signal.signal(
        signal.SIGINT, lambda number, frame: received.append(number)
    )
    try:
        with DeferredInterrupts():
            interrupt()
            assert [] == received
        assert [signal.SIGINT] == received
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize('handler', [signal.SIG_IGN, signal.SIG_DFL])
def test_other_handlers(handler):
    """Handlers that are no functions are left alone."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        with DeferredInterrupts():
            assert handler == signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_error_and_interrupt():
    """The handler of before is back after an exception in the body."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match='x'), DeferredInterrupts():
        raise ValueError('x')
    assert before is signal.getsignal(signal.SIGINT)


def test_other_thread():
    """A swap in another thread works without touching signals."""
    with raw_afterwards() as averager:
        averages = averages_of(averager)
        errors = []

        def evaluate():
            try:
                with averager.applied():
                    assert same_averages(averager, averages)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=evaluate)
        thread.start()
        thread.join()
        assert [] == errors


@pytest.mark.parametrize('forever', [False, True])
def test_out_of_memory_while_swapping_in(forever):
    """At any moment of it nothing is changed, also if none comes back."""
    entered, _ = calls_of_swap(ALLOCATING)
    for number in range(1, entered + 1):
        with raw_afterwards() as averager:
            strike = StrikeAt(number, out_of_memory, ALLOCATING, forever)
            with strike, pytest.raises(OutOfMemoryError):
                averager.apply()


def test_out_of_memory_while_swapping_out():
    """Out of memory in the swap out leaves averages that can be restored."""
    _, left = calls_of_swap(ALLOCATING)
    for number in range(1, left + 1):
        with raw_afterwards() as averager:
            model = averager.model
            averager.apply()
            inside = bits_of(model)
            strike = StrikeAt(number, out_of_memory, ALLOCATING)
            with strike, pytest.raises(OutOfMemoryError):
                averager.restore()
            assert averager.is_applied is True
            assert inside == bits_of(model)
            averager.restore()


class WatchNew(TorchDispatchMode):
    """Records the most bytes of new tensors that live at the same time."""

    def __init__(self):
        super().__init__()
        self.made, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            storage_of(item).data_ptr()
            for item in args
            if isinstance(item, torch.Tensor)
        }
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            storage = storage_of(found)
            if storage.data_ptr() not in known:
                weak = StorageWeakRef(storage)
                self.made[weak.cdata] = weak, storage.nbytes()
        live = (size for w, size in self.made.values() if not w.expired())
        self.most = max(self.most, sum(live))
        return found


def test_no_second_copy():
    """A swap holds 4 MiB beside the model, not a second model."""
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(20)))
    averager = WeightAverager(model)
    with WatchNew() as watch:
        averager.apply()
        averager.restore()
    assert 512 * 512 * 4 <= watch.most <= 4 * 2**20


def test_scratch_of_a_large_tensor():
    """A tensor larger than 4 MiB is swapped through one of its size."""
    model = nn.Sequential(nn.Linear(2048, 1024), nn.Linear(1024, 2048))
    averager = WeightAverager(model)
    with WatchNew() as watch:
        averager.apply()
        averager.restore()
    assert 2048 * 1024 * 4 == watch.most


class Layouts(nn.Module):
    """Tied, strided, zero-sized, integer and low-precision tensors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        whole = torch.randn(6, 40)
        self.last = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.tied = nn.Conv2d(3, 4, 3)
        self.tied.weight = self.last.weight
        self.turned = nn.Parameter(torch.randn(5, 7).t())
        self.same = nn.Parameter(self.turned.detach())
        self.sliced = nn.Parameter(whole[:, 3:9])
        self.beside = nn.Parameter(whole[:, 20:])
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.scalar = nn.Parameter(torch.tensor(-0.0))
        self.low = nn.Parameter(torch.randn(33).half())
        self.wide = nn.Parameter(torch.randn(9, dtype=torch.float64))
        self.register_buffer('row', torch.randn(1, 5).expand(4, 5))
        self.register_buffer('counts', torch.arange(20))
        self.register_buffer('mask', torch.rand(3) > 0.5)


def moved():
    """Return such a model, averaged after its weights moved."""
    model = Layouts()
    averager = WeightAverager(model, 'constant', decay=0.5)
    with torch.no_grad():
        for entry in averager.entries:
            raw = entry.raw
            if raw.dtype == torch.bool:
                raw.logical_not_()
            elif entry.name != 'row':  # it repeats its memory
                raw.mul_(3)
    averager.update()
    return model, averager, averages_of(averager)


@pytest.mark.parametrize('room', [1, 7, 64, 2**20])
def test_chunks_of_every_layout(monkeypatch, room):
    """However small the scratch: averages go in and raw weights come back."""
    monkeypatch.setattr(swap, '_SCRATCH', room)
    model, averager, averages = moved()
    bits = bits_of(model)
    places = [t.data_ptr() for t in model.state_dict().values()]
    for _ in range(2):
        with averager.applied():
            for name, value in model.state_dict().items():
                expected = averages[name].to(value.dtype)
                assert torch.equal(expected, value), name
        assert bits == bits_of(model)
    check_raw(model, averager, bits, averages)
    assert places == [t.data_ptr() for t in model.state_dict().values()]


def test_interrupts_between_chunks(monkeypatch):
    """Ctrl-C at any call of a swap in many pieces leaves it whole."""
    monkeypatch.setattr(swap, '_SCRATCH', 7)
    for number in itertools.count(1):
        model, averager, averages = moved()
        bits, strike = bits_of(model), StrikeAt(number, interrupt)
        try:
            with strike:
                averager.apply()
        except KeyboardInterrupt:
            assert averager.is_applied
            for name, value in model.state_dict().items():
                assert torch.equal(averages[name].to(value.dtype), value)
        else:
            break
        averager.restore()
        check_raw(model, averager, bits, averages)
    assert number > 20


def test_swap_between_forward_and_backward():
    """A swap there and back leaves the gradients as they would have been."""
    model = Mixed()
    averager = WeightAverager(model, 'constant', decay=0.5)
    inputs = torch.randn(2, 3, requires_grad=True)
    model.first(inputs).sum().backward()
    expected, inputs.grad = inputs.grad.clone(), None
    loss = model.first(inputs).sum()
    with averager.applied():
        pass
    loss.backward()
    assert torch.equal(expected, inputs.grad)
