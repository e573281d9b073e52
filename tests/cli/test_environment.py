"""``mmdet-ema env`` says what a bug report needs, whatever is broken."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from mmdet_ema.frameworks import has_mmcv1
from mmdet_ema.version import __version__
from tests.averaging.models import run_python

# what the script does that pip writes
SCRIPT = """
import sys
from mmdet_ema_cli import main
sys.argv[0] = 'mmdet-ema'
main()
"""
BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {names!r}:
            raise ModuleNotFoundError(f'{{name}} is blocked', name=name)

sys.meta_path.insert(0, Blocker())
"""
FRAMEWORKS = ('torch', 'mmengine', 'mmcv')


def rows_of(run):
    """Return the lines of a run that went well, which are all alike."""
    assert 0 == run.returncode, run.stderr
    lines = [line.partition(':') for line in run.stdout.splitlines()]
    assert all(mark and text.strip() for _, mark, text in lines), run.stdout
    return {name: text.strip() for name, _, text in lines}


def test_versions_and_hooks_are_named():
    """Every package has a line, and so has each hook that is built."""
    run = run_python(SCRIPT, 'env')
    rows = rows_of(run)
    assert rows['mmdet_ema'] == __version__
    assert rows['Python'] == platform.python_version()
    assert rows['torch'].startswith(torch.__version__)
    for name in ('numpy', 'mmengine', 'mmdet', 'mmdet3d'):
        try:
            expected = version(name)
        except PackageNotFoundError:
            missing = name in rows['not installed'].split(', ')
            assert missing or '(onedl-' in rows[name]
        else:
            assert rows[name] == expected
    assert '.ema_hook.EMAHook (mmengine.registry)' in run.stdout
    assert has_mmcv1() == ('for_mmcv1.ema_hook.EMAHook (mmcv.r' in run.stdout)
    assert 'GPUs' in rows


def test_missing_packages_are_no_error():
    """Without torch and the frameworks it says so, in the same lines."""
    rows = rows_of(run_python(BLOCK.format(names=FRAMEWORKS) + SCRIPT, 'env'))
    assert rows['torch'] == 'ModuleNotFoundError: torch is blocked'
    assert rows['EMAHook'] == 'needs mmengine or mmcv 1.7'
    assert rows['GPUs'] == rows['torch']


def test_framework_that_does_not_import_is_shown(tmp_path):
    """Its error is the line; what it prints does not get into stdout."""
    package = tmp_path / 'mmengine'
    package.mkdir()
    (package / '__init__.py').write_text(
        "print('noise')\nraise OSError('libx.so:\\n cannot open')\n"
    )
    code = f'import sys\nsys.path.insert(0, {str(tmp_path)!r})\n'
    run = run_python(BLOCK.format(names=('mmcv',)) + code + SCRIPT, 'env')
    assert rows_of(run)['EMAHook'] == (
        'OSError: libx.so: cannot open (mmengine.registry)'
    )
    assert 'noise' in run.stderr


def test_unknown_words_are_refused():
    """``env`` passes nothing on to a tool."""
    run = run_python(SCRIPT, 'env', '--verbose')
    assert 2 == run.returncode
    assert 'unrecognized arguments: --verbose' in run.stderr
