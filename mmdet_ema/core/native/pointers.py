"""Addresses of tensors, for code that knows no tensors."""

from __future__ import annotations

from typing import List, Sequence

import torch
from torch import Tensor


class Pointers:
    """Where tensors lie; their memory stays while it is listed here.

    Args:
        tensors: Tensors in host memory.

    Attributes:
        address: Address of the list of addresses.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._tensors = list(tensors)
        self._bind(self._now())

    def follow(self) -> bool:
        """List anew where ``tensor.data`` was replaced.

        Returns:
            Whether it was.
        """
        now = self._now()
        if now == self._seen:
            return False
        self._bind(now)
        return True

    def _now(self) -> List[int]:
        return list(map(Tensor.data_ptr, self._tensors))

    def _bind(self, now: List[int]) -> None:
        self._seen = now
        # another storage may take the place of this one, which must not be
        # given back while its address is in the list
        self._held = [tensor.detach() for tensor in self._tensors]
        self._list = integers(now)
        self.address = self._list.data_ptr()


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
