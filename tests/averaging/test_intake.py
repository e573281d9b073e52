"""Steps that are taken in beside the training: the numbers stay the same.

``overlap`` runs on a thread here. The shape that ``device='cpu'`` has with a
GPU, a thread that reads snapshots of everything, is made by hand.
"""

import gc
import os
import signal
import threading
import time
from inspect import signature

import pytest
import torch
from torch import nn

from mmdet_ema.averaging import NonFiniteError, WeightAverager, intake
from mmdet_ema.averaging.overlap import Worker
from mmdet_ema.averaging.update import StepPlan
from tests.averaging.models import (
    Mixed,
    averages_of,
    bits_of,
    perturb,
    raw_bytes,
    state_of,
)

NAN = float('nan')
SHORT, LONG = 0.2, 30
STATE = dict(num_steps=3, averages={})
KINDS = ('overlap', 'offload')


@pytest.fixture(params=KINDS)
def beside(request, monkeypatch):
    """Return a maker of averagers that take steps in beside the training."""
    if request.param == 'offload':
        monkeypatch.setattr(
            intake,
            'background_for',
            lambda devices, overlap: (
                (Worker(None, reads_raws=False), True)
                if overlap
                else (intake.Inline(), False)
            ),
        )
    return averager_of


def averager_of(model, overlap=True, **options):
    options = {'schedule': 'constant', 'decay': 0.75, **options}
    return WeightAverager(model, overlap=overlap, **options)


class Slow:
    """Holds the jobs of a plan back until it lets them go."""

    def __init__(self, monkeypatch):
        self.gate, self.started = threading.Event(), threading.Event()
        self.running = self.most = self.taken = 0
        take_in = StepPlan.take_in

        def slow(plan, step):
            self.running += 1
            self.most = max(self.most, self.running)
            self.started.set()
            assert self.gate.wait(LONG)
            try:
                return take_in(plan, step)
            finally:
                self.running -= 1
                self.taken += 1

        monkeypatch.setattr(StepPlan, 'take_in', slow)

    def let_go_later(self, seconds=SHORT):
        threading.Timer(seconds, self.gate.set).start()


@pytest.fixture
def slow(monkeypatch):
    slow = Slow(monkeypatch)
    yield slow
    slow.gate.set()


def bits(averager):
    return {n: raw_bytes(t) for n, t in averager.named_averages()}


def everything(averager):
    """Return all that can be seen of an averager, to the last bit."""
    return bits(averager), averager.progress(), bits_of(averager.model)


