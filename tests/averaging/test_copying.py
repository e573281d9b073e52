"""Exact copies of many tensors, also under a flag on the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_ema.averaging import capabilities
from mmdet_ema.averaging.copying import (
    CopyPlan,
    copy_all,
    group_pairs,
    placement,
)
from tests.averaging.models import odd_tensors, raw_bytes

NAN, INF = float('nan'), float('inf')


def sources():
    """Return tensors of many dtypes and layouts, with odd values."""
    return [
        *odd_tensors(),
        torch.zeros(0),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.randn(2, 3, 4, 5)[:, 1],
    ]


def rooms(raws):
    """Return targets, in the layout of the raw tensors or contiguous."""
    return [
        torch.zeros_like(raw)
        if k % 2
        else torch.zeros(raw.shape, dtype=raw.dtype)
        for k, raw in enumerate(raws)
    ]


def bits(tensors):
    return [raw_bytes(tensor) for tensor in tensors]


FLAGS = [None, torch.zeros(())]


@pytest.mark.parametrize('flag', FLAGS)
def test_exact(flag):
    """Every bit is copied: of NaN, -0.0, integers; in every layout."""
    raws = sources()
    copies = rooms(raws)
    CopyPlan(copies, raws).copy(flag)
    assert bits(raws) == bits(copies)


def test_flag_that_is_set():
    """With a flag of 1, no bit of a copy changes, and none of a source."""
    raws = sources()
    copies = [torch.zeros_like(raw) for raw in raws]
    copies[3].copy_(torch.tensor([-0.0, NAN, INF, 7.0]))
    before = bits(copies), bits(raws)
    strides = [copy.stride() for copy in copies]
    CopyPlan(copies, raws).copy(torch.ones(()))
    assert before == (bits(copies), bits(raws))
    assert strides == [copy.stride() for copy in copies]


@pytest.mark.parametrize('flag', [*FLAGS, torch.ones(())])
def test_nothing_to_copy(flag):
    """Without tensors, or without elements, nothing happens."""
    CopyPlan([], []).copy(flag)
    CopyPlan([torch.zeros(0)], [torch.zeros(0)]).copy(flag)


@pytest.mark.parametrize('flag', FLAGS)
def test_data_that_is_replaced(flag):
    """A plan copies what ``.data`` is now."""
    raw = torch.nn.Parameter(torch.arange(9.0).view(3, 3))
    copy = torch.zeros(3, 3)
    plan = CopyPlan([copy], [raw])
    for data in (raw.data.t(), raw.data.neg(), raw.data[:1].expand(3, 3)):
        raw.data = data
        with torch.no_grad():
            plan.copy(flag)
        assert torch.equal(raw.detach(), copy)


@pytest.mark.parametrize('flag', FLAGS)
def test_data_of_another_size(flag):
    """A source that does not fit any more is an error."""
    raws = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    copies = [torch.zeros(4), torch.zeros(4)]
    plan = CopyPlan(copies, raws)
    raws[1].data = torch.ones(3)
    with torch.no_grad(), pytest.raises(RuntimeError):
        plan.copy(flag)


@pytest.mark.parametrize('there', [True, False])
def test_copy_all_without_the_kernel(monkeypatch, there):
    """The calls for one tensor give the bits of the call for many."""
    if there and not capabilities.HAS_FOREACH_COPY:
        pytest.skip('torch before 2.2 has no _foreach_copy_')
    monkeypatch.setattr(capabilities, 'HAS_FOREACH_COPY', there)
    raws = sources()
    for wait in (True, False):
        copies = rooms(raws)
        copy_all(copies, raws, wait)
        assert bits(raws) == bits(copies)


def test_groups_keep_order_and_leave_out_what_is_empty():
    """Pairs of one key stay together, in order; empty ones go."""
    one, two, low = torch.ones(1), torch.ones(2), torch.ones(1).bfloat16()
    pairs = [(one, two), (low, one), (two, one), (torch.zeros(0), one)]
    groups = list(group_pairs(pairs, placement).values())
    found = [[tuple(map(id, pair)) for pair in zip(*g)] for g in groups]
    wanted = [(id(one), id(two)), (id(two), id(one))], [(id(low), id(one))]
    assert list(wanted) == found


class CountCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(
    not capabilities.HAS_FOREACH_COPY,
    reason='torch before 2.2 has no _foreach_copy_',
)
def test_one_call_a_dtype():
    """Three hundred tensors of two dtypes are copied by two calls."""
    raws = [torch.ones(2) for _ in range(300)]
    raws += [torch.ones(2, dtype=torch.int64) for _ in range(300)]
    plan = CopyPlan([torch.zeros_like(raw) for raw in raws], raws)
    with CountCalls() as count:
        plan.copy()
    assert 2 == count.calls
