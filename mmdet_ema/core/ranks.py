"""Several processes: the same averages on every rank.

Parameters are equal on all ranks of data-parallel training, and so are their
averages. Buffers are not: every rank has seen other samples. An average is
linear in what it averages, so the mean of the ranks' averages is the average
of their mean, whenever it is taken.
"""

from __future__ import annotations

from typing import Dict, List, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    ready = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if ready else 1


def all_agree(local: bool) -> bool:
    """Return whether every rank says True.

    Args:
        local: What this rank says.
    """
    if world_size() == 1:
        return local
    votes = torch.tensor(int(local), device=_device())
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes.item())


def can_agree_on_device() -> bool:
    """Return whether ranks can agree without the host waiting for it."""
    return world_size() == 1 or dist.get_backend() == 'nccl'


def raise_flag(flag: Tensor) -> Tensor:
    """Set a flag on every rank where it is set on one.

    Args:
        flag: A scalar on the device, 0 or 1.

    Returns:
        The same scalar.
    """
    if world_size() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag


@torch.no_grad()
def reduce_mean(tensors: Sequence[Tensor]) -> None:
    """Replace float tensors by their mean over the ranks, in place."""
    for group in _by_dtype(tensors):
        flat = torch.cat([t.reshape(-1) for t in group]).to(_device())
        dist.all_reduce(flat)
        _scatter(flat / world_size(), group)


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by those of rank 0, in place."""
    for group in _by_dtype(tensors):
        flat = torch.cat([t.reshape(-1) for t in group]).to(_device())
        dist.broadcast(flat, src=0)
        _scatter(flat, group)


def _by_dtype(tensors: Sequence[Tensor]) -> List[List[Tensor]]:
    groups: Dict[object, List[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())


def _scatter(flat: Tensor, group: Sequence[Tensor]) -> None:
    parts = torch.split(flat, [tensor.numel() for tensor in group])
    for tensor, part in zip(group, parts):
        tensor.copy_(part.view(tensor.shape))


def _device() -> torch.device:
    """Return the device that the process group communicates on."""
    nccl = dist.get_backend() == 'nccl'
    return torch.device('cuda' if nccl else 'cpu')