class Replaces(Mixed):
    """Also puts a new tensor into a buffer in every forward pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer('moving', torch.zeros(3))

    def forward(self, x):
        self.moving = self.moving * 0.5 + x.mean((0, 2, 3)).sum()
        self.counts += 1
        return super().forward(x)


class Training:
    """A real loop: SGD with momentum, BatchNorm, replaced buffers."""

    def __init__(self, overlap, make=averager_of, **options):
        torch.manual_seed(0)
        self.model = Replaces()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.001, momentum=0.9
        )
        self.averager = make(self.model, overlap, **options)
        self.generator = torch.Generator().manual_seed(1)

    def step(self, bad=False):
        x = torch.randn(4, 2, 5, 5, generator=self.generator)
        loss = self.model(x).sin()
        self.optimizer.zero_grad()
        loss.backward()
        self.averager.before_step()
        self.optimizer.step()
        kept = self.model.scale.detach().clone()
        if bad:
            self.model.scale.data.fill_(NAN)
        self.averager.update()
        if bad:
            # under way still: it has to be joined before weights change
            self.averager.before_step()
            self.model.scale.data.copy_(kept)

    def steps(self, count):
        for _ in range(count):
            self.step()


def alike(make, act, **options):
    """Do the same with an overlapped and a plain loop; compare each time."""
    pair = [Training(overlap, make, **options) for overlap in (True, False)]
    assert isinstance(pair[0].averager._store.intake._background, Worker)
    results = [[], []]
    for training, seen in zip(pair, results):
        for point in act(training):
            seen.append((point, everything(training.averager)))
    assert len(results[0]) > 0
    for found, expected in zip(*results):
        assert expected == found
    return pair


def rule(average, raw, n):
    average.lerp_(raw, 1 / (n + 1))


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(interval=3),
        dict(interval=4, phase=1),
        dict(update_buffers=False),
        dict(nonfinite='ignore'),
        dict(nonfinite='raise'),
        dict(schedule='exponential', decay=0.99),
        dict(schedule='mean', decay=None),
        dict(rule=rule),
    ],
    ids=str,
)
def test_training(beside, options):
    """A hundred steps leave the bits of the plain loop, buffers included."""
    if options.get('schedule') == 'mean':
        options = dict(schedule='mean')

        def make(model, overlap, **more):
            return WeightAverager(model, overlap=overlap, **more)
    else:
        make = beside

    def act(training):
        for count in (1, 1, 30, 68):
            training.steps(count)
            yield count

    pair = alike(make, act, **options)
    assert [0, 0] == [training.averager.num_skipped for training in pair]


@pytest.mark.parametrize('options', [{}, dict(interval=3)], ids=str)
def test_bad_steps(beside, options):
    """Steps with NaN are skipped, and counted, as in the plain loop."""

    def act(training):
        draws = torch.rand(80, generator=training.generator).tolist()
        for n, draw in enumerate(draws):
            training.step(bad=draw < 0.3)
            if draw > 0.8:
                yield n
        yield 'end'

    pair = alike(beside, act, **options)
    assert pair[0].averager.num_skipped > 10


def thawed(training):
    training.model.frozen.requires_grad_(True)


def parameter_replaced(training):
    training.model.scale = nn.Parameter(torch.tensor(0.25))
    training.optimizer.add_param_group(dict(params=[training.model.scale]))
    training.averager.refresh()


def converted(training):
    training.model.low.data = training.model.low.data.float()
    training.averager.refresh()


def to_channels_last(training):
    training.model.to(memory_format=torch.channels_last)


def data_of_other_memory(training):
    training.averager.before_step()
    weight = training.model.first.weight
    weight.data = weight.data.t().contiguous().t()


def loaded(training):
    training.averager.before_step()
    state = {k: v * 0.5 for k, v in state_of(training.model).items()}
    state = {
        k: v.to(training.model.state_dict()[k].dtype) for k, v in state.items()
    }
    training.model.load_state_dict(state)


def assigned(training):
    if 'assign' not in signature(nn.Module.load_state_dict).parameters:
        pytest.skip('torch before 2.1 has no load_state_dict(assign=True)')
    training.model.load_state_dict(state_of(training.model), assign=True)
    training.averager.refresh()
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.01)


def average_loaded(training):
    averager = training.averager
    state = averager.state_dict()
    state['averages'] = {
        k: v + 1 if v.is_floating_point() else v
        for k, v in averages_of(averager).items()
    }
    averager.load_state_dict(state)


def state_asked(training):
    state = training.averager.state_dict()
    assert state['num_steps'] > 0
    training.seen = {k: v.clone() for k, v in state['averages'].items()}


def applied(training):
    with training.averager.applied() as model:
        training.seen = {k: v.clone() for k, v in model.state_dict().items()}
        training.averager.apply()


def evaluated(training):
    training.model.eval()
    with training.averager.applied() as model, torch.no_grad():
        assert model(torch.ones(1, 2, 5, 5)).isfinite()
    training.model.train()


def distance_asked(training):
    assert training.averager.distance() > 0


@pytest.mark.parametrize(
    'event',
    [
        thawed,
        parameter_replaced,
        converted,
        to_channels_last,
        data_of_other_memory,
        loaded,
        assigned,
        average_loaded,
        state_asked,
        applied,
        evaluated,
        distance_asked,
    ],
)
@pytest.mark.parametrize('interval', [1, 3])
def test_events_in_mid_run(beside, event, interval):
    """What happens while a step is under way finds the right numbers."""

    def act(training):
        training.steps(7)
        event(training)
        seen = getattr(training, 'seen', {})
        yield [(name, raw_bytes(value)) for name, value in seen.items()]
        for _ in range(3):
            training.steps(5)
            event(training) if event in (applied, state_asked) else None
            yield 'later'

    alike(beside, act, interval=interval)


def test_random_events(beside):
    """Three hundred steps with random events leave the plain loop's bits."""
    events = [
        loaded,
        average_loaded,
        applied,
        evaluated,
        data_of_other_memory,
        state_asked,
    ]

    def act(training):
        draws = torch.randint(
            0, 30, (300,), generator=torch.Generator().manual_seed(2)
        )
        for draw in draws.tolist():
            training.step(bad=draw == 29)
            if draw < len(events):
                events[draw](training)
                yield events[draw].__name__

    alike(beside, act)


