"""Notice when a module's tensors were replaced by other objects.

In-place changes and ``parameter.data = ...`` need no notice: an entry holds
the parameter itself. ``module.weight = nn.Parameter(...)``, ``.to(device)``,
``load_state_dict(assign=True)`` and ``self.buffer = self.buffer * 2`` do.
"""

from __future__ import annotations

from typing import Dict, Iterator, Optional, Tuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_Owned = Tuple[Dict[str, Optional[Tensor]], str, Optional[Tensor]]


class Watch:
    """Remembers which tensors a model owns.

    Args:
        model: The model to watch.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._seen = [_identity(tensor) for _, _, tensor in _owned(model)]
        self._buffers = list(_replaceable_buffers(model))

    def buffers_replaced(self) -> bool:
        """Return whether a buffer is another object now; cheap.

        Torch's own normalisation layers change theirs in place, so only the
        buffers of other modules are looked at.
        """
        return any(owner.get(k) is not t for owner, k, t in self._buffers)

    def replaced(self) -> bool:
        """Return whether any tensor is another one, moved or converted."""
        now = [_identity(tensor) for _, _, tensor in _owned(self._model)]
        return now != self._seen


def _identity(tensor: Optional[Tensor]) -> object:
    if tensor is None:
        return None
    return id(tensor), tensor.device, tensor.dtype, tensor.shape


def _owned(model: nn.Module) -> Iterator[_Owned]:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            yield module._parameters, name, parameter  # type: ignore[misc]
        for name, buffer in module._buffers.items():
            yield module._buffers, name, buffer


def _replaceable_buffers(model: nn.Module) -> Iterator[_Owned]:
    for module in model.modules():
        if isinstance(module, _NormBase):
            continue
        for name, buffer in module._buffers.items():
            if name not in module._non_persistent_buffers_set:
                yield module._buffers, name, buffer
