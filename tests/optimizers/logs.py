"""What is logged, as lines."""

import contextlib
import logging


class Lines(logging.Handler):
    """Keeps lines by their level; also what the package takes for a log."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.infos, self.warnings = [], []
        self.info, self.warning = self.infos.append, self.warnings.append

    def emit(self, record):
        kept = self.infos if record.levelname == 'INFO' else self.warnings
        kept.append(record.getMessage())

    @property
    def all(self):
        """Lines of every level."""
        return self.infos + self.warnings


@contextlib.contextmanager
def logged(logger, lines=None):
    """Yield the lines that a logger is given."""
    lines = lines or Lines()
    logger.addHandler(lines)
    try:
        yield lines
    finally:
        logger.removeHandler(lines)