def test_step_waits_for_the_update(slow):
    """``before_step`` returns when the weights are no longer read."""
    model = nn.Linear(2, 2)
    averager = averager_of(model)
    start, weights = averages_of(averager), model.weight.detach().clone()
    averager.update()
    assert slow.started.wait(LONG)
    slow.let_go_later()
    averager.before_step()
    assert slow.gate.is_set()
    model.weight.data.fill_(100)
    expected = 0.75 * start['weight'] + 0.25 * weights
    torch.testing.assert_close(averages_of(averager)['weight'], expected)


def test_step_that_does_not_wait_is_seen(slow):
    """Weights that change too early get into the average: one has to wait."""
    model = nn.Linear(2, 2)
    averager = averager_of(model)
    start = averages_of(averager)
    averager.update()
    assert slow.started.wait(LONG)
    model.weight.data.fill_(100)
    slow.gate.set()
    expected = 0.75 * start['weight'] + 25
    torch.testing.assert_close(averages_of(averager)['weight'], expected)


def test_buffers_may_change_at_once(slow):
    """What a forward pass does to buffers is not in the step before it."""
    model = nn.BatchNorm1d(2)
    averager = averager_of(model)
    averager.update()
    assert slow.started.wait(LONG)
    model(torch.full((4, 2), 7.0) + torch.randn(4, 2))
    slow.gate.set()
    averages = averages_of(averager)
    assert torch.equal(torch.zeros(2), averages['running_mean'])
    assert 0 == averages['num_batches_tracked']


@pytest.mark.parametrize(
    'look',
    [
        lambda averager: averager.num_steps,
        lambda averager: averager.num_skipped,
        lambda averager: averager.decay,
        lambda averager: averager.state_dict(),
        lambda averager: averager.named_averages(),
        lambda averager: averager.apply(),
        lambda averager: averager.distance(),
        lambda averager: averager.synchronize(),
        lambda averager: averager.refresh(),
        lambda averager: averager.thaw(),
        lambda averager: averager.settle(),
        lambda averager: averager.progress(),
        lambda averager: averager.load_state_dict(STATE, strict=False),
    ],
)
def test_looking_waits(beside, slow, look):
    """Whatever looks at averages or counters waits for the step."""
    averager = beside(nn.Linear(2, 2))
    averager.update()
    assert slow.started.wait(LONG)
    slow.let_go_later()
    look(averager)
    assert 1 == slow.taken


def test_known_skipped_does_not_wait(beside, slow):
    """What is known of skipped steps is told at once."""
    model = nn.Linear(2, 2)
    averager = beside(model)
    model.weight.data.fill_(NAN)
    averager.update()
    assert slow.started.wait(LONG)
    assert 0 == averager.known_skipped
    assert not slow.gate.is_set()
    slow.gate.set()
    assert averager.settle() is False
    assert 1 == averager.known_skipped


