"""These tests need either framework, and have no time to sleep."""

import time

import pytest

from tests.conftest import MMCV1, has

collect_ignore_glob = [] if MMCV1 or has('mmengine') else ['*']


@pytest.fixture(autouse=True, scope='session')
def no_sleep():
    """Let mmcv not sleep 2 seconds an epoch, against deadlocks of workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, 'sleep', lambda seconds: None)
        yield
