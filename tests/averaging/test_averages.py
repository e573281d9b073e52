"""What the averages follow, what loads into them, and what they cost."""

import gc
from inspect import signature

import pytest
import torch
from torch import nn

from mmdet_ema.averaging import CheckpointError, WeightAverager, swap
from tests import oracle
from tests.averaging import models
from tests.averaging.models import (
    Mixed,
    Unsaved,
    averages_of,
    bits_of,
    fill,
    numpy64,
    perturb,
    run_python,
    state_of,
    storage_of,
)


def constant(model, **options):
    return WeightAverager(model, 'constant', decay=0.5, **options)


# Thawing


def test_thaw():
    """A thawed parameter is averaged from its frozen value on."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].requires_grad_(False)
    fill(model, 0.0)
    averager = constant(model)
    with torch.no_grad():
        model[1].weight.fill_(8)
    averager.update()
    model[0].requires_grad_(True)
    averager.follow_changes()
    with torch.no_grad():
        model[0].weight.fill_(4)
    averager.update()
    averages = averages_of(averager)
    assert (2.0, 6.0) == (
        averages['0.weight'].item(),
        averages['1.weight'].item(),
    )
    assert dict(averaged=4, copied=0, shared=0, bytes=16) == averager.counts()
    with averager.applied():
        assert 2.0 == model[0].weight.item()
    assert 4.0 == model[0].weight.item()


def test_frozen_in_mid_run():
    """A parameter that is frozen in mid-run keeps its average."""
    model = nn.Linear(1, 1)
    fill(model, 0.0)
    averager = constant(model)
    fill(model, 8.0)
    averager.update()
    model.requires_grad_(False)
    averager.refresh()
    averager.update()
    assert 6.0 == averages_of(averager)['weight'].item()


def test_frozen_in_mid_run_and_followed():
    """What was frozen in mid-run keeps its average when tensors move."""
    model = Mixed()
    averager = constant(model)
    perturb(model, torch.Generator().manual_seed(0))
    averager.update()
    expected = averages_of(averager)
    model.requires_grad_(False)
    model.float_buffer = model.float_buffer.clone()
    averager.refresh()
    found = averages_of(averager)
    assert all(torch.equal(expected[k], found[k]) for k in expected)


# Tensors that are replaced


class Replaces(nn.Module):
    """Replaces its buffers at every step, as ``x = x * 2`` does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer('x', torch.zeros(2))
        self.register_buffer('n', torch.tensor(0))


def test_replaced_buffer():
    """A buffer that is another object at every step is followed.

    A mean of floats, integers exactly.
    """
    model = Replaces()
    averager = constant(model)
    expected = torch.zeros(2)
    for step in range(1, 6):
        model.x = model.x + step
        model.n = model.n + 2**40
        assert averager.update() is True
        expected = (expected + model.x) / 2
        averages = averages_of(averager)
        assert torch.equal(expected, averages['x'])
        assert step * 2**40 == averages['n'].item()
    with averager.applied():
        assert torch.equal(expected, model.x)
    assert torch.equal(torch.full((2,), 15.0), model.x)


