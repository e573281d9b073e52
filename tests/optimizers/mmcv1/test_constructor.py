"""The constructor where mmcv 1.x differs from mmengine."""

import logging

import pytest
from mmcv.utils import get_logger

from mmdet_ema.errors import OptionError
from tests.optimizers.models import Tied, Zoo
from tests.optimizers.toy import build

SGD = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4)


def test_the_log_of_the_tool(tmp_path):
    """The groups go as a table into the log file of the tool, once."""
    logger = get_logger('tool', log_file=str(tmp_path / 'tool.log'))
    build(Tied(), SGD)
    text = (tmp_path / 'tool.log').read_text()
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()
            logger.removeHandler(handler)
    assert 1 == text.count('SGD, 9 tensors in 3 groups')


def test_no_type():
    """An optimizer without a type is refused with what to do."""
    with pytest.raises(OptionError, match='add one'):
        build(Zoo(), dict(lr=0.1))
