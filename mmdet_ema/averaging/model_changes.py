"""Notice when a module's tensors were replaced by other objects.

In-place changes and ``parameter.data = ...`` need no notice: an entry holds
the parameter itself. ``module.weight = nn.Parameter(...)``, ``.to(device)``,
``load_state_dict(assign=True)`` and ``self.buffer = self.buffer * 2`` do.
"""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any, Dict, Iterator, List, Optional, Tuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_NUM_PROBES = 8
_END = object()
_VALUES: Any = dict.values
_Owned = Tuple[Dict[str, Optional[Tensor]], str, Optional[Tensor]]


class Watch:
    """Remembers which tensors a model owns.

    Args:
        model: The model to watch.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._seen = _labels(model)
        self._buffers = list(_replaceable_buffers(model))
        self._tensors = [t for _, _, t in self._buffers if t is not None]
        self._shapes = [tensor.shape for tensor in self._tensors]
        self._probes = _probes(model)
        # modules without any are left out: that halves the cost of a look
        self._owners: List[Dict[str, Any]] = [
            owner
            for module in model.modules()
            for owner in (module._modules, module._parameters)
            if owner and isinstance(owner, dict)
        ]
        self._members = list(self._list_members())

    def is_rebuilt(self) -> bool:
        """Return whether a module or parameter is another object now.

        Also where one was added beside others, or taken away. Cheap enough
        for each step.
        """
        return not all(map(is_, self._list_members(), self._members))

    def hints(self) -> bool:
        """Return whether something seems to be replaced; cheaper still.

        Looks at the buffers of modules other than torch's normalisation
        layers, which change theirs in place and keep their shapes, and at
        some of the parameters: whether the model went to another device or
        dtype.
        """
        if self._is_converted():
            return True
        if any(owner.get(k) is not t for owner, k, t in self._buffers):
            return True
        return self._resized()

    def replaced_buffers(self) -> List[Tuple[Tensor, Tensor]]:
        """Return the buffers that another tensor has taken the place of.

        Returns:
            Pairs of the old and the new tensor; empty if more than that
            happened, or nothing did.
        """
        if self._is_converted() or self._resized():
            return []
        changed = [(t, o.get(k)) for o, k, t in self._buffers]
        changed = [(old, new) for old, new in changed if old is not new]
        if any(old is None or new is None for old, new in changed):
            return []
        return changed  # type: ignore[return-value]

    def _list_members(self) -> Iterator[Any]:
        """Return modules and parameters, with an end that is neither."""
        # no loop of Python's: there are hundreds of each
        members = chain.from_iterable(map(_VALUES, self._owners))
        return chain(members, (_END,))

    def _resized(self) -> bool:
        return [t.shape for t in self._tensors] != self._shapes

    def _is_converted(self) -> bool:
        return any(
            owner.get(name) is not tensor or _kind(tensor) != kind
            for owner, name, tensor, kind in self._probes
        )

    def replaced(self) -> bool:
        """Return whether any tensor is another one, moved or renamed."""
        return _labels(self._model) != self._seen


def _labels(model: nn.Module) -> List[Tuple[object, ...]]:
    """Return what every tensor is, and where the model has it."""
    return [
        (path, name, _identity(tensor))
        for path, module in model.named_modules()
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
    ]


def _identity(tensor: Optional[Tensor]) -> object:
    if tensor is None:
        return None
    return id(tensor), _kind(tensor), tensor.shape, tensor.data_ptr()


def _kind(tensor: Optional[Tensor]) -> object:
    return None if tensor is None else (tensor.device, tensor.dtype)


def _owned(model: nn.Module) -> Iterator[_Owned]:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            yield module._parameters, name, parameter  # type: ignore[misc]
        for name, buffer in module._buffers.items():
            yield module._buffers, name, buffer


def _probes(model: nn.Module) -> List[Tuple[Any, ...]]:
    """Return some parameters, spread over the model."""
    owned = [x for x in _owned(model) if isinstance(x[2], nn.Parameter)]
    chosen = owned[:: max(len(owned) // _NUM_PROBES, 1)]
    return [(*item, _kind(item[2])) for item in chosen]


def _replaceable_buffers(model: nn.Module) -> Iterator[_Owned]:
    for module in model.modules():
        if isinstance(module, _NormBase):
            continue
        for name, buffer in module._buffers.items():
            if name not in module._non_persistent_buffers_set:
                yield module._buffers, name, buffer
