"""What one optimizer step does to the averages, planned once.

A step reads the weights twice: once to see whether they hold NaN or Inf, once
to average them. The first cannot be left out, nor be done on the way: what is
written into an average cannot be taken out again to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from mmdet_ema.core.copying import CopyPlan
from mmdet_ema.core.finite import FiniteCheck
from mmdet_ema.core.kernels import Rule, UpdatePlan
from mmdet_ema.core.ranks import all_agree, can_agree_on_device, raise_flag
from mmdet_ema.core.selection import Entry, Role


@dataclass(frozen=True)
class Step:
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
        self._copies = CopyPlan(*_columns(copied))
        self._updates = UpdatePlan(*_columns(updated))
        if deferred is None:
            deferred = _on_one_gpu([*averages, *sources])
        self._deferred = deferred

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
        check = self._checks[step.updates]
        flag = self._flag(step, check)
        if flag is None and step.gated and not all_agree(check.passes()):
            return False
        self._copies.copy(flag)
        if step.rule is not None:
            self._updates.update_by(step.rule, step.number)
        elif step.decay is not None:
            self._updates.update(step.decay, flag)
        return True if flag is None else DeviceVerdict(flag)

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


def _on_one_gpu(tensors: Sequence[Tensor]) -> bool:
    devices = {tensor.device for tensor in tensors}
    return len(devices) == 1 and devices.pop().type == 'cuda'
