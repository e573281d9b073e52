"""Several processes: the same averages on every rank.

After an optimizer step the parameters of data-parallel training are equal on
all ranks, and so are their averages: no communication is needed. Buffers are
not: every rank has seen other samples. An average is linear in what it
averages, so the mean of the ranks' averages is the average of their mean,
whenever it is taken.
"""

from __future__ import annotations

import zlib
from typing import List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    ready = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if ready else 1


@torch.no_grad()
def add_up(tensors: Sequence[Tensor]) -> None:
    """Make float64 tensors the sum of those of all ranks, in one collective.

    Call it on all ranks, with as many tensors of the same shapes.
    """
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    flat = flat.to(_device(tensors))
    dist.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts):
        tensor.copy_(part.view(tensor.shape))


@torch.no_grad()
def make_equal(means: Sequence[Tensor], copies: Sequence[Tensor]) -> bool:
    """Make tensors the same on every rank, in place; call it on all of them.

    It runs three collectives, however many tensors there are.

    Args:
        means: Float or complex tensors that become the mean over the ranks.
            Elements that are equal everywhere keep their bits.
        copies: Tensors of any dtype that become those of rank 0.

    Returns:
        False if nothing was changed: on some rank the tensors have other
        shapes or dtypes.
    """
    tensors = [*means, *copies]
    if not _alike_on_all_ranks(tensors, len(means)):
        return False
    if not tensors:
        return True
    device = _device(tensors)
    flat = torch.cat([_bytes_of(tensor).to(device) for tensor in tensors])
    dist.broadcast(flat, src=0)
    firsts = _from_bytes(flat, tensors)
    for copy, first in zip(copies, firsts[len(means) :]):
        copy.copy_(first)
    if means:
        _take_means(means, firsts)
    return True


@torch.no_grad()
def first_difference(named: Sequence[Tuple[str, Tensor]]) -> Optional[str]:
    """Name the first tensor that is not the same, bit for bit, on all ranks.

    Call it on all ranks; it reads every tensor once, and exchanges one number
    for each.

    Returns:
        The name; None if all are the same.
    """
    if world_size() == 1 or not named:
        return None
    tensors = [tensor for _, tensor in named]
    if not _alike_on_all_ranks(tensors, 0):
        return f'{named[0][0]}, or another one, of another shape or dtype'
    sums = [_checksum(tensor) for tensor in tensors]
    mine = torch.tensor(sums, device=_device(tensors))
    # ~x turns the order round, without an overflow
    both = torch.cat([mine, ~mine])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    largest, smallest = both[: len(sums)], ~both[len(sums) :]
    differ = (largest != smallest).tolist()
    return next((name for (name, _), x in zip(named, differ) if x), None)


def _checksum(tensor: Tensor) -> int:
    """Return the sum of a tensor's words, which wraps around."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = _as_reals(tensor.detach()).contiguous().reshape(-1)
    return int(flat.view(words[flat.element_size()]).sum(dtype=torch.int64))


def _take_means(means: Sequence[Tensor], firsts: Sequence[Tensor]) -> None:
    """Add to the values of rank 0 the mean of what differs from them.

    This way equal values keep their bits, and large ones do not overflow.
    """
    differences = []
    for mean, first in zip(means, firsts):
        wide = _widen(mean.to(first.device)) - _widen(first)
        # infinities that are equal differ by NaN
        wide[mean.to(first.device) == first] = 0
        differences.append(_as_reals(wide).reshape(-1) / world_size())
    flat = torch.cat(differences)
    dist.all_reduce(flat)
    parts = torch.split(flat, [part.numel() for part in differences])
    for mean, first, part in zip(means, firsts, parts):
        wide = _widen(first)
        _as_reals(wide).add_(part.view(_as_reals(wide).shape))
        mean.copy_(wide)


def _alike_on_all_ranks(tensors: Sequence[Tensor], means: int) -> bool:
    kinds = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]
    code = zlib.crc32(repr((means, kinds)).encode())
    mine = torch.tensor([code], device=_device(tensors))
    codes = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(codes, mine)
    return all(int(code) == int(mine) for code in codes)


def _widen(tensor: Tensor) -> Tensor:
    """Return a copy in double precision."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.to(wide, copy=True)


def _as_reals(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _from_bytes(flat: Tensor, tensors: Sequence[Tensor]) -> List[Tensor]:
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    # each part in memory of its own, as a view needs aligned bytes
    return [
        part.clone().view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(torch.split(flat, sizes), tensors)
    ]


def _device(tensors: Sequence[Tensor]) -> torch.device:
    """Return the device that the process group communicates on."""
    backend = dist.get_backend()
    away = [t.device for t in tensors if t.device.type != 'cpu']
    if away and backend not in ('gloo', 'mpi'):
        return away[0]
    if backend == 'nccl':  # of averages in host memory
        return torch.device('cuda', torch.cuda.current_device())
    return torch.device('cpu')
