"""Addresses of tensors, for code that knows no tensors."""

from __future__ import annotations

from typing import List, Sequence

import torch
from torch import Tensor

# updates in which every vector is looked at once
_TURNS = 16


class Pointers:
    """Where tensors lie; to be asked before each use whether it is right.

    Args:
        tensors: Tensors in host memory.

    Attributes:
        address: Address of the list of addresses.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._tensors = list(tensors)
        self._seen = self._now()
        self._list = integers(self._seen)
        self.address = self._list.data_ptr()

    def are_right(self) -> bool:
        """Return whether all tensors still lie where they lay."""
        return self._now() == self._seen

    def _now(self) -> List[int]:
        return list(map(Tensor.data_ptr, self._tensors))


class Layouts(Pointers):
    """Where and how dense tensors lie: addresses, sizes and strides.

    Strides of vectors are looked at in turns: there are hundreds, and one
    whose memory is the same but spaced out has hardly been seen.

    Args:
        tensors: Dense tensors in host memory.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__(tensors)
        self._wide = [tensor for tensor in tensors if tensor.dim() > 1]
        rest = [tensor for tensor in tensors if tensor.dim() <= 1]
        self._turns = [rest[i::_TURNS] for i in range(_TURNS)]
        self._turn = 0
        self._sizes, self._strides = self._sizes_now(), self._strides_now()

    def are_right(self) -> bool:
        """Return whether all tensors still lie where and how they lay."""
        self._turn = (self._turn + 1) % _TURNS
        return (
            super().are_right()
            and self._sizes_now() == self._sizes
            and self._strides_now() == self._strides
            and all(map(Tensor.is_contiguous, self._turns[self._turn]))
        )

    def _sizes_now(self) -> List[int]:
        return list(map(Tensor.numel, self._tensors))

    def _strides_now(self) -> List[object]:
        return list(map(Tensor.stride, self._wide))


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is numbers in host memory, and no more.

    Args:
        tensor: Any tensor.
    """
    return (
        tensor.device.type == 'cpu'
        and tensor.layout == torch.strided
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not tensor.is_conj()
        and not tensor.is_neg()
        and tensor.data_ptr() != 0
    )


def integers(values: Sequence[int]) -> Tensor:
    """Return int64 numbers in a row of memory.

    Args:
        values: The numbers.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int64, device='cpu')