def test_buffer_that_appears_and_goes():
    """A buffer that was None is followed, and one that goes is dropped."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1))
    model.register_buffer('late', None)
    averager = constant(model)
    model.late = torch.ones(2)
    averager.update()
    assert torch.equal(torch.ones(2), averages_of(averager)['late'])
    model.late = None
    averager.update()
    assert {'weight'} == set(averages_of(averager))


def test_replaced_parameter():
    """It is followed, by a swap too; its average goes on."""
    model = nn.Linear(1, 1)
    fill(model, 0.0)
    averager = constant(model)
    fill(model, 8.0)
    averager.update()
    model.weight = nn.Parameter(torch.full((1, 1), 6.0))
    with averager.applied():
        assert 4.0 == model.weight.item()
    assert 6.0 == model.weight.item()
    assert 4.0 == averages_of(averager)['weight'].item()
    averager.update()
    assert 5.0 == averages_of(averager)['weight'].item()


def test_replaced_storage():
    """``parameter.data = ...`` needs no notice."""
    model = Mixed()
    averager = constant(model)
    start, states = state_of(model), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        perturb(model, generator)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        states.append(state_of(model))
        averager.update()
    for name in ('conv.weight', 'first.weight', 'low', 'scale'):
        expected = oracle.average(
            numpy64(start[name]),
            [numpy64(state[name]) for state in states],
            lambda n: 0.5,
        )
        found = numpy64(averages_of(averager)[name])
        # Four float32 updates.
        assert oracle.relative_error(found, expected) <= 1e-6
    bits = bits_of(model)
    with averager.applied():
        pass
    assert bits == bits_of(model)


@pytest.mark.skipif(
    'assign' not in signature(nn.Module.load_state_dict).parameters,
    reason='torch before 2.1 has no load_state_dict(assign=True)',
)
def test_load_state_dict_with_assign():
    """After ``load_state_dict(assign=True)`` the next update follows."""
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    fill(model, 0.0)
    fill(other, 8.0)
    averager = constant(model)
    model.load_state_dict(other.state_dict(), assign=True)
    averager.update()
    assert 4.0 == averages_of(averager)['weight'].item()
    with averager.applied():
        assert 4.0 == model.weight.item()
    assert 8.0 == model.weight.item()


@pytest.mark.parametrize(
    ('dtype', 'expected'),
    [
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize('told', [True, False])
def test_model_that_is_converted(dtype, expected, told):
    """A model that is converted in mid-run keeps its averages."""
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    fill(model, 0.0)
    averager = constant(model)
    fill(model, 8.0)
    averager.update()
    model.to(dtype)
    if told:
        averager.refresh()
        assert 4.0 == averages_of(averager)['0.weight'].item()
    fill(model, 6.0)
    averager.update()
    for name in ('0.weight', '1.running_mean'):
        average = averages_of(averager)[name]
        assert expected == average.dtype
        assert 5.0 == average.item()
    bits = bits_of(model)
    with averager.applied():
        assert dtype == model[0].weight.dtype
        assert 5.0 == model[0].weight.item()
    assert bits == bits_of(model)


def test_untied_by_data():
    """Names whose memory is no longer shared are averaged apart."""
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    second.data = first.data
    model = nn.Module()
    model.first, model.second = first, second
    averager = constant(model)
    second.data = torch.zeros(2)
    averager.refresh()
    with torch.no_grad():
        first.fill_(2)
        second.fill_(4)
    averager.update()
    averages = averages_of(averager)
    assert [1.0, 1.0] == averages['first'].tolist()
    assert [2.0, 2.0] == averages['second'].tolist()


def test_tied_later():
    """Names that come to share memory are averaged once."""
    model = nn.Module()
    model.first, model.second = nn.Linear(1, 1), nn.Linear(1, 1)
    fill(model, 0.0)
    averager = constant(model)
    model.second.weight = model.first.weight
    averager.refresh()
    fill(model, 4.0)
    averager.update()
    averages = averages_of(averager)
    assert 2.0 == averages['first.weight'].item()
    assert 2.0 == averages['second.weight'].item()


def test_unsaved_parameter_is_followed():
    """A parameter that is not saved keeps its average when tensors move."""
    model = Unsaved()
    fill(model, 0.0)
    averager = constant(model)
    fill(model, 8.0)
    averager.update()
    model.x = model.x.clone()
    averager.refresh()
    with averager.applied():
        assert (model.weight == 4).all()
    assert (model.weight == 8).all()


def test_replaced_module():
    """The next update follows it, one of many modules, and it is named."""
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(100)))
    fill(model, 0.0)
    averager = constant(model)
    averager.update()
    model[41] = nn.Linear(1, 1)
    model[43].weight = nn.Parameter(torch.zeros(1, 1))
    fill(model, 8.0)
    averager.update()
    averages = averages_of(averager)
    assert {4.0} == {average.item() for average in averages.values()}
    expected = ['41.weight', '41.bias', '43.weight']
    assert expected == averager.take_replaced()
    assert [] == averager.take_replaced()


@pytest.mark.parametrize('name', ['1', 'more'])
def test_module_that_is_new(name):
    """Of another shape, or one more: it starts from its first weights."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    fill(model, 0.0)
    averager = constant(model)
    model.add_module(name, nn.Linear(1, 3))
    fill(model, 4.0)
    averager.before_step()
    fill(model, 8.0)
    averager.update()
    averages = averages_of(averager)
    assert [6.0] * 3 == averages[f'{name}.bias'].tolist()
    assert 4.0 == averages['0.bias'].item()


