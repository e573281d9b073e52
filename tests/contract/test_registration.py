"""What is said of the registration, and when."""

import os
import subprocess
import sys

import pytest

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


def test_import_says_nothing():
    """Who only imports the package, for a command, reads nothing of it."""
    assert said('import mmdet_ema') == []


def test_built_hook_says_whose_it_is():
    """Each hook that a config asks for is one INFO line."""
    build = BUILD.format('EMAHook')
    first, second = said('import mmdet_ema', build, build)
    for line in (first, second):
        assert 'INFO - EMA: mmdet_ema ' in line
        assert "dict(type='EMAHook') builds its own hook" in line
        assert repr(THEIRS) in line


@pytest.mark.parametrize(
    ('kind', 'rank'), [('EMAHook', '1'), (THEIRS, '0')], ids=str
)
def test_nothing_is_said(kind, rank):
    """Other ranks say nothing; nor does the framework's own hook."""
    assert said('import mmdet_ema', BUILD.format(kind), rank=rank) == []
