"""NaN and Inf are found wherever they are, and nothing else is."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmdet_ema.averaging.finite import all_finite, first_nonfinite
from mmdet_ema.averaging.tensors import select

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
)
BAD = (float('nan'), float('inf'), float('-inf'))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('bad', BAD)
def test_every_position(dtype, bad):
    """One bad element is found at every place of every tensor."""
    shapes = ((2, 3), (), (0,), (5,))
    tensors = [torch.ones(shape, dtype=dtype) for shape in shapes]
    assert all_finite(tensors)
    for tensor in tensors:
        for place in range(tensor.numel()):
            tensor.view(-1)[place] = bad
            assert not all_finite(tensors)
            tensor.view(-1)[place] = 1


@pytest.mark.parametrize('bad', BAD)
def test_imaginary_part(bad):
    """A bad imaginary part is found."""
    tensor = torch.ones(3, dtype=torch.complex64)
    torch.view_as_real(tensor)[1, 1] = bad
    assert not all_finite([tensor])


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_overflow_of_the_norm(dtype):
    """Finite numbers whose squares overflow are no false alarm."""
    huge = torch.finfo(dtype).max
    tensors = [
        torch.full((100,), huge, dtype=dtype),
        torch.full((3,), -huge, dtype=dtype),
    ]
    assert all_finite(tensors)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('bad', BAD)
def test_bad_among_huge(dtype, bad):
    """A bad number is found among numbers whose squares overflow."""
    tensors = [
        torch.full((100,), torch.finfo(dtype).max, dtype=dtype),
        torch.ones(5, dtype=dtype),
    ]
    tensors[1][4] = bad
    assert not all_finite(tensors)


@pytest.mark.parametrize('bad', BAD)
def test_infinities_do_not_cancel(bad):
    """Infinities of both signs do not hide each other."""
    assert not all_finite([torch.tensor([float('inf'), float('-inf'), bad])])


def test_nothing_to_look_at():
    """No tensors, and tensors without elements, are finite."""
    assert all_finite([])
    assert all_finite([torch.zeros(0), torch.zeros(2, 0).bfloat16()])


def test_groups():
    """Every dtype is looked at, not only the first."""
    tensors = [torch.ones(2, dtype=dtype) for dtype in DTYPES]
    for tensor in tensors:
        tensor[1] = float('nan')
        assert not all_finite(tensors)
        tensor[1] = 1
    assert all_finite(tensors)


def test_not_contiguous():
    """Only the elements of a view count, not what lies between them."""
    whole = torch.ones(4, 4)
    whole[:, 1] = float('nan')
    assert all_finite([whole[:, 2], whole.t()[0], whole[::2, 2:]])
    assert not all_finite([whole[2]])


@settings(deadline=None)
@given(
    places=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 6), st.sampled_from(BAD)),
        max_size=3,
    )
)
def test_as_the_plain_way(places):
    """The answer is that of looking at every element."""
    tensors = [torch.ones(7, dtype=dtype) for dtype in DTYPES[:4]]
    for which, place, bad in places:
        tensors[which][place] = bad
    assert (not places) == all_finite(tensors)


def test_first_nonfinite():
    """The first bad tensor in the model's order is named."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    entries = select(model)
    assert first_nonfinite(entries) is None
    names = list(model.state_dict())
    parameters = dict(model.named_parameters())
    for earlier, later in itertools.combinations(names, 2):
        with torch.no_grad():
            parameters[earlier].view(-1)[-1] = float('nan')
            parameters[later].view(-1)[0] = float('inf')
        assert earlier == first_nonfinite(entries)
        for name in (earlier, later):
            nn.init.ones_(parameters[name])
