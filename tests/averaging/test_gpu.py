"""What only a GPU shows: no waiting, streams, pinned memory, peaks.

Written against torch's documentation. torch counts as synchronisation what
``torch.cuda.set_sync_debug_mode`` does: ``.item()``, copies that block.
"""

import contextlib
import copy
import gc

import pytest
import torch
from torch import nn

from mmdet_ema.averaging import NonFiniteError, WeightAverager
from mmdet_ema.averaging import update as module
from mmdet_ema.averaging.overlap import SideStream
from mmdet_ema.averaging.update import DeviceVerdict, UpdatePlan, all_finite
from mmdet_ema.checkpoint.format import pack
from tests import oracle
from tests.averaging.models import (
    CountCalls,
    Mixed,
    numpy64,
    perturb,
    state_of,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'),
]
GPU = torch.device('cuda', 0)
BAD = (float('nan'), float('inf'), float('-inf'))
# float32 keeps 200 steps within 17 half units in the last place
TOLERANCE = 1e-6
MIB = 2**20
# GPU cycles, some tens of ms: longer than the host needs for what follows
LONG = 10**8


class Net(nn.Module):
    """Convolutions, BatchNorm and a head: float32 but for its counters."""

    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, width, 3).to(
            memory_format=torch.channels_last
        )
        self.norm = nn.BatchNorm2d(width)
        self.middle = nn.Conv2d(width, width, 1)
        self.tied = nn.Conv2d(width, width, 1, bias=False)
        self.tied.weight = self.middle.weight
        self.head = nn.Linear(width, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        x = self.tied(self.middle(self.norm(self.conv(x)).relu()))
        return self.frozen(self.head(x.mean((2, 3))))


class LowNet(Net):
    """Also has a parameter in half precision."""

    def __init__(self):
        super().__init__()
        self.low = nn.Parameter(torch.ones(70, dtype=torch.bfloat16))


def averager_of(model, **options):
    options = {'schedule': 'constant', 'decay': 0.9, **options}
    return WeightAverager(model, **options)


def shake(model):
    """Change weights and buffers on the GPU without the host waiting."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(0.98).add_(0.01)
            else:
                tensor.add_(1)


@contextlib.contextmanager
def no_waiting():
    """Let everything fail that makes the host wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


def bits(tensors):
    """Return tensors by name as integers on the host: NaN is equal to NaN."""
    return {
        name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for name, tensor in tensors
    }


def same(left, right):
    """Return the names whose bits differ."""
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def slow_on_device(monkeypatch, owner, name):
    """Make the GPU busy for long before a method's own work."""
    method = getattr(owner, name)

    def slow(*args):
        torch.cuda._sleep(LONG)
        return method(*args)

    monkeypatch.setattr(owner, name, slow)


def test_debug_mode_finds_waiting():
    """The check of these tests fails where the host does wait."""
    value = torch.ones(1, device=GPU)
    with pytest.raises(RuntimeError), no_waiting():
        value.item()


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(schedule='exponential'),
        dict(interval=3),
        dict(update_buffers=False),
        dict(update_buffers=False, interval=3),
        dict(nonfinite='ignore'),
        dict(overlap=True),
        dict(overlap=True, interval=3),
        dict(overlap=True, update_buffers=False),
    ],
    ids=str,
)
def test_no_synchronisation(options):
    """After the first ones, updates never make the host wait."""
    model = Net().to(GPU)
    averager = averager_of(model, **options)
    for _ in range(6):
        shake(model)
        averager.update()
        averager.before_step()
    with no_waiting():
        for _ in range(12):
            shake(model)
            averager.update()
            averager.before_step()
    assert averager.num_steps == 18
    assert averager.num_skipped == 0


def test_no_synchronisation_in_half_precision():
    """Without a check for NaN, half precision needs no waiting either."""
    model = LowNet().to(GPU)
    averager = averager_of(model, nonfinite='ignore')
    averager.update()
    with no_waiting():
        for _ in range(5):
            shake(model)
            averager.update()
    assert averager.num_updates == 6


