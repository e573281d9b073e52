"""What is seen of tensors that lie elsewhere, or otherwise, than before."""

import copy
import ctypes
import gc
import threading

import pytest
import torch
from torch import nn

from mmdet_ema.core.layouts import Layouts, check_readable
from mmdet_ema.core.native import dlpack, loader
from mmdet_ema.core.native.dlpack import note
from mmdet_ema.core.native.update import NativeUpdate
from tests.core.models import run_python

pytestmark = pytest.mark.skipif(
    loader.load() is None,
    reason='not built here, or not for this processor',
)
HAS_TABLE = loader.load() is not None and dlpack._table() is not None
needs_table = pytest.mark.skipif(
    not HAS_TABLE, reason='this torch has no DLPack functions for C'
)


@pytest.fixture(params=[pytest.param('c', marks=needs_table), 'python'])
def layouts_of(request):
    """Look at tensors in C, and again in Python."""
    if request.param == 'c':
        return note
    return lambda tensors: Layouts([], tensors)


def shapes():
    """Return a tensor of every number of dimensions from none to five."""
    return [torch.zeros([2] * n) for n in range(6)]


def test_nothing_changed(layouts_of):
    """Other values, and what autograd adds to a tensor, are no change."""
    tensors = [nn.Parameter(tensor) for tensor in shapes()]
    layouts = layouts_of(tensors)
    assert layouts.are_right()
    sum(tensor.sum() for tensor in tensors).backward()
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(tensor.grad)
            tensor.requires_grad_(False)
    assert layouts.are_right()


CHANGES = {
    'memory': lambda data: data.clone(),
    'offset': lambda data: data.new_zeros(1 + data.numel())[1:].view_as(data),
    'strides': lambda data: data.transpose(0, 1),
    'size': lambda data: data[:1],
    'dtype': lambda data: data.double(),
}


@pytest.mark.parametrize('dims', [2, 3, 4, 5])
@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('index', [0, 20, 39])
def test_every_change_is_seen(layouts_of, change, dims, index):
    """Wherever among others the tensor is."""
    tensors = [torch.zeros([2] * dims) for _ in range(40)]
    layouts = layouts_of(tensors)
    tensors[index].data = CHANGES[change](tensors[index].data)
    assert not layouts.are_right()


@needs_table
@pytest.mark.parametrize(
    ('base', 'change'),
    [
        (torch.zeros(40)[:20], lambda data: data[:19]),
        (torch.zeros(40), lambda data: data[::2]),
        (torch.zeros(2, 4), lambda data: data.view(8)),
        (torch.zeros(8), lambda data: data.view(2, 4)),
        (torch.zeros(8), lambda data: data.view(torch.int32)),
        (torch.zeros(8, dtype=torch.half), lambda d: d.view(torch.bfloat16)),
        (torch.zeros(()), lambda data: data.view(1)),
    ],
)
def test_changes_at_the_same_address(base, change):
    """They are seen at once, in vectors too."""
    tensor = base.clone()
    layouts = note([tensor])
    assert layouts.are_right()
    tensor.data = change(tensor.data)
    assert not layouts.are_right()


@needs_table
def test_swapped_tensors():
    """``torch.utils.swap_tensors`` leaves the objects where they are."""
    tensors = [torch.zeros(4), torch.zeros(4)]
    layouts = note(tensors)
    torch.utils.swap_tensors(*tensors)
    assert not layouts.are_right()


@needs_table
def test_freed_memory_is_not_followed():
    """What was only a hint may be gone: the tensor itself is asked."""
    tensors = [torch.zeros(1000) for _ in range(100)]
    layouts = note(tensors)
    others = [torch.ones(1000) for _ in range(100)]
    for tensor, other in zip(tensors, others):
        torch.utils.swap_tensors(tensor, other)
    del others, other
    gc.collect()
    assert not layouts.are_right()


@needs_table
def test_tensors_stay_alive():
    """Whoever is asked later is not freed meanwhile."""
    layouts = note([torch.zeros(1000) for _ in range(100)])
    gc.collect()
    assert layouts.are_right()


@needs_table
def test_from_another_thread():
    """A background thread may ask as well."""
    layouts, found = note(shapes()), []
    thread = threading.Thread(target=lambda: found.append(layouts.are_right()))
    thread.start()
    thread.join()
    assert [True] == found


@needs_table
def test_what_cannot_be_noted():
    """More than five dimensions are for Python."""
    assert note([torch.zeros(2), torch.zeros([1] * 6)]) is None


