"""What is said of the registration, and when."""

import os
import subprocess
import sys

from tests.conftest import MMCV1

BUILD = (
    'from mmcv.runner import HOOKS; HOOKS.build(dict(type={!r}))'
    if MMCV1
    else 'from mmengine.registry import HOOKS; HOOKS.build(dict(type={!r}))'
)
THEIRS = 'MMCVEMAHook' if MMCV1 else 'MMEngineEMAHook'


def said(*program, rank='0'):
    """Return our lines of a process, all of them on stderr."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', '\n'.join(program)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, 'RANK': rank},
    )
    assert done.stdout == ''
    return [x for x in done.stderr.splitlines() if 'mmdet_ema' in x]


def test_built_hook_says_whose_it_is():
    """Each that a config asks for is one INFO line, of one rank.

    Who only imports the package reads nothing of it, nor whoever builds the
    framework's own hook.
    """
    ours, theirs = BUILD.format('EMAHook'), BUILD.format(THEIRS)
    program = ['import mmdet_ema', theirs, ours, ours]
    assert [] == said(*program, rank='1')
    first, second = said(*program)
    for line in (first, second):
        assert 'INFO - EMA: mmdet_ema ' in line
        assert "dict(type='EMAHook') builds its own hook" in line
        assert repr(THEIRS) in line