def test_renamed_parameter():
    """A parameter keeps its average where a module is put around its own."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    fill(model, 0.0)
    averager = constant(model)
    fill(model, 8.0)
    averager.update()
    model[1] = nn.Sequential(model[1])
    fill(model, 6.0)
    averager.update()
    averages = averages_of(averager)
    assert ['0.weight', '0.bias', '1.0.weight', '1.0.bias'] == list(averages)
    assert {5.0} == {average.item() for average in averages.values()}
    assert [] == averager.take_replaced()


# Loading


def test_load_copies():
    """Loaded averages are copied: the given tensors stay as they are."""
    model = nn.Linear(1, 1)
    averager = constant(model)
    state = dict(
        num_steps=3,
        averages=dict(weight=torch.zeros(1, 1), bias=torch.zeros(1)),
    )
    averager.load_state_dict(state)
    fill(model, 8.0)
    averager.update()
    assert 0.0 == state['averages']['weight'].item()
    assert 4.0 == averages_of(averager)['weight'].item()
    assert (
        dict(num_steps=4, num_updates=4, num_skipped=0, averaged_steps=4)
        == averager.progress()
    )


def test_load_converts():
    """Averages of another dtype are converted on the way in."""
    averager = constant(nn.Linear(1, 1))
    averages = dict(
        weight=torch.full((1, 1), 0.5).double(), bias=torch.ones(1).half()
    )
    averager.load_state_dict(dict(num_steps=1, averages=averages))
    found = averages_of(averager)
    assert (0.5, torch.float32) == (
        found['weight'].item(),
        found['weight'].dtype,
    )


def test_load_of_another_frozen_value():
    """A frozen parameter whose average differs from it gets one."""
    model = nn.Linear(1, 1).requires_grad_(False)
    averager = constant(model)
    averages = dict(weight=model.weight + 1, bias=model.bias.detach().clone())
    averager.load_state_dict(dict(num_steps=1, averages=averages))
    found = averages_of(averager)
    assert torch.equal(averages['weight'].detach(), found['weight'])
    assert 1 == averager.counts()['shared']
    bits = bits_of(model)
    with averager.applied():
        assert torch.equal(averages['weight'].detach(), model.weight.detach())
    assert bits == bits_of(model)


def state_with(model, **changes):
    """Return a state that fits a model, other values than its own."""
    averages = {k: v + 1 for k, v in model.state_dict().items()}
    averages.update(changes)
    averages = {k: v for k, v in averages.items() if v is not None}
    return dict(num_steps=9, num_updates=9, averages=averages)


@pytest.mark.parametrize(
    ('change', 'words', 'strict'),
    [
        (dict(bias=torch.ones(5)), ('bias', '(5,)', '(3,)'), True),
        (dict(bias=torch.ones(5)), ('bias', '(5,)', '(3,)'), False),
        (dict(bias=None), ('1 missing', 'bias'), True),
        (dict(extra=torch.ones(1)), ('1 unknown', 'extra'), True),
        (dict(weight='text'), (), True),
        (lambda state: state.pop('num_steps'), (), True),
        (lambda state: state.pop('averages'), (), True),
        (lambda state: state.update(num_steps='many'), (), True),
        (lambda state: state.update(num_steps=-1), (), True),
    ],
)
def test_load_errors(change, words, strict):
    """What does not fit, or is no state, changes nothing; names are told."""
    model = nn.Linear(2, 3)
    averager = constant(model)
    averager.update()
    before, progress = averages_of(averager), averager.progress()
    state = state_with(model, **({} if callable(change) else change))
    if callable(change):
        change(state)
    with pytest.raises(CheckpointError) as error:
        averager.load_state_dict(state, strict=strict)
    assert [] == [word for word in words if word not in str(error.value)]
    after = averages_of(averager)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert progress == averager.progress()


# Memory


def storages_of(root):
    """Return the storages of all tensors that objects of ours lead to."""
    seen, found, todo = set(), {}, [root]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = storage_of(item)
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, (list, tuple, set)):
            todo += item
        elif type(item).__module__.startswith('mmdet_ema'):
            todo += vars(item).values() if hasattr(item, '__dict__') else ()
    return found


def test_memory():
    """An averager holds one copy of what can change.

    And one of what is small, to read it at once.
    """
    model = Mixed()
    model.large = nn.Parameter(torch.zeros(100, 100))
    averager = WeightAverager(model)
    averager.update()
    tensors = [*model.parameters(), *model.buffers()]
    own = {storage_of(t).data_ptr() for t in tensors}
    found = storages_of(averager)
    extra = sum(size for p, size in found.items() if p not in own)
    copied = averager.counts()['bytes']
    assert copied - 4 * 100 * 100 < 300
    assert copied <= extra <= copied + 400


def test_frozen_parameters_cost_nothing():
    """60 million frozen parameters add no memory, in bytes and in RSS."""
    code = """
