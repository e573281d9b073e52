"""How steps get into the averages: at once, or beside the training."""

from __future__ import annotations

import functools
from typing import Optional, Sequence

import torch
from torch import Tensor

from mmdet_ema.averaging.overlap import Inline, Snapshot, background_for
from mmdet_ema.averaging.tensors import Entry
from mmdet_ema.averaging.update import Step, StepPlan, Verdict


class Intake:
    """Takes steps into averages and says, when asked, how they went.

    Args:
        overlap: Whether steps are taken in beside the training.

    Attributes:
        is_open: Whether a step was started and not joined.
    """

    def __init__(self, overlap: bool):
        self._overlap = overlap
        self._background = Inline()
        self._devices: object = None
        self._offloads = False
        self.is_open = False
        self._verdict: Optional[Verdict] = None

    def plan(
        self, entries: Sequence[Entry], averages: Sequence[Tensor]
    ) -> None:
        """Plan steps; the last one has to be joined.

        Args:
            entries: The entries that have an average.
            averages: Their averages, in the same order.
        """
        assert not self.is_open
        self._choose_background(entries, averages)
        host = torch.device('cpu') if self._offloads else None
        taken = [e for e in entries if self._may_change(e)]
        self._snapshot = Snapshot([e.raw for e in taken], host)
        copies = {id(e): c for e, c in zip(taken, self._snapshot.copies)}
        sources = [copies.get(id(e), e.raw) for e in entries]
        self._steps = StepPlan(entries, averages, sources)

    def start(self, step: Step) -> None:
        """Begin to take a step in.

        Args:
            step: The step; the one before has to be joined.
        """
        assert not self.is_open
        job = functools.partial(self._steps.take_in, step)
        self._background.start(self._snapshot, job)
        self.is_open, self._verdict = True, None
        if not self._background.is_background:
            self._verdict = self._background.join()

    @property
    def is_settled(self) -> bool:
        """Whether :meth:`join` would answer without waiting."""
        return not self.is_open or isinstance(self._verdict, bool)

    def release(self) -> None:
        """Let the raw weights change from here on."""
        if self.is_open:
            self._background.release()

    def join(self) -> bool:
        """Wait for the step that is under way.

        Returns:
            Whether it was finite; True if there was none.
        """
        if not self.is_open:
            return True
        try:
            if self._verdict is None:
                self._verdict = self._background.join()
        except Exception:
            self.is_open = False
            raise
        # a Ctrl-C while waiting leaves the step open: it is still under way
        self.is_open = False
        return bool(self._verdict)

    def _choose_background(
        self, entries: Sequence[Entry], averages: Sequence[Tensor]
    ) -> None:
        pairs = zip(averages, entries)
        devices = {(average.device, e.raw.device) for average, e in pairs}
        if devices != self._devices:
            self._devices = devices
            self._background, self._offloads = background_for(
                sorted(devices, key=str), self._overlap
            )

    def _may_change(self, entry: Entry) -> bool:
        """Return whether a raw tensor may change before it is read."""
        beside = self._background.is_background and not entry.parameters
        return self._offloads or beside
