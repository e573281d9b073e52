"""These tests have no time to sleep."""

import time

import pytest


@pytest.fixture(autouse=True, scope='session')
def no_sleep():
    """The frameworks sleep 2 seconds an epoch, against deadlocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, 'sleep', lambda seconds: None)
        yield
