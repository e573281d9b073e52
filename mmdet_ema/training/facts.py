"""What a lifecycle has to know of a run, whatever runs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunFacts:
    """A training run, as planned.

    Attributes:
        iteration: Iterations done when training starts (above 0 on resume).
        max_iters: Iterations that are planned in all.
        max_epochs: Epochs that are planned in all.
        by_epoch: Whether the loop counts epochs.
        accumulation: Iterations to one optimizer step.
        batch_size: Samples that one process takes in an iteration.
        world_size: Number of processes.
        validates: Whether it has a validation.
        agrees: Whether it has one that is sure to be run on all ranks at
            once.
    """

    iteration: int
    max_iters: int
    max_epochs: int
    by_epoch: bool = True
    accumulation: int = 1
    batch_size: int = 1
    world_size: int = 1
    validates: bool = True
    agrees: bool = True

    @property
    def samples(self) -> int:
        """Samples that one optimizer step takes, over all processes."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def iters_per_epoch(self) -> int:
        """Iterations of one epoch, at least 1."""
        return max(self.max_iters // max(self.max_epochs, 1), 1)
