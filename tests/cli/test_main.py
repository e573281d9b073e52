"""``mmdet-ema`` answers at once, and an import still registers the hooks."""

import os
import subprocess
import sys

import pytest

from mmdet_ema.version import __version__
from tests.averaging.models import ROOT, run_python

# what the script does that pip writes; nothing heavy may be imported by it
SCRIPT = """
import sys
from mmdet_ema_cli import main
sys.argv[0] = 'mmdet-ema'
try:
    main()
except SystemExit as stop:
    heavy = {'torch', 'numpy', 'mmengine', 'mmcv'} & sys.modules.keys()
    status = str(heavy) if heavy else stop.code
"""
END = 'sys.exit(status)'
USE = """
from mmdet_ema import EMAHook, WeightAverager, build_schedule
from mmengine.registry import HOOKS
assert HOOKS.get('EMAHook') is EMAHook
"""


def run_module(*words, cwd=ROOT):
    return subprocess.run(
        [sys.executable, '-m', *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )


@pytest.mark.parametrize(
    'run',
    [
        lambda word: run_python(SCRIPT + END, word),
        lambda word: run_module('mmdet_ema', word),
    ],
    ids=['script', 'module'],
)
def test_version_is_one_line(run):
    """Neither way prints a line of a log, nor waits for torch."""
    done = run('--version')
    assert (0, f'mmdet-ema {__version__}\n', '') == (
        done.returncode,
        done.stdout,
        done.stderr,
    )
    assert run('--help').stderr == ''


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ((), 'COMMAND'),
        (('trian',), 'invalid choice'),
        (('test', 'a', '--weights'), 'expected one argument'),
        (('train', 'a', '--decay', 'x'), 'invalid float value'),
        (
            ('train', 'a', '--no-ema', '--decay', '0.9', '--overlap'),
            '--no-ema contradicts --decay, --overlap; leave one out',
        ),
        (('demo', '--out', 'nowhere/a.png'), 'there is no such folder'),
        (('plot', 'a', '--out', 'a.xyz'), 'not a .png, .pdf or .svg file'),
        (('plot', 'a', '--outs', 'a.png'), 'unrecognized arguments'),
    ],
)
def test_wrong_usage_waits_for_nothing_either(words, message):
    """The exit status is 2, and the usage is printed."""
    done = run_python(SCRIPT + END, *words)
    assert 2 == done.returncode
    assert 'usage: mmdet-ema' in done.stderr
    assert message in done.stderr


def test_names_are_there_for_a_module_that_a_command_imports():
    """What a config imports can use the package as it always does."""
    done = run_python(SCRIPT + USE, '--version')
    assert 0 == done.returncode, done.stderr


def test_import_by_another_command_registers_the_hooks(tmp_path):
    """``python -m project`` of a project that imports the package."""
    package = tmp_path / 'project'
    package.mkdir()
    (package / '__init__.py').write_text('import mmdet_ema\n')
    (package / '__main__.py').write_text(
        'from mmengine.registry import HOOKS\n'
        "print(HOOKS.get('EMAHook').__module__)\n"
    )
    done = run_module('project', cwd=tmp_path)
    assert done.stdout == 'mmdet_ema.for_mmengine.ema_hook\n'
