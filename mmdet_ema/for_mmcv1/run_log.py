"""What the hook says: lines in the log, scalars beside the losses."""

from __future__ import annotations

import logging
import math
from typing import Any, Callable, Dict, Optional, Tuple

from mmcv.utils.logging import logger_initialized

from mmdet_ema.averaging.averager import WeightAverager
from mmdet_ema.frameworks import own_logger
from mmdet_ema.training.skips import describe_skip


class RunLog:
    """Forwards lines to the runner's logger and scalars to its buffer.

    Args:
        logger: The runner's logger; None before there is a runner, for that
            of the tool that runs, which writes into a file. Defaults to None.
    """

    def __init__(self, logger: Optional[logging.Logger] = None):
        self.logger = logger
        self._scalars: Dict[str, float] = {}
        self._moment: Tuple[Any, ...] = ()

    def info(self, text: str) -> None:
        """Log a line."""
        (self.logger or _logger_of_the_tool()).info(text)

    def warning(self, text: str) -> None:
        """Log a warning."""
        (self.logger or _logger_of_the_tool()).warning(text)

    def with_scalars(
        self,
        log: Callable[[Any], Any],
        runner: Any,
        averager: Optional[WeightAverager],
    ) -> Any:
        """Let a logger log decay, distance and skipped steps too.

        They are put beside what is logged, not into its history: the logger
        would show their mean over its interval. mmcv clears what was logged.

        Args:
            log: The ``log`` of a logger hook.
            runner: The runner.
            averager: The averager; None before the average begins.
        """
        scalars = self._scalars_of(runner, averager)
        runner.log_buffer.output.update(scalars)
        return log(runner)

    def skipped(self, averager: WeightAverager, iteration: int) -> None:
        """Warn of a skipped step, at the 1st, 10th, 100th, ... one.

        Args:
            averager: The averager that skipped it.
            iteration: The iteration of that step, from 1.
        """
        line = describe_skip(averager, iteration)
        if line is not None:
            self.warning(line)

    def _scalars_of(
        self, runner: Any, averager: Optional[WeightAverager]
    ) -> Dict[str, float]:
        """Compute the scalars once, however many loggers there are."""
        if runner.rank != 0:
            return {}
        steps = averager.num_steps if averager else 0
        moment = (id(averager), runner.iter, steps)
        if moment != self._moment:
            self._scalars, self._moment = _scalars(averager), moment
        return self._scalars


def _logger_of_the_tool() -> logging.Logger:
    for name in logger_initialized:
        logger = logging.getLogger(name)
        if any(isinstance(h, logging.FileHandler) for h in logger.handlers):
            return logger
    return own_logger()


def _scalars(averager: Optional[WeightAverager]) -> Dict[str, float]:
    found = {
        'ema_decay': averager.decay if averager else 0.0,
        'ema_distance': averager.distance() if averager else 0.0,
        'ema_skipped': averager.num_skipped if averager else 0,
    }
    return {name: x for name, x in found.items() if math.isfinite(x)}
