"""Settings of every test run, before torch is imported."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest

# waiting OpenMP threads make small operators slow on a busy machine
os.environ.setdefault('OMP_NUM_THREADS', '1')

# a run in the background starts with Ctrl-C ignored; some tests send it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def has(package, part=''):
    """Tell whether a package with a part is installed; import nothing."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else ()
    return any(Path(folder, part).exists() for folder in folders)


# What a stack does not have is left out; the table of what_was_run.md counts
# what is left, so that a broken installation does not pass for a small one.
MMCV1 = has('mmcv', 'runner')
collect_ignore_glob = (
    [
        *('*/mmengine', 'for_mmengine', 'e2e', 'mmdet3d', 'benchmarks'),
        *('cli/test_commands.py', 'cli/test_main.py'),
    ]
    if MMCV1
    else ['*/mmcv1', 'for_mmcv1', 'mmcv1_tools', 'mmdet3d_mmcv1']
)
if not has('mmdet'):
    collect_ignore_glob += ['benchmarks', 'e2e', 'mmcv1_tools', 'optimizers']
if not has('mmdet3d'):
    collect_ignore_glob += ['mmdet3d', 'mmdet3d_mmcv1']


def pytest_collection_modifyitems(config, items):
    """Leave out what takes minutes, unless it is asked for."""
    if os.environ.get('MMDET_EMA_SLOW') == '1':
        return
    if config.option.markexpr == 'slow':
        return
    reason = 'takes minutes; MMDET_EMA_SLOW=1'
    for item in items:
        if item.get_closest_marker('slow'):
            item.add_marker(pytest.mark.skip(reason=reason))