def test_one_step_under_way(beside, slow):
    """A second step waits for the first; none is dropped."""
    model = nn.Linear(2, 2)
    averager = beside(model)
    slow.gate.set()
    for _ in range(50):
        averager.update()
    averager.settle()
    slow.gate.clear()
    slow.started.clear()
    averager.update()
    assert slow.started.wait(LONG)
    slow.let_go_later()
    averager.update()
    assert slow.gate.is_set()
    assert 52 == averager.num_steps
    assert (52, 1) == (slow.taken, slow.most)


def test_error_in_the_background(beside, monkeypatch):
    """An error surfaces once; counters stay, and the next update works."""
    model = nn.Linear(2, 2)
    averager = beside(model)
    averager.update()
    before = everything(averager)
    take_in = StepPlan.take_in

    def fail(plan, step):
        raise MemoryError('no room')

    monkeypatch.setattr(StepPlan, 'take_in', fail)
    assert averager.update() is True
    with pytest.raises(MemoryError, match='no room'):
        averager.settle()
    assert before == everything(averager)
    assert averager.settle() is True
    averager.update()
    with pytest.raises(MemoryError, match='no room'):
        averager.update()
    monkeypatch.setattr(StepPlan, 'take_in', take_in)
    assert before == everything(averager)
    averager.update()
    assert (2, 2, 0) == (
        averager.num_steps,
        averager.num_updates,
        averager.num_skipped,
    )


def test_weights_of_another_size(beside):
    """Weights that no longer fit are an error, and nothing is counted."""
    model = nn.Linear(3, 3)
    averager = beside(model)
    before = bits(averager)
    kept, model.weight.data = model.weight.data, torch.ones(3, 2)
    with pytest.raises(RuntimeError):
        averager.update() and averager.settle()
    model.weight.data = kept
    assert averager.num_steps in (0, 1)
    averager.update()
    assert averager.settle() is True
    assert before.keys() == bits(averager).keys()


def test_raise_beside(beside):
    """Under 'raise' the error comes from the update that was bad."""
    model = nn.Linear(2, 2)
    averager = beside(model, nonfinite='raise')
    averager.update()
    before = bits(averager)
    model.bias.data[0] = NAN
    averager.before_step()
    with pytest.raises(NonFiniteError, match='bias holds NaN'):
        averager.update()
    assert before == bits(averager)
    assert (1, 0) == (averager.num_steps, averager.num_skipped)


@pytest.fixture
def interrupt_later():
    """Send a real Ctrl-C to this process after a moment."""
    timers = []

    def later(seconds=SHORT):
        arguments = os.getpid(), signal.SIGINT
        timers.append(threading.Timer(seconds, os.kill, arguments))
        timers[-1].start()

    yield later
    for timer in timers:
        timer.join()


@pytest.mark.parametrize('wait', ['settle', 'update', 'num_steps', 'apply'])
def test_interrupt_while_waiting(beside, slow, interrupt_later, wait):
    """Ctrl-C ends the wait, not the step: it is joined and counted later."""
    model = nn.Linear(2, 2)
    averager = beside(model)
    start, raw = averages_of(averager), model.weight.detach().clone()
    averager.update()
    assert slow.started.wait(LONG)
    interrupt_later()
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        found = getattr(averager, wait)
        found()
    assert not averager.is_applied
    assert 0 == slow.taken
    slow.let_go_later()
    assert 1 == averager.num_steps
    assert (1, 1) == (slow.taken, averager.num_updates)
    expected = 0.75 * start['weight'] + 0.25 * raw
    torch.testing.assert_close(averages_of(averager)['weight'], expected)


def test_interrupt_before_a_step(slow, interrupt_later):
    """Ctrl-C in ``before_step`` comes through; the step stays under way."""
    averager = averager_of(nn.Linear(2, 2))
    averager.update()
    assert slow.started.wait(LONG)
    interrupt_later()
    with pytest.raises(KeyboardInterrupt):
        averager.before_step()
    slow.let_go_later()
    averager.before_step()
    assert (1, 1) == (slow.taken, averager.num_steps)


