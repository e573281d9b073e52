"""Which windows the files of a run allow, and how to record the others.

A window of ``w`` steps stands for ``exponential(decay=1 - 1/w)``, with a ramp
that has ended well before the run has.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

from mmdet_ema.averaging.averages import POSTHOC
from mmdet_ema.checkpoint.combination import Combination
from mmdet_ema.checkpoint.contents import AVERAGE, Contents, as_count
from mmdet_ema.checkpoint.format import META
from mmdet_ema.checkpoint.profiles import Profile
from mmdet_ema.checkpoint.runs import Run
from mmdet_ema.errors import CheckpointError, OptionError
from mmdet_ema.schedules import Schedule, exponential, window

# of the run: the shortest and the longest window that is tried
_SHORTEST, _LONGEST = 1 / 1000, 1 / 2
_FILES = re.compile(r'(epoch|iter)_\d+\.pth')


@dataclass(frozen=True)
class Window:
    """A window, the average that it stands for, and how to make it."""

    steps: float
    schedule: Schedule
    combination: Combination

    @property
    def problem(self) -> str:
        """Why it cannot be had, or nothing."""
        assert self.combination.fit is not None
        return self.combination.fit.problem


def files_of(work_dir: str) -> List[str]:
    """Return the regular checkpoints in the folder of a run."""
    names = sorted(os.listdir(work_dir)) if os.path.isdir(work_dir) else []
    found = [x for x in names if _FILES.fullmatch(x)]
    if not found:
        raise CheckpointError(
            f'{work_dir!r} holds no epoch_N.pth and no iter_N.pth; give the '
            f'work_dir of the training.'
        )
    return [os.path.join(work_dir, name) for name in found]


def since_restart(
    files: Sequence[Contents], notes: List[str]
) -> List[Contents]:
    """Leave out the files from before averages were restarted the last time.

    Those of the last files have seen nothing of the steps before.
    """
    at = [as_count(x.rest.get(META, {}).get('restarted')) or 0 for x in files]
    notes += [
        f'{contents.path} is from before the averages were restarted: it is '
        f'left out'
        for contents, restarted in zip(files, at)
        if restarted < max(at)
    ]
    return [x for x, restarted in zip(files, at) if restarted == max(at)]


def suited_schedule(steps: float, planned: int) -> Schedule:
    """Return the average of a window, with a ramp that ends in time."""
    # a ramp of half a window, as decay='auto', would still go on at the end
    # of a run that is not much longer
    tau = max(min(steps / 2, planned / 10), 1e-3)
    return exponential(round(1 - 1 / steps, 12), round(tau, 6))


def check_length(steps: float, planned: int) -> None:
    """Refuse a window that is longer than the run, or below a step."""
    if not 1 <= steps <= planned:
        raise OptionError(
            f'a window of {steps:g} steps is not allowed: the files end at '
            f'step {planned}; use 1 to {planned}.'
        )


def spread(count: int, planned: int) -> Sequence[float]:
    """Return so many windows, evenly spread on a scale of factors."""
    least = max(planned * _SHORTEST, 2)
    factor = max(planned * _LONGEST / least, 1)
    shares = [i / max(count - 1, 1) for i in range(count)]
    return sorted({round(least * factor**x) for x in shares})


def make_windows(
    run: Run, wanted: Sequence[float]
) -> Tuple[List[Window], List[Window]]:
    """Return the windows that the files of a run allow, and the others."""
    made: List[Window] = []
    refused: List[Window] = []
    for steps in wanted:
        check_length(steps, run.steps)
        schedule = suited_schedule(steps, run.steps)
        profile = Profile(str(schedule), 'schedule', schedule)
        found = Window(steps, schedule, run.nearest(profile))
        (refused if found.problem else made).append(found)
    return made, refused


def averages_of(run: Run) -> Dict[str, Optional[float]]:
    """Return the averages in the last file, with the window of each."""
    found: Dict[str, Optional[float]] = {}
    for name, weights in run.files[-1].sets.items():
        if weights.role == AVERAGE:
            schedule, length = weights.build_schedule(), math.inf
            if schedule is not None and weights.steps:
                length = window(schedule(weights.steps))
            found[name] = length if math.isfinite(length) else None
    return found


def how_to_reach(
    run: Run, made: Sequence[Window], refused: Sequence[Window]
) -> List[str]:
    """Return sentences on what the next run has to record."""
    if not refused:
        return []
    said = []
    if run.start is None or POSTHOC not in averages_of(run):
        said.append(
            'EMAHook(posthoc=True) adds a fast average and keeps the '
            'starting weights: windows from its own to that of the main one'
        )
    lengths = [x.steps for x in made] or [math.nan]
    short = [x for x in refused if x.steps < min(lengths)][:1]
    long = [x for x in refused if x.steps > max(lengths)][-1:]
    for name, reach, x in (
        *(('short', 'from {:g} steps on', x) for x in short),
        *(('long', 'up to {:g} steps', x) for x in long),
    ):
        decay, tau = x.schedule.options.values()
        said.append(
            f'for windows {reach.format(x.steps)}: averages=dict('
            f'{name}=dict(decay={decay:.6g}, tau={tau:.6g}))'
        )
    if long:
        said[-1] += (
            ', or all files of the run (CheckpointHook(max_keep_ckpts=-1))'
        )
    return said
