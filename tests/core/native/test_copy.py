"""Copies of small tensors by the compiled kernels."""

import pytest
import torch

from mmdet_ema.core.native import library
from mmdet_ema.core.native.copy import NativeCopy, can_copy
from tests.core.models import raw_bytes

pytestmark = pytest.mark.skipif(
    library.library() is None,
    reason='not built here, or not for this processor',
)


def test_bits():
    """All bits of every dtype are copied."""
    sources = [
        torch.tensor(2**62),
        torch.tensor([True, False, True]),
        torch.tensor([float('nan'), -0.0], dtype=torch.float16),
        torch.arange(2**13),
        torch.tensor([1 + 2j]),
    ]
    targets = [torch.zeros_like(source) for source in sources]
    copy = NativeCopy(targets, sources)
    for _ in range(2):
        assert copy.fits()
        copy.copy()
        assert [*map(raw_bytes, sources)] == [*map(raw_bytes, targets)]
        sources[0].add_(1)


def test_replaced_memory_is_followed():
    """A source whose ``.data`` was replaced is read where it lies now."""
    source, target = torch.tensor(1), torch.tensor(0)
    copy = NativeCopy([target], [source])
    source.data = torch.tensor(7)
    assert copy.fits()
    copy.copy()
    assert 7 == target.item()
    for other in (torch.tensor([1, 2]), torch.tensor(1.0), torch.zeros(0)):
        source.data = other
        assert not copy.fits()


def test_what_it_takes():
    """Small scalars and vectors in host memory that lie alike."""
    assert can_copy(torch.zeros(3), torch.ones(3))
    assert not can_copy(torch.zeros(3, 1), torch.ones(3, 1))
    assert not can_copy(torch.zeros(2**15), torch.ones(2**15))
    assert not can_copy(torch.zeros(6)[::2], torch.ones(6)[::2])
    assert not can_copy(torch.zeros(0), torch.zeros(0))
    assert not can_copy(torch.zeros(3), torch.ones(3).double())
    whole = torch.tensor([1 + 2j])
    assert not can_copy(whole.clone(), whole.conj())
    assert not can_copy(torch.zeros(3), torch.ones(3, device='meta'))
