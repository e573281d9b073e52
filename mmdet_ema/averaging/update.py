"""What one optimizer step does to the averages, planned once.

Whether the parameters hold NaN or Inf has to be known before an average is
written, which cannot be taken back: so a step reads them twice, once to look
and once to average. Parameters are equal on all ranks, and so is
what is found: nobody is asked. A buffer makes no step bad.
"""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from mmdet_ema.averaging.buffers import BufferCopy, BufferUpdate, Row
from mmdet_ema.averaging.copying import CopyPlan
from mmdet_ema.averaging.finite import FiniteCheck
from mmdet_ema.averaging.kernels import Rule, UpdatePlan
from mmdet_ema.averaging.layouts import check_readable
from mmdet_ema.averaging.tensors import Entry, Role


class Step(NamedTuple):
    """An optimizer step, as the averages see it.

    Attributes:
        number: Which step it is, from 1.
        decay: Weight of the old averages; None if it is no update.
        rule: Updates one average, in the place of the decay.
        gated: Whether NaN or Inf in a parameter keeps it out of the averages,
            and in a buffer, that buffer.
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
        self._rows = list(zip(entries, averages, sources))
        if deferred is None:
            deferred = _on_one_gpu([*averages, *sources])
        self._deferred = deferred
        averaged = [r for r in self._rows if r[0].role is Role.AVERAGED]
        copied = [r for r in self._rows if r[0].role is Role.COPIED]
        weights = [row for row in averaged if row[0].gated]
        self._check = FiniteCheck(_parts(weights))
        self._updates = UpdatePlan(*_columns(weights), fused=deferred)
        self._copies = CopyPlan(
            *_columns([row for row in copied if not row[0].has_mean])
        )
        self._averaged_buffers = BufferUpdate(
            [row for row in averaged if not row[0].gated], deferred
        )
        self._copied_buffers = BufferCopy(
            [row for row in copied if row[0].has_mean], deferred
        )

    def take_in(self, step: Step) -> Verdict:
        """Take a step into the averages, unless it holds NaN or Inf.

        Args:
            step: The step.

        Returns:
            Whether it was finite.

        Raises:
            RuntimeError: If an average cannot follow its tensor; nothing is
                changed then.
        """
        try:
            return self._take_in(step)
        except RuntimeError:
            check_readable(*_columns(self._rows), self._names())
            raise

    def _take_in(self, step: Step) -> Verdict:
        self._copies.check()
        self._copied_buffers.check()
        flag = self._flag(step)
        if flag is not None:
            assert step.decay is not None
            self._updates.update(step.decay, flag)
        elif not self._take_in_weights(step):
            return False
        self._copies.copy(flag)
        self._copied_buffers.update(0.0, step.gated, flag)
        if step.rule is not None:
            args = step.rule, step.number, step.gated
            self._averaged_buffers.update_by(*args)
        elif step.decay is not None:
            self._averaged_buffers.update(step.decay, step.gated, flag)
        return True if flag is None else DeviceVerdict(flag)

    def _take_in_weights(self, step: Step) -> bool:
        """Update the averages of parameters; return whether all are finite."""
        if step.updates and step.gated and not self._check.passes():
            return False
        if step.rule is not None:
            self._updates.update_by(step.rule, step.number)
        elif step.decay is not None:
            self._updates.update(step.decay)
        return True

    def _flag(self, step: Step) -> Optional[Tensor]:
        """Return the verdict as a scalar on the device, where that can be."""
        if not (step.gated and self._deferred and self._check):
            return None
        if step.decay is None or not self._updates.can_skip(step.decay):
            return None
        return self._check.flag()

    def _names(self) -> List[str]:
        return [row[0].name for row in self._rows]


def _columns(rows: Sequence[Row]) -> Tuple[List[Tensor], List[Tensor]]:
    return [row[1] for row in rows], [row[2] for row in rows]


def _parts(rows: Sequence[Row]) -> List[Tensor]:
    return [p for entry, _, source in rows for p in entry.parts_of(source)]


def _on_one_gpu(tensors: Sequence[Tensor]) -> bool:
    devices = {tensor.device for tensor in tensors}
    return len(devices) == 1 and devices.pop().type == 'cuda'