import torch
from mmdet_ema.averaging import WeightAverager
from tests.memory import peak
with torch.no_grad():
    model = torch.nn.Sequential(
        torch.nn.Linear(60_000, 1000, bias=False), torch.nn.Linear(9, 9))
    model[0].weight.fill_(0.5)
model[0].requires_grad_(False)
averager = WeightAverager(torch.nn.Linear(3, 3))
averager.update()
with averager.applied():
    pass
averager.distance()
before = peak()
averager = WeightAverager(model)
for _ in range(3):
    averager.update()
with averager.applied():
    dict(averager.named_averages())
averager.refresh()
averager.state_dict()
averager.distance()
print(averager.counts()['bytes'], peak() - before)
"""
    run = run_python(code, OMP_NUM_THREADS='1')
    assert 0 == run.returncode, run.stderr
    size, grown = run.stdout.split()[-2:]
    assert 4 * 90 == int(size)
    # The weights are 229 MiB; the rest is the allocator's.
    assert float(grown) < 20


def test_refresh_frees():
    """Averages of tensors that were replaced are let go."""
    model = Replaces()
    averager = constant(model)
    found = []
    for steps in (1, 20):
        for _ in range(steps):
            model.x = model.x + 1
            averager.update()
        gc.collect()
        found.append(len(storages_of(averager)))
    assert found[0] == found[1]


def test_state_is_plain(tmp_path):
    """It loads with ``weights_only=True``, and tied names stay tied.

    A file is as large as what it holds: tensors have memory of their own.
    """
    averager = constant(Mixed())
    averager.update()
    torch.save(averager.state_dict(), tmp_path / 'a.pth')
    state = torch.load(tmp_path / 'a.pth', weights_only=True)
    first, tied = (state['averages'][f'{x}.weight'] for x in ('first', 'tied'))
    assert first.data_ptr() == tied.data_ptr()
    constant(Mixed()).load_state_dict(state)
    averages = averager.state_dict()['averages']
    for tensor in averages.values():
        size = tensor.numel() * tensor.element_size()
        assert storage_of(tensor).nbytes() == size
    assert averages['tied.weight'] is averages['first.weight']
    for name, live in averager.named_averages():
        assert torch.equal(live, averages[name])


def test_missing_average_starts_again():
    """Without ``strict``: from the present weights; more is passed over."""
    model = nn.Linear(1, 1)
    fill(model, 0.0)
    averager = constant(model)
    fill(model, 8.0)
    averager.update()
    state = averager.state_dict()
    del state['averages']['bias']
    state['averages']['extra'] = torch.ones(1)
    fill(model, 100.0)
    averager.load_state_dict(state, strict=False)
    found = {k: v.item() for k, v in averager.named_averages()}
    assert dict(weight=4.0, bias=100.0) == found


def holder(**buffers):
    return models.holder(torch.zeros(1, 2), **buffers)


def tied_buffers():
    model = holder(x=torch.zeros(3))
    model.register_buffer('y', model.x.detach())
    return model, 'y'


def buffer_of_a_frozen_weight():
    model = holder()
    model.p0.requires_grad_(False)
    model.register_buffer('x', model.p0.data)
    return model, 'x'


@pytest.mark.parametrize(
    'make',
    [
        tied_buffers,
        buffer_of_a_frozen_weight,
        lambda: (holder(x=torch.empty(0, 2)), 'x'),
        lambda: (holder(x=torch.zeros(1).expand(3)), 'x'),
    ],
    ids=['tied', 'frozen', 'empty', 'repeated'],
)
def test_odd_buffers_that_are_replaced(make):
    """They are followed by the update after, as any other."""
    model, name = make()
    averager = constant(model)
    before = getattr(model, name)
    setattr(model, name, torch.full((3,), 8.0))
    averager.update()
    # one of another shape starts from its value
    expected = 4.0 if before.shape == (3,) else 8.0
    assert [expected] * 3 == averages_of(averager)[name].tolist()


def test_buffer_that_grows_in_place():
    """``resize_`` from nothing is followed."""
    model = holder(x=torch.zeros(0))
    averager = constant(model)
    model.x.resize_(3).fill_(1)
    averager.update()
    assert [1, 1, 1] == dict(averager.named_averages())['x'].tolist()


def test_unsaved_buffer_that_is_replaced():
    """It is passed over, also in a model that has nothing else."""
    model = nn.Module()
    model.register_buffer('x', torch.ones(1), persistent=False)
    averager = constant(model)
    for _ in range(3):
        model.x = model.x * 2
        assert averager.update()
    assert {} == dict(averager.named_averages())


def test_thawed_tensors_keep_their_kind():
    """What is copied by name stays so; a mask of -inf makes no bad step."""
    model = nn.Module()
    model.named = nn.Parameter(torch.zeros(2), requires_grad=False)
    mask = torch.tensor([0.0, -float('inf')])
    model.mask = nn.Parameter(mask, requires_grad=False)
    averager = constant(model, copied=['named'])
    model.requires_grad_(True)
    with torch.no_grad():
        model.named.fill_(8)
    assert averager.update()
    assert averager.update()
    assert [8, 8] == dict(averager.named_averages())['named'].tolist()


def test_frozen_weight_that_is_nan():
    """Loading its own value leaves it frozen; no step is bad for it."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.bias.requires_grad_(False).fill_(float('nan'))
    averager = constant(model)
    averager.load_state_dict(averager.state_dict())
    assert averager.update()
    assert 1 == averager.counts()['shared']


def test_weights_that_come_to_share_memory(monkeypatch):
    """By ``.data``: they are one from then on, and swapped once."""
    monkeypatch.setattr(swap, '_SCRATCH', 1)  # one after the other
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    fill(model, 0.0)
    averager = constant(model)
    model[1].weight.data = model[0].weight.data
    fill(model, 8.0)
    averager.update()
    with averager.applied():
        assert 4.0 == model[0].weight.item() == model[1].weight.item()
    assert 8.0 == model[0].weight.item()


def test_large_buffers():
    """They are averaged, copied and left out as small ones are."""
    model = holder(x=torch.zeros(5000), n=torch.zeros(5000, dtype=torch.int64))
    averager = constant(model)
    model.x.fill_(8)
    model.n.fill_(3)
    averager.update()
    averages = averages_of(averager)
    assert (4.0, 3) == (averages['x'][0].item(), averages['n'][-1].item())
    model.x[7] = float('nan')
    with torch.no_grad():
        model.p0.add_(1)
    averager.update()
    found = averages_of(averager)
    assert torch.equal(averages['x'], found['x'])
    assert not torch.equal(averages['p0'], found['p0'])
