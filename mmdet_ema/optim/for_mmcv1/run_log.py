"""Where lines go, before there is a runner and after."""

from __future__ import annotations

import logging
from typing import Optional

from mmcv.utils import get_logger
from mmcv.utils.logging import logger_initialized


class RunLog:
    """Forwards lines to a logger.

    Args:
        logger: The logger; None for that of the tool that runs, which is the
            one that writes into a file. Defaults to None.
    """

    def __init__(self, logger: Optional[logging.Logger] = None):
        self._logger = logger

    def info(self, text: str) -> None:
        """Log a line."""
        (self._logger or _logger_of_the_tool()).info(text)

    def warning(self, text: str) -> None:
        """Log a warning."""
        (self._logger or _logger_of_the_tool()).warning(text)


def _logger_of_the_tool() -> logging.Logger:
    for name in logger_initialized:
        logger = logging.getLogger(name)
        if any(isinstance(h, logging.FileHandler) for h in logger.handlers):
            return logger
    return get_logger('mmdet_ema')  # type: ignore[no-any-return]
