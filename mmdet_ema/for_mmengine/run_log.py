"""What the hook says: lines in the log, scalars in the message hub."""

from __future__ import annotations

import logging
import math
from typing import Any, Optional

from mmengine.logging import print_log

from mmdet_ema.averaging.averager import WeightAverager
from mmdet_ema.training.skips import describe_skip


class RunLog:
    """Forwards lines to the runner's logger and scalars to its hub."""

    def info(self, text: str) -> None:
        """Log a line."""
        print_log(text, logger='current')

    def warning(self, text: str) -> None:
        """Log a warning."""
        print_log(text, logger='current', level=logging.WARNING)

    def scalars(self, runner: Any, averager: Optional[WeightAverager]) -> None:
        """Record decay, distance and skipped steps of a training step."""
        hub = runner.message_hub
        decay = averager.decay if averager else 0.0
        if math.isfinite(decay):
            hub.update_scalar('train/ema_decay', decay)
        distance = averager.distance() if averager else 0.0
        if math.isfinite(distance):
            hub.update_scalar('train/ema_distance', distance)
        skipped = averager.num_skipped if averager else 0
        hub.update_scalar('train/ema_skipped', skipped)

    def skipped(
        self, runner: Any, averager: WeightAverager, iteration: int
    ) -> None:
        """Record a skipped step; warn at the 1st, 10th, 100th, ... one.

        Args:
            runner: The runner.
            averager: The averager that skipped it.
            iteration: The iteration of that step, from 1.
        """
        count = averager.known_skipped
        runner.message_hub.update_scalar('train/ema_skipped', count)
        line = describe_skip(averager, iteration)
        if line is not None:
            self.warning(line)