@needs_table
def test_what_torch_cannot_tell():
    """A tensor that has no memory any more is no match, and no error."""
    tensor = nn.Parameter(torch.zeros(3))
    layouts = note([tensor])
    torch.utils.swap_tensors(tensor, nn.Parameter(torch.zeros(3).to_sparse()))
    assert not layouts.are_right()
    assert not layouts.are_right()


def test_six_dimensions_are_updated():
    """They are averaged all the same."""
    raws, averages = [torch.ones([1, 2] * 3)], [torch.zeros([1, 2] * 3)]
    update = NativeUpdate(averages, raws)
    assert update.fits()
    assert update.update(0.5, gated=True)
    assert torch.equal(torch.full_like(raws[0], 0.5), averages[0])


@needs_table
def test_copied_update_asks_its_own_tensors():
    """A copy does not look at the tensors of the first one."""
    raws, averages = [torch.ones(4)], [torch.zeros(4)]
    update = NativeUpdate(averages, raws)
    other = copy.deepcopy(update)
    raws[0].data = raws[0].data[:3]
    assert not update.fits()
    assert other.fits()


def test_freed_memory():
    """Weights without memory are named, as reading them would crash."""
    raws = [torch.ones(3), torch.ones(2, 2), torch.ones(0)]
    averages = [raw.clone() for raw in raws]
    check_readable(averages, raws)
    getattr(raws[1], 'untyped_storage', raws[1].storage)().resize_(0)
    with pytest.raises(RuntimeError, match=r'\(2, 2\).*freed'):
        check_readable(averages, raws)


@needs_table
@pytest.mark.parametrize('table', ['unknown version', 'no function'])
def test_other_tables_are_not_used(table):
    """Another version of DLPack, or one without views, is passed over."""
    content = bytearray(64)
    content[0] = 2 if table == 'unknown version' else 1
    content[40] = table == 'unknown version'
    held = torch.tensor(list(content), dtype=torch.uint8)
    assert 0 == loader.load().mmdet_ema_understands(held.data_ptr())
    content[0], content[40] = 1, 1
    held = torch.tensor(list(content), dtype=torch.uint8)
    assert 1 == loader.load().mmdet_ema_understands(held.data_ptr())


@pytest.mark.parametrize('found', [None, 4711, object()])
def test_torch_without_a_capsule(monkeypatch, found):
    """At first there was nothing, then a number: both are passed over."""
    name = '__dlpack_c_exchange_api__'
    monkeypatch.setattr(torch.Tensor, name, found, raising=False)
    dlpack._table.cache_clear()
    try:
        assert note([torch.zeros(3)]) is None
        raws, averages = [torch.ones(3)], [torch.zeros(3)]
        update = NativeUpdate(averages, raws)
        assert update.fits()
        assert update.update(0.5, gated=True)
    finally:
        dlpack._table.cache_clear()
    assert torch.equal(torch.full((3,), 0.5), averages[0])


def test_functions_of_python_stay_as_they_are():
    """``ctypes.pythonapi`` is shared with other packages."""
    shared = ctypes.pythonapi.PyCapsule_GetPointer
    before = shared.argtypes, shared.restype
    dlpack._table.cache_clear()
    note([torch.zeros(3)])
    assert before == (shared.argtypes, shared.restype)


TRACED = """
import torch
from torch import nn
from mmdet_ema.core import WeightAverager

model = nn.Linear(3, 2)
model.register_buffer('count', torch.arange(3))
averager = WeightAverager(model, schedule='constant', decay=0.5)
twin = model.weight.detach().double().numpy().copy()

@torch.compile(backend='eager')
def step(x):
    inner = WeightAverager(model, schedule='constant', decay=0.5)
    inner.update()
    averager.update()
    return model(x)

for _ in range(4):
    model.weight.data = model.weight.data + 1
    model.count = model.count + 1
    twin = (twin + model.weight.detach().double().numpy()) / 2
    step(torch.ones(1, 3))
averages = dict(averager.named_averages())
# four roundings of numbers below 6 to half a unit, 2**-22
assert abs(averages['weight'].numpy() - twin).max() < 1e-6
assert averages['count'].tolist() == [4, 5, 6]
"""


@needs_table
def test_traced_by_a_compiler():
    """A compiled step that updates averages, and plans them, is right."""
    done = run_python(TRACED, OMP_NUM_THREADS='1')
    assert 0 == done.returncode, done.stderr[-2000:]
