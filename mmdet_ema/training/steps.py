"""Notice the iterations that changed the weights, whoever changed them.

Asked in this order, as far as needed:

1. torch tells of every ``step()`` of its optimizers (2.0 and newer).
2. A tensor counts how often it was written to; not where somebody wrote
   through ``.data``, as many optimizers do.
3. A fingerprint of the weights tells for certain. It takes one reading of
   them, so it is taken where nothing else says that there was a step, and in
   the first iterations of an optimizer, to see whether the others are right.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict, defaultdict
from operator import attrgetter
from typing import Any, Callable, DefaultDict, List, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from mmdet_ema.averaging.shards import is_sharded
from mmdet_ema.averaging.update import all_finite

TELLS_OF_STEPS = hasattr(torch_optimizer, 'register_optimizer_step_post_hook')
"""Whether torch tells when an optimizer steps."""
# iterations in which the cheap signs are compared with the fingerprint
_TRIAL = 10
# elements; smaller tensors are compared as they are, larger ones by their sum
_SMALL = 4096
_VERSION = attrgetter('_version')

# A run that stops with an error does not detach: what it leaves behind must
# not keep its model alive. torch's hooks stay until somebody detaches, as they
# must not be removed by a garbage collection in the middle of a step.
_LISTENERS: weakref.WeakSet[WeightChanges] = weakref.WeakSet()
_HANDLES: List[Any] = []


class WeightChanges:
    """Knows whether an iteration changed the weights.

    Micro-batches of gradient accumulation do not, nor do steps that a
    gradient scaler skipped: it calls a fused optimizer all the same, with
    ``found_inf`` set.

    Args:
        parameters: Returns the parameters whose changes count; the same list
            as long as they are the same.
        before_step: Called just before a step that torch tells of.
        accumulation: Iterations to one step, as far as is known.
    """

    def __init__(
        self,
        parameters: Callable[[], Sequence[nn.Parameter]],
        before_step: Callable[[], None],
        accumulation: int = 1,
    ):
        # whether torch told before, and of, a step of this iteration
        self.heard = self.told = False
        self.idle = 0  # iterations in a row that changed nothing, before it
        self._list_parameters, self._before_step = parameters, before_step
        self._accumulation = accumulation
        self._parameters: Sequence[nn.Parameter] = ()
        self._optimizers: Sequence[Any] = ()
        self._versions = 0
        self._fingerprint: Optional[List[Tensor]] = None
        self._trial: float = _TRIAL
        self._skipped, self._taken = False, True
        self._progress: Optional[int] = None
        if not TELLS_OF_STEPS:
            return
        _LISTENERS.add(self)
        if not _HANDLES:
            _HANDLES[:] = (
                torch_optimizer.register_optimizer_step_pre_hook(_before_step),
                torch_optimizer.register_optimizer_step_post_hook(_after_step),
            )

    def detach(self) -> None:
        """Stop listening to optimizers."""
        _LISTENERS.discard(self)
        if not _LISTENERS:
            while _HANDLES:
                _HANDLES.pop().remove()

    def begin(self, optimizers: Sequence[Any]) -> None:
        """Begin an iteration: changes up to now do not count in it."""
        self.idle = 0 if self._taken else self.idle + 1
        if self._taken:
            self._fingerprint = None
        self.heard = self.told = self._skipped = self._taken = False
        if [*map(id, optimizers)] != [*map(id, self._optimizers)]:
            self._optimizers = list(optimizers)
            for optimizer in optimizers:
                _complete(optimizer)
            self._trial = max(self._trial, _TRIAL)
        parameters = self._list_parameters()
        versions = sum(map(_VERSION, parameters))
        if parameters is not self._parameters or versions != self._versions:
            self._fingerprint = None
        self._parameters, self._versions = parameters, versions
        if self._trial > 0:
            self._trial -= 1
            # torch.compile of some versions takes torch's hooks away
            self._progress = _progress(optimizers)
            if self._fingerprint is None:
                self._fingerprint = _fingerprint(parameters)

    def take(self) -> bool:
        """Return whether the weights changed; True once an iteration."""
        if self._taken or not self._parameters:
            return False
        self._taken = self.told or (
            # of sharded weights ranks may see different things
            not is_sharded(self._parameters[0]) and self._have_changed()
        )
        return self._taken

    def were_written(self) -> bool:
        """Return whether anything wrote to the weights in this iteration."""
        return bool(sum(map(_VERSION, self._parameters)) != self._versions)

    def _have_changed(self) -> bool:
        written = self.were_written() and not self._skipped
        self._versions = sum(map(_VERSION, self._parameters))
        if written and self._fingerprint is None:
            return True
        if not written and self.idle + 1 < self._accumulation:
            return False
        before = self._fingerprint
        self._fingerprint = _fingerprint(self._parameters)
        if before is None:
            return False  # the next iteration can be compared with this one
        changed = not _equal(before, self._fingerprint)
        if written and not changed:
            # a step with a learning rate of 0, as in a warm-up, moves no
            # weight, nor does any step once the weights are NaN
            progress, self._progress = self._progress, None
            if progress not in (None, _progress(self._optimizers)):
                return True
            if not all_finite(self._fingerprint):
                return True
        if changed is not written:
            # here the cheap signs mislead: never go by them alone again
            self._trial = math.inf
        return changed

    def _on_step(self, optimizer: Any) -> None:
        if not any(optimizer is known for known in self._optimizers):
            ours = set(map(id, self._list_parameters()))
            groups = optimizer.param_groups
            if ours.isdisjoint(id(p) for g in groups for p in g['params']):
                return
        if getattr(optimizer, 'found_inf', None):
            self._skipped = True
        else:
            self.told = True


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    for changes in list(_LISTENERS):
        changes._before_step()
        changes.heard = True


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    for changes in list(_LISTENERS):
        changes._on_step(optimizer)


def _complete(optimizer: Any) -> None:
    """Give one that skips torch's constructor what its step reads.

    ``zero_grad()`` lets torch tell of its steps, which then fail without.
    """
    if TELLS_OF_STEPS and isinstance(optimizer, torch.optim.Optimizer):
        for kind in ('pre', 'post'):
            name = f'_optimizer_step_{kind}_hooks'
            if not hasattr(optimizer, name):
                setattr(optimizer, name, OrderedDict())


def _progress(optimizers: Sequence[Any]) -> int:
    """Return a number that moves with the state of optimizers.

    Momentum and counters move in a step that changes no weight, too.
    """
    return sum(
        1 + int(getattr(value, '_version', value))
        for optimizer in optimizers
        for state in getattr(optimizer, 'state', {}).values()
        for value in (state.values() if isinstance(state, dict) else ())
        if isinstance(value, (int, Tensor))
    )


def _fingerprint(parameters: Sequence[nn.Parameter]) -> List[Tensor]:
    """Return numbers that keep their bits as long as the parameters do."""
    small: DefaultDict[Any, List[Tensor]] = defaultdict(list)
    sums: DefaultDict[Any, List[Tensor]] = defaultdict(list)
    for parameter in parameters:
        tensor: Tensor = parameter.detach()
        if hasattr(tensor, 'to_local'):
            tensor = tensor.to_local()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        key = tensor.device, tensor.dtype
        if tensor.numel() <= _SMALL:
            small[key].append(tensor.reshape(-1))
        else:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            sums[key].append(tensor.sum(dtype=wide))
    return [*map(torch.cat, small.values()), *map(torch.stack, sums.values())]


def _equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Return whether two fingerprints have the same bits, also of NaN."""
    return len(left) == len(right) and all(
        (a.dtype, a.device) == (b.dtype, b.device)
        and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(left, right)
    )
