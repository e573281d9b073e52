"""Settings of every test run, before torch is imported."""

import os
import signal

import pytest

# waiting OpenMP threads make small operators slow on a busy machine
os.environ.setdefault('OMP_NUM_THREADS', '1')

# a run in the background starts with Ctrl-C ignored; some tests send it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Leave slow tests out unless MMDET_EMA_SLOW=1 asks for them."""
    if os.environ.get('MMDET_EMA_SLOW') == '1':
        return
    skip = pytest.mark.skip(reason='slow: run it with MMDET_EMA_SLOW=1')
    for item in items:
        if 'slow' in item.keywords:
            item.add_marker(skip)
