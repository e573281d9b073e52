"""Whether tensors are free of NaN and Inf."""

from __future__ import annotations

import cmath
from typing import Dict, Iterable, List, Optional, Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from mmdet_ema.averaging.capabilities import norm_order
from mmdet_ema.averaging.tensors import Entry, is_finite

# elements; larger ones gain nothing from being put together
_SMALL = 2**14


class FiniteCheck:
    """Looks for NaN and Inf in tensors, grouped once.

    In host memory sums decide, as NaN and Inf survive them; a call costs more
    than the elements of a small tensor, so small ones are put together first.
    On a GPU norms do, as there are multi-tensor norms.

    Args:
        tensors: Floating point or complex tensors of any shape and device;
            their present values are looked at each time.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._tensors = [tensor for tensor in tensors if tensor.numel()]
        host = [t for t in self._tensors if t.device.type == 'cpu']
        self._large = [t for t in host if t.numel() > _SMALL]
        self._small = _by_kind(t for t in host if t.numel() <= _SMALL)
        away = [t for t in self._tensors if t.device.type != 'cpu']
        self._away = _by_kind(away)

    def __bool__(self) -> bool:
        """Return whether there is anything to look at."""
        return bool(self._tensors)

    def passes(self) -> bool:
        """Return whether all elements are finite.

        The sum of finite but huge values may overflow too: only then is every
        element looked at. On a GPU the answer costs one synchronisation.
        """
        verdicts = [_finite_each(group, 2.0).all() for group in self._away]
        if all(map(bool, verdicts)) and all(map(_sums_up, self._on_host())):
            return True
        return all(bool(torch.isfinite(t).all()) for t in self._tensors)

    def flag(self) -> Tensor:
        """Return, on the device, whether any element is NaN or Inf.

        The host does not wait for the answer. All tensors have to be on one
        device.

        Returns:
            A float32 scalar: 1 if there is NaN or Inf, else 0.
        """
        verdicts = [finite_each(g).all() for g in _by_kind(self._tensors)]
        return (~torch.stack(verdicts).all()).to(torch.float32)

    def _on_host(self) -> Iterable[Tensor]:
        for group in self._small:
            yield _flatten_dense_tensors(group)  # type: ignore[no-untyped-call]
        yield from self._large


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether no element of any tensor is NaN or Inf.

    Args:
        tensors: Floating point or complex tensors of any shape and device.
    """
    return FiniteCheck(tensors).passes()


def first_nonfinite(entries: Iterable[Entry]) -> Optional[str]:
    """Return the name of the first tensor that holds NaN or Inf.

    Args:
        entries: Entries to look through, in order.

    Returns:
        The name, or None if all are finite.
    """
    return next((x.name for x in entries if not is_finite(x)), None)


def _by_kind(tensors: Iterable[Tensor]) -> List[List[Tensor]]:
    groups: Dict[object, List[Tensor]] = {}
    for tensor in tensors:
        key = (tensor.device, tensor.dtype)
        groups.setdefault(key, []).append(tensor)
    return list(groups.values())


def _sums_up(tensor: Tensor) -> bool:
    """Return whether the sum is finite; in a dtype that holds it."""
    if tensor.dtype in (torch.float32, torch.float64):
        return cmath.isfinite(tensor.sum().item())
    wide = torch.promote_types(tensor.dtype, torch.float32)
    narrow = tensor.dtype.is_floating_point and tensor.element_size() == 1
    tensor = tensor.to(wide) if narrow else tensor
    return cmath.isfinite(tensor.sum(dtype=wide).item())


def finite_each(tensors: List[Tensor]) -> Tensor:
    """Return, on the device, whether each tensor is free of NaN and Inf.

    Args:
        tensors: Tensors of one device and dtype, none of them empty.
    """
    first = tensors[0]
    return _finite_each(tensors, norm_order(first.device, first.dtype))


def _finite_each(tensors: List[Tensor], order: float) -> Tensor:
    norms = list(torch._foreach_norm(tensors, order))
    return torch.isfinite(torch.stack(norms))
