"""What one optimizer step does to the averages, planned once.

Whether the weights hold NaN or Inf has to be known before an average is
written that cannot be taken back. So a step reads the weights twice, once to
look and once to average; where compiled kernels can take back what they wrote,
to the last bit, they do both at once.
"""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from mmdet_ema.core.copying import CopyPlan
from mmdet_ema.core.finite import FiniteCheck
from mmdet_ema.core.guarded import GuardedUpdate
from mmdet_ema.core.kernels import Rule, UpdatePlan
from mmdet_ema.core.native.update import can_update
from mmdet_ema.core.ranks import (
    all_agree,
    can_agree_on_device,
    raise_flag,
    world_size,
)
from mmdet_ema.core.selection import Entry, Role


class Step(NamedTuple):
    """An optimizer step, as the averages see it.

    Attributes:
        number: Which step it is, from 1.
        decay: Weight of the old averages; None if it is no update.
        rule: Updates one average, in the place of the decay.
        gated: Whether NaN or Inf keeps it out of the averages.
    """

    number: int
    decay: Optional[float] = None
    rule: Optional[Rule] = None
    gated: bool = True

    @property
    def updates(self) -> bool:
        """Whether averages are updated, not only buffers copied."""
        return self.decay is not None or self.rule is not None


class DeviceVerdict:
    """Whether a step was finite, on its way from a device to the host.

    Args:
        flag: A scalar on the device: 1 if it was not.
    """

    def __init__(self, flag: Tensor):
        self._event: Optional[torch.cuda.Event] = None
        self._flag = flag
        if flag.is_cuda:
            self._flag = torch.empty((), dtype=flag.dtype, pin_memory=True)
            self._flag.copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(flag.device))

    def __bool__(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return not bool(self._flag)


Verdict = Union[bool, DeviceVerdict]


class StepPlan:
    """Entries, their averages and where their values are read from.

    Args:
        entries: The entries that have an average.
        averages: Their averages, in the same order.
        sources: Where their values are read from: the raw tensors, or what
            was copied from them before.
        deferred: Whether the verdict on a step may stay on the device until
            the host asks for it; None for where that is faster.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        averages: Sequence[Tensor],
        sources: Sequence[Tensor],
        deferred: Optional[bool] = None,
    ):
        rows = list(zip(entries, averages, sources))
        copied = [row for row in rows if row[0].role is Role.COPIED]
        updated = [row for row in rows if row[0].role is Role.AVERAGED]
        self._checks = _checks(rows)
        self._live_checks = _checks([(e, a, e.raw) for e, a, _ in rows])
        if deferred is None:
            deferred = _on_one_gpu([*averages, *sources])
        self._deferred = deferred
        guarded = [] if deferred else list(filter(_can_guard, updated))
        kept = {id(row[0]) for row in guarded}
        self._guarded = GuardedUpdate(*_columns(guarded))
        self._rest_check = FiniteCheck(
            _gated([row for row in rows if id(row[0]) not in kept])
        )
        self._copies = CopyPlan(*_columns(copied))
        self._updates = UpdatePlan(
            *_columns([row for row in updated if id(row[0]) not in kept])
        )

    def is_finite(self, step: Step) -> bool:
        """Look at the raw tensors themselves; wait for all ranks.

        Args:
            step: The step.
        """
        return all_agree(self._live_checks[step.updates].passes())

    def take_in(self, step: Step) -> Verdict:
        """Take a step into the averages, unless it holds NaN or Inf.

        Args:
            step: The step.

        Returns:
            Whether it was finite.
        """
        self._copies.check()
        flag = self._flag(step, self._checks[step.updates])
        if flag is None and not self._take_in_guarded(step):
            return False
        self._copies.copy(flag)
        if step.rule is not None:
            self._updates.update_by(step.rule, step.number)
        elif step.decay is not None:
            self._updates.update(step.decay, flag)
        return True if flag is None else DeviceVerdict(flag)

    def _take_in_guarded(self, step: Step) -> bool:
        """Update the averages that can be taken back; return the verdict.

        It is one for all tensors, and for all ranks.
        """
        if step.decay is not None and (not step.gated or world_size() == 1):
            if step.gated and not self._rest_check.passes():
                return False
            return self._guarded.update(step.decay, step.gated)
        check = self._checks[step.updates]
        if step.gated and not all_agree(check.passes()):
            return False
        if step.rule is not None:
            self._guarded.update_by(step.rule, step.number)
        elif step.decay is not None:
            self._guarded.update(step.decay, gated=False)
        return True

    def _flag(self, step: Step, check: FiniteCheck) -> Optional[Tensor]:
        """Return the verdict as a scalar on the device, where that can be."""
        if not (step.gated and self._deferred and check):
            return None
        if step.rule is not None or not can_agree_on_device():
            return None
        if step.decay is not None and not self._updates.can_skip(step.decay):
            return None
        return raise_flag(check.flag())


_Row = Tuple[Entry, Tensor, Tensor]


def _checks(rows: Sequence[_Row]) -> List[FiniteCheck]:
    """Return the check of a step that only copies, and of an update."""
    copied = [row for row in rows if row[0].role is Role.COPIED]
    return [FiniteCheck(_gated(chosen)) for chosen in (copied, rows)]


def _columns(rows: Sequence[_Row]) -> Tuple[List[Tensor], List[Tensor]]:
    return [row[1] for row in rows], [row[2] for row in rows]


def _gated(rows: Sequence[_Row]) -> List[Tensor]:
    return [p for e, _, source in rows if e.gated for p in e.parts_of(source)]


def _can_guard(row: _Row) -> bool:
    """Return whether a row's raw tensor is what is looked at, no more."""
    entry, average, source = row
    whole = entry.labels[0].view is None
    return whole and entry.gated and can_update(average, source)


def _on_one_gpu(tensors: Sequence[Tensor]) -> bool:
    devices = {tensor.device for tensor in tensors}
    return len(devices) == 1 and devices.pop().type == 'cuda'