def ours():
    return [t for t in threading.enumerate() if t.name.startswith('mmdet_ema')]


def test_plans_made_anew_share_a_thread(beside):
    """However often a model is followed, one thread serves it."""
    gc.collect()
    stop = time.monotonic() + LONG
    while ours() and time.monotonic() < stop:
        time.sleep(0.01)
    model = nn.Linear(2, 2)
    averager = beside(model)
    for _ in range(20):
        averager.update()
        averager.before_step()
        model.weight = nn.Parameter(model.weight.detach().clone())
        averager.refresh()
        assert len(ours()) == 1
    assert 20 == averager.num_updates
    del averager
    gc.collect()
    stop = time.monotonic() + LONG
    while ours() and time.monotonic() < stop:
        time.sleep(0.01)
    assert [] == ours()


def tensors():
    gc.collect()
    return sum(
        x.numel()
        for x in gc.get_objects()
        if type(x) in (torch.Tensor, nn.Parameter)
    )


def test_memory_does_not_grow(beside):
    """Many steps, and plans made anew, leave as many tensors as before."""
    model = Replaces()
    averager = beside(model)
    generator = torch.Generator().manual_seed(0)

    def run():
        for n in range(40):
            averager.before_step()
            perturb(model, generator)
            model.moving = model.moving * 0.5
            averager.update()
            if n % 10 == 0:
                model.scale = nn.Parameter(model.scale.detach().clone())
                averager.refresh()
        averager.settle()

    run()
    before = tensors()
    run()
    assert before == tensors()


@pytest.mark.parametrize('offload', [False, True])
def test_snapshots_take_what_may_change(monkeypatch, offload):
    """Beside the training buffers are copied first; for a GPU, all."""
    if offload:
        monkeypatch.setattr(
            intake,
            'background_for',
            lambda *devices: (Worker(None, reads_raws=False), True),
        )
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    averager = averager_of(model)
    copies = averager._store.intake._snapshot.copies
    assert len(copies) == (7 if offload else 3)
    plain = averager_of(model, overlap=False)
    assert len(plain._store.intake._snapshot.copies) == 7 * offload


def test_without_overlap_nothing_is_copied_and_no_thread_made():
    """An averager as it is by default needs neither."""
    gc.collect()
    before = len(ours())
    averager = averager_of(nn.BatchNorm1d(3), overlap=False)
    averager.update()
    assert [] == averager._store.intake._snapshot.copies
    assert before == len(ours())


def test_tied_parameter_and_buffer(beside):
    """A buffer that is a parameter's memory is one tensor, beside, too."""

    def make(overlap):
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        model.register_buffer('same', model.weight.detach())
        model.register_buffer('corner', model.weight.detach()[0])
        return beside(model, overlap), model

    found = []
    for overlap in (True, False):
        averager, model = make(overlap)
        for value in range(5):
            averager.before_step()
            model.weight.data.fill_(value)
            averager.update()
        found.append(everything(averager))
    assert found[0] == found[1]
    averages = found[0][0]
    assert averages['weight'] == averages['same']
    assert averages['weight'].startswith(averages['corner'])


@pytest.mark.parametrize('make', [nn.Identity, nn.Flatten])
def test_empty_model(make):
    """A model without tensors takes steps, overlapped or not."""
    for overlap in (True, False):
        averager = averager_of(make(), overlap)
        assert averager.update() is True
        averager.before_step()
        assert averager.update() is True
        assert 2 == averager.num_updates


def test_inference_mode(beside):
    """Inside inference mode, and of tensors made there, averages are taken."""
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        averager = beside(model)
        model[0].weight.fill_(3)
        averager.update()
        averager.settle()
    inside = averages_of(averager)['0.weight']
    with torch.inference_mode():
        model[0].weight.fill_(5)
    averager.before_step()
    averager.update()
    outside = averages_of(averager)['0.weight']
    torch.testing.assert_close(outside, 0.75 * inside + 0.25 * 5)
