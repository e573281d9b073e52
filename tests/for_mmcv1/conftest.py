"""These tests need mmcv 1.7, and have no time to sleep."""

import importlib.util
import time

import pytest

try:
    MISSING = importlib.util.find_spec('mmcv.runner') is None
except ImportError:
    MISSING = True

collect_ignore_glob = ['*'] if MISSING else []


@pytest.fixture(autouse=True, scope='session')
def no_sleep():
    """Let mmcv not sleep 2 seconds an epoch, against deadlocks of workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, 'sleep', lambda seconds: None)
        yield
