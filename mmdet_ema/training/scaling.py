"""Another batch size: the decay that keeps the averaging window.

With kappa times as many samples a step, ``decay ** kappa`` averages over the
same number of samples (Busbridge et al. 2023, arXiv:2307.13813; the learning
rate has to be scaled as well).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping

from mmdet_ema.schedules import Schedule, to_the_power

REFERENCE = 'reference_samples'


@dataclass(frozen=True)
class Scaling:
    """How a run's steps compare with those that the decay was chosen for.

    Attributes:
        reference: Samples a step that the configured decay belongs to.
        samples: Samples a step of this run.
        applied: Whether the decay is scaled.
    """

    reference: int
    samples: int
    applied: bool

    @property
    def kappa(self) -> float:
        """Samples a step, relative to the reference."""
        return self.samples / self.reference

    @property
    def saved(self) -> int:
        """The reference for a run that resumes from this one."""
        return self.reference if self.applied else self.samples

    def of(self, schedule: Schedule) -> Schedule:
        """Return the schedule that this run uses."""
        scaled = self.applied and self.kappa != 1
        return to_the_power(schedule, self.kappa) if scaled else schedule

    def describe(self, schedule: Schedule) -> str:
        """Say in one line what is done; empty for the same batch size."""
        if self.kappa == 1:
            return ''
        limit = schedule.limit
        numbers = f' ({limit:g} -> {limit**self.kappa:.6g})' if limit else ''
        done = 'it is used' if self.applied else 'scale_decay=True uses it'
        return (
            f'EMA: a step takes {self.samples} samples, not '
            f'{self.reference} as in the checkpoint; decay ** '
            f'{self.kappa:.6g}{numbers} keeps the averaging window in '
            f'samples: {done}.'
        )


def scaling_of(
    meta: Mapping[str, Any], samples: int, applied: bool
) -> Scaling:
    """Compare a run with the checkpoint that it resumes from.

    Args:
        meta: ``ema_meta`` of the checkpoint; empty for a new run.
        samples: Samples a step of this run, over all processes.
        applied: Whether the decay is to be scaled.

    Returns:
        The scaling; none where the checkpoint does not tell.
    """
    per_rank, ranks = meta.get('batch_size'), meta.get('world_size')
    reference = meta.get(REFERENCE)
    if not isinstance(reference, int) and per_rank and ranks:
        reference = per_rank * ranks
    if not isinstance(reference, int) or reference < 1:
        reference = samples
    return Scaling(reference, samples, applied)
