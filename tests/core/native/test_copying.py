"""Small tensors copied by one compiled call: exactly, or not at all."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mmdet_ema.core.copying import CopyPlan
from mmdet_ema.core.native import dlpack, loader
from mmdet_ema.core.native.copying import NativeCopy
from tests.core.models import odd_tensors, raw_bytes

pytestmark = pytest.mark.skipif(
    loader.load() is None or dlpack._table() is None,
    reason='not built here, or a torch without DLPack functions for C',
)


def rooms(raws):
    return [torch.zeros_like(raw) for raw in raws]


def copy_natively(native):
    assert native.fits()
    native.copy()


def bits(tensors):
    return [raw_bytes(tensor) for tensor in tensors]


def test_exact():
    """Every bit is copied, and nothing else is written."""
    raws = [
        *(t for t in odd_tensors() if not t.is_complex()),
        *(torch.tensor(2**62 - k) for k in range(40)),
    ]
    memory = torch.full((3, 512), 7.0)
    copies, raws = [*rooms(raws), memory[1]], [*raws, torch.randn(512)]
    copy_natively(NativeCopy(copies, raws))
    assert bits(raws) == bits(copies)
    assert torch.equal(torch.full((2, 512), 7.0), memory[::2])


def test_a_plan_uses_it(monkeypatch):
    """Torch is not asked to copy counters of normalisation layers."""
    raws = [torch.tensor(k) for k in range(9)]
    copies = rooms(raws)
    plan = CopyPlan(copies, raws)
    monkeypatch.setattr(torch, '_foreach_copy_', None)
    plan.copy()
    assert list(range(9)) == [int(c) for c in copies]


@pytest.mark.parametrize(
    ('room', 'raw'),
    [
        (torch.zeros(1025), torch.ones(1025)),
        (torch.zeros(0), torch.ones(0)),
        (torch.zeros(3), torch.ones(3).double()),
        (torch.zeros(3), torch.ones(3, dtype=torch.int32)),
        (torch.zeros(3, 2), torch.ones(2, 3).t()),
        (torch.zeros(3) * 1j, torch.ones(3) * 1j),
        (torch.zeros(3, 2), torch.ones(3, 4)[:, :2]),
        (torch.zeros(3), torch.ones(1).expand(3)),
        (torch.zeros(3), torch._neg_view(torch.ones(3))),
        (torch.zeros(1, 1).expand(1, 1), torch.ones([1] * 6)),
        (torch.zeros(3, device='meta'), torch.ones(3, device='meta')),
    ],
)
def test_what_it_leaves_to_torch(room, raw):
    """Then all pairs are."""
    other = torch.zeros(2)
    assert not NativeCopy([other, room], [torch.ones(2), raw]).fits()
    assert not NativeCopy([], []).fits()


def test_quantized():
    """Scale and zero point are no elements."""
    quantize = torch.quantize_per_tensor
    raw = quantize(torch.ones(3), 0.5, 3, torch.quint8)
    room = quantize(torch.zeros(3), 1.0, 0, torch.quint8)
    assert not NativeCopy([room], [raw]).fits()


def test_replaced_memory_is_followed():
    """``.data = ...`` is read at the next copy, on either side."""
    raws = [nn.Parameter(torch.randn(4)) for _ in range(30)]
    copies = rooms(raws)
    native = NativeCopy(copies, raws)
    copy_natively(native)
    for tensors in (raws, copies):
        for tensor in tensors:
            tensor.data = torch.randn(4)
        copy_natively(native)
        assert bits(raws) == bits(copies)


def test_what_no_longer_fits():
    """Torch copies, or refuses, what became something else."""
    raws = [nn.Parameter(torch.randn(4)) for _ in range(30)]
    copies = rooms(raws)
    plan = CopyPlan(copies, raws)
    raws[7].data = torch.randn(4, dtype=torch.float64)
    plan.copy()
    assert torch.equal(raws[7].float(), copies[7])
    raws[7].data = torch.randn(5)
    with pytest.raises(RuntimeError, match='size'):
        plan.copy()


def test_copies_and_pickles():
    """A copy has tensors of its own, and so has what was pickled."""
    raws = [torch.tensor(k) for k in range(9)]
    native = NativeCopy(rooms(raws), raws)
    for other in (copy.deepcopy(native), pickle.loads(pickle.dumps(native))):
        copy_natively(other)
        assert bits(raws) == bits(other._lists[0])
    assert [0] * 9 == [int(c) for c in native._lists[0]]