def test_verdict_on_the_device_is_used():
    """Where one fused kernel updates all, the check stays on the device."""
    assert module._trial(module._try_fused, GPU, torch.float32)
    averager = averager_of(Net().to(GPU))
    averager.update()
    assert isinstance(averager._verdict, DeviceVerdict)
    assert averager.wait() is True


def calls_of(layers, **options):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))).to(GPU)
    averager = averager_of(model, **options)
    averager.update()
    averager.wait()
    with CountCalls() as count:
        averager.update()
    return count.calls


@pytest.mark.parametrize('options', [{}, dict(overlap=True)], ids=str)
def test_calls_do_not_grow(options):
    """A hundred layers need as many calls as one, apart from views."""
    one, many = calls_of(1, **options), calls_of(100, **options)
    # norms come as one tensor each, which are stacked in one call
    drop = {'unbind', 'view', 'select'}
    assert [x for x in one if x not in drop] == [
        x for x in many if x not in drop
    ]
    assert '_fused_sgd_' in one
    assert len(one) <= 20


@pytest.mark.parametrize(
    'options',
    [{}, dict(overlap=True), dict(device='cpu'), dict(interval=3)],
    ids=str,
)
@pytest.mark.parametrize('make', [Net, LowNet, Mixed])
def test_numbers(make, options):
    """Two hundred steps follow NumPy in float64, as they do on the host."""
    host, generator = make(), torch.Generator().manual_seed(1)
    model = copy.deepcopy(host).to(GPU)
    averager = averager_of(model, **options)
    start, states = state_of(host), []
    for _ in range(200):
        perturb(host, generator)
        states.append(state_of(host))
        averager.before_step()
        model.load_state_dict(host.state_dict())
        averager.update()
    interval = options.get('interval', 1)
    for name, average in averager.named_averages():
        if not start[name].is_floating_point():
            # copied at every step, updated or not
            assert torch.equal(states[-1][name], average.cpu()), name
            continue
        expected = oracle.average_every(
            numpy64(start[name]),
            [numpy64(state[name]) for state in states],
            lambda n: 0.9,
            interval,
        )
        error = oracle.relative_error(numpy64(average.cpu()), expected)
        assert error <= TOLERANCE, name


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_norm_shows_every_place(dtype):
    """NaN and Inf are found at every end of a block, huge numbers are not."""
    assert module._trial(module._try_largest, GPU, dtype)
    largest = torch.finfo(dtype).max
    for size in (1, 33, 70_001):
        tensors = [
            torch.full((5,), largest, dtype=dtype, device=GPU),
            torch.full((size,), largest, dtype=dtype, device=GPU),
        ]
        assert module._nonfinite_flag(tensors).item() == 0
        assert all_finite(tensors)
        for place in {0, size // 2, size - 1}:
            for bad in BAD:
                tensors[1][place] = bad
                assert module._nonfinite_flag(tensors).item() == 1
                assert not all_finite(tensors)
                tensors[1][place] = largest


@pytest.mark.parametrize('bad', BAD)
@pytest.mark.parametrize('overlap', [True, False])
def test_bad_step(bad, overlap):
    """A step with NaN or Inf changes no bit, and is counted."""
    model = Net().to(GPU)
    averager = averager_of(model, overlap=overlap)
    shake(model)
    averager.update()
    before = bits(averager.named_averages())
    for tensor in (
        model.conv.weight,
        model.head.bias,
        model.norm.running_var,
    ):
        averager.before_step()
        shake(model)
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor[-1] = bad
        averager.update()
        averager.before_step()
        with torch.no_grad():
            tensor.copy_(kept)
    assert averager.num_skipped == 3
    assert averager.num_steps == 1
    assert same(before, bits(averager.named_averages())) == []
    averager.update()
    assert (averager.num_steps, averager.num_skipped) == (2, 3)
    assert same(before, bits(averager.named_averages())) != []


def test_bad_step_under_raise():
    """Under 'raise' the error comes from the bad update itself."""
    model = Net().to(GPU)
    averager = averager_of(model, nonfinite='raise', overlap=True)
    averager.update()
    averager.before_step()
    with torch.no_grad():
        model.head.weight[0, 0] = BAD[0]
    with pytest.raises(NonFiniteError, match=r'head\.weight'):
        averager.update()
    assert averager.num_steps == 1


def test_huge_weights_are_finite():
    """Weights whose squares overflow are averaged."""
    model = nn.Linear(300, 300).to(GPU)
    with torch.no_grad():
        model.weight.fill_(1e30)
    averager = averager_of(model)
    averager.update()
    assert averager.num_updates == 1


@contextlib.contextmanager
def deterministic():
    """Let cuDNN take algorithms that give the same bits each time."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        (
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ) = before


def train(steps=60, width=256, looks=(), **options):
    """Train for real; return bits of weights and averages, and counters."""
    model = Net(width).to(GPU)
    averager = averager_of(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator(GPU).manual_seed(2)
    seen = []
    for step in range(steps):
        x = torch.randn(8, 3, 32, 32, device=GPU, generator=generator)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        averager.before_step()
        optimizer.step()
        averager.update()
        if step in looks:
            with averager.applied(), torch.no_grad():
                model.eval()
                seen.append((f'{step}.out', model(x)))
                model.train()
            seen += [
                (f'{step}.{name}', average.clone())
                for name, average in averager.named_averages()
            ]
    weights = bits(model.state_dict().items())
    averages = bits([*averager.named_averages(), *seen])
    return weights, averages, averager.progress()


@pytest.mark.parametrize(
    'options',
    [{}, dict(interval=3), dict(update_buffers=False)],
    ids=str,
)
def test_overlap_in_a_training(options):
    """A real training gives the same bits with and without overlap."""
    looks = (0, 7, 30)
    with deterministic():
        plain = train(looks=looks, **options)
        again = train(looks=looks, **options)
        beside = train(looks=looks, overlap=True, **options)
    # else the comparison would say nothing
    assert same(plain[0], again[0]) == []
    assert same(plain[0], beside[0]) == []
    assert same(plain[1], beside[1]) == []
    assert plain[2] == beside[2]


def test_overlap_uses_a_stream():
    """Beside the training means a stream of its own; else there is none."""
    averager = averager_of(Net().to(GPU), overlap=True)
    assert SideStream is type(averager._stream)
    averager = averager_of(Net().to(GPU))
    assert averager._stream is None


def test_step_waits_on_the_device(monkeypatch):
    """After ``before_step`` new weights cannot get into a slow update."""
    slow_on_device(monkeypatch, UpdatePlan, 'run')
    model = nn.Linear(512, 512).to(GPU)
    averager = averager_of(model, overlap=True)
    raw = model.weight.detach().clone()
    averager.update()
    averager.before_step()
    with torch.no_grad():
        model.weight.fill_(100)
    average = dict(averager.named_averages())['weight']
    # The average started from these weights: it cannot move.
    assert torch.equal(raw, average)


def test_step_that_does_not_wait_is_seen(monkeypatch):
    """Without ``before_step`` they do: the wait is needed."""
    slow_on_device(monkeypatch, UpdatePlan, 'run')
    model = nn.Linear(512, 512).to(GPU)
    averager = averager_of(model, overlap=True)
    raw = model.weight.detach().clone()
    averager.update()
    with torch.no_grad():
        model.weight.fill_(100)
    average = dict(averager.named_averages())['weight']
    torch.cuda.synchronize()
    assert not torch.equal(raw, average)


@pytest.mark.parametrize('overlap', [True, False])
def test_buffers_change_at_once(monkeypatch, overlap):
    """What a forward pass does to buffers is not in the step before it."""
    slow_on_device(monkeypatch, UpdatePlan, 'run')
    model = nn.BatchNorm1d(64).to(GPU)
    averager = averager_of(model, overlap=overlap)
    averager.update()
    model(torch.randn(8, 64, device=GPU) + 5)
    averages = dict(averager.named_averages())
    assert torch.count_nonzero(averages['running_mean']) == 0
    assert averages['num_batches_tracked'] == 0


def test_on_a_stream_of_the_user():
    """Updates on another stream than the default one are in order, too."""
    model = nn.Linear(512, 512).to(GPU)
    stream = torch.cuda.Stream(GPU)
    stream.wait_stream(torch.cuda.current_stream(GPU))
    for overlap in (True, False):
        with torch.cuda.stream(stream):
            with torch.no_grad():
                model.weight.zero_()
            averager = averager_of(model, decay=0.75, overlap=overlap)
            for value in (4.0, 8.0):
                averager.before_step()
                torch.cuda._sleep(LONG)
                with torch.no_grad():
                    model.weight.fill_(value)
                averager.update()
            average = dict(averager.named_averages())['weight']
            # 0.75 * (0.25 * 4) + 0.25 * 8, exact
            assert torch.equal(torch.full_like(average, 2.75), average)


def pinned(averager):
    averages = dict(averager.named_averages(stored=True)).values()
    return [a.is_pinned() for a in averages if a.numel()]


def test_host_averages():
    """``device='cpu'`` keeps averages in pinned host memory."""
    averager = averager_of(Net().to(GPU), device='cpu')
    assert SideStream is type(averager._stream)
    averager.update()
    averages = dict(averager.named_averages(stored=True))
    assert {'cpu'} == {a.device.type for a in averages.values()}
    assert all(pinned(averager))


@pytest.mark.parametrize('make', [Net, LowNet])
def test_host_averages_have_the_bits_of_the_gpu(make):
    """They are those of averages that stay there, bit for bit."""
    model, generator = make().to(GPU), torch.Generator(GPU).manual_seed(3)
    pair = averager_of(model), averager_of(model, device='cpu')
    for _ in range(100):
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(
                    parameter.shape, generator=generator, device=GPU
                )
                parameter.add_(noise.to(parameter.dtype), alpha=0.1)
        for averager in pair:
            averager.update()
    wanted, found = (bits(a.named_averages()) for a in pair)
    assert same(wanted, found) == []
    assert pair[0].progress() == pair[1].progress()


@pytest.mark.parametrize('overlap', [True, False])
def test_host_averages_wait_for_their_update(monkeypatch, overlap):
    """Whoever reads them waits until the last one is back on the host."""
    slow_on_device(monkeypatch, UpdatePlan, 'run')
    model = nn.Linear(512, 512).to(GPU)
    averager = averager_of(model, device='cpu', overlap=overlap)
    raw = model.weight.detach().cpu()
    for _ in range(3):
        averager.update()
        averager.before_step()
        with torch.no_grad():
            model.weight.fill_(100)
        average = dict(averager.named_averages())['weight']
        assert torch.equal(raw, average)
        with torch.no_grad():
            model.weight.copy_(raw)


def test_strides_that_change():
    """After ``.data`` got other strides the average follows, exactly."""
    model = nn.Linear(80, 80).to(GPU)
    averager = averager_of(model, decay=0.75)
    averager.update()
    old = dict(averager.named_averages())['weight'].clone()
    model.weight.data = model.weight.data.t() * 3
    averager.update()
    expected = 0.75 * old + 0.25 * model.weight.detach()
    found = dict(averager.named_averages())['weight']
    torch.testing.assert_close(found, expected)


def test_host_averages_take_no_memory_of_the_gpu():
    """The GPU holds one tensor more at the peak, and small ones to read."""
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(20))).to(GPU)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(GPU)
    averager = averager_of(model, device='cpu')
    torch.cuda.reset_peak_memory_stats(GPU)
    for _ in range(20):
        averager.update()
    averager.wait()
    assert torch.cuda.memory_allocated(GPU) - before <= MIB // 8
    assert torch.cuda.max_memory_allocated(GPU) - before <= 3 * MIB


def test_bad_step_of_host_averages():
    """A step with NaN is left out of averages on the host, too."""
    model = Net().to(GPU)
    averager = averager_of(model, device='cpu')
    before = bits(averager.named_averages())
    with torch.no_grad():
        model.head.bias[0] = BAD[0]
    averager.update()
    assert averager.wait() is False
    assert averager.num_skipped == 1
    assert same(before, bits(averager.named_averages())) == []


@pytest.mark.parametrize('options', [{}, dict(overlap=True)], ids=str)
def test_memory_does_not_grow(options):
    """Two hundred updates leave as much allocated as ten."""
    model = Net().to(GPU)
    averager = averager_of(model, **options)

    def after(steps):
        for _ in range(steps):
            averager.before_step()
            shake(model)
            averager.update()
        averager.wait()
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(GPU)

    assert after(10) == after(200)


@pytest.mark.parametrize('options', [{}, dict(device='cpu')], ids=str)
def test_swap(options):
    """A swap needs 4 MiB, keeps every storage, and is undone bit for bit."""
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(20))).to(GPU)
    averager = averager_of(model, **options)
    shake(model)
    averager.update()
    averages = bits(averager.named_averages())
    raws = bits(model.state_dict().items())
    places = [tensor.data_ptr() for tensor in model.parameters()]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(GPU)
    torch.cuda.reset_peak_memory_stats(GPU)
    with averager.applied():
        assert same(averages, bits(model.state_dict().items())) == []
        assert places == [tensor.data_ptr() for tensor in model.parameters()]
    peak = torch.cuda.max_memory_allocated(GPU) - before
    assert peak <= 4 * MIB
    assert torch.cuda.memory_allocated(GPU) == before
    assert same(raws, bits(model.state_dict().items())) == []
    assert same(averages, bits(averager.named_averages())) == []


def test_swap_in_half_precision():
    """Where averages are wider, the raw weights come back bit for bit."""
    model = LowNet().to(GPU)
    averager = averager_of(model, overlap=True)
    shake(model)
    averager.update()
    raws = bits(model.state_dict().items())
    with averager.applied():
        assert same(raws, bits(model.state_dict().items())) != []
    assert same(raws, bits(model.state_dict().items())) == []


@pytest.mark.parametrize(
    'options', [{}, dict(overlap=True), dict(device='cpu')], ids=str
)
@pytest.mark.parametrize('applied', [True, False])
def test_checkpoint_is_on_the_host(tmp_path, options, applied):
    """A file holds host tensors only, also one written in an evaluation."""
    model = Net().to(GPU)
    averager = averager_of(model, **options)
    shake(model)
    averager.update()
    wanted = bits(averager.named_averages())
    raws = bits(model.state_dict().items())
    with averager.applied() if applied else contextlib.nullcontext():
        file = dict(state_dict=model.state_dict())
        inside = dict(averager.named_raws()) if applied else {}
        averages = dict(averager.named_averages(stored=True))
        pack(file, averages, inside, averager.num_steps, {})
        torch.save(file, tmp_path / 'a.pth')
    # without map_location tensors come back to where they were
    file = torch.load(tmp_path / 'a.pth', weights_only=True)
    tensors = [
        *file['state_dict'].values(),
        *file['ema_state_dict'].values(),
    ]
    assert {'cpu'} == {tensor.device.type for tensor in tensors}
    assert same(wanted, bits(file['state_dict'].items())) == []
    prefix = 'module.'
    found = {
        name[len(prefix) :]: value
        for name, value in file['ema_state_dict'].items()
        if name.startswith(prefix)
    }
    assert same(raws, bits(found.items())) == []


def test_model_that_moves():
    """A model that goes to the GPU in mid-run takes its averages along."""
    model = Net()
    averager = averager_of(model, decay=0.75)
    averager.update()
    wanted = bits(averager.named_averages())
    model.to(GPU)
    averager.refresh()
    averages = dict(averager.named_averages())
    assert {'cuda'} == {a.device.type for a in averages.values()}
    assert same(wanted, bits(averages.items())) == []
    shake(model)
    averager.update()
    assert averager.num_updates == 2
