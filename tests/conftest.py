"""Settings of every test run, before torch is imported."""

import importlib.util
import os
import signal
from pathlib import Path

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


# What a stack does not have is left out; test_stacks.py looks whether it has
# what it should, so that a broken installation does not pass for a small one.
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
    """Leave out what takes long unless it is asked for: ``-m slow``."""
    if 'slow' in config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker('slow')]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)
