"""Where tensors lie in memory, for code that knows no tensors."""

from __future__ import annotations

from typing import List, Sequence

import torch
from torch import Tensor

# updates in which every vector is looked at once
_TURNS = 16


class Layouts:
    """Where dense tensors lie; to be asked before each use if it is right.

    Strides of vectors are looked at in turns: there are hundreds, and one
    whose memory is the same but spaced out has hardly been seen. So are no
    sizes and strides of averages: nobody else changes them.

    Args:
        averages: Dense tensors in host memory.
        raws: The same for the tensors that belong to somebody else.
    """

    def __init__(self, averages: Sequence[Tensor], raws: Sequence[Tensor]):
        self._tensors, self._raws = [*averages, *raws], list(raws)
        self._wide = [raw for raw in raws if raw.dim() > 1]
        rest = [raw for raw in raws if raw.dim() <= 1]
        self._turns = [rest[i::_TURNS] for i in range(_TURNS)]
        self._turn = 0
        self._addresses = addresses_of(self._tensors)
        self._sizes, self._strides = self._sizes_now(), self._strides_now()

    def are_right(self) -> bool:
        """Return whether all tensors still lie where and how they lay."""
        self._turn = (self._turn + 1) % _TURNS
        return (
            addresses_of(self._tensors) == self._addresses
            and self._sizes_now() == self._sizes
            and self._strides_now() == self._strides
            and all(map(Tensor.is_contiguous, self._turns[self._turn]))
        )

    def _sizes_now(self) -> List[int]:
        return list(map(Tensor.numel, self._raws))

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


def addresses_of(tensors: Sequence[Tensor]) -> List[int]:
    """Return the address of each tensor's first element.

    Args:
        tensors: Strided tensors.
    """
    return list(map(Tensor.data_ptr, tensors))


def integers(values: Sequence[int]) -> Tensor:
    """Return int64 numbers in a row of memory.

    Args:
        values: The numbers.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int64, device='cpu')
