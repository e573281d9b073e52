"""Type checkers and completion see what the package imports lazily."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

import mmdet_ema
from mmdet_ema.frameworks import load_hook
from tests.averaging.models import ROOT

HOOKS = ('BiasWarmupHook', 'EMAHook', 'EMAOptimizerConstructor')


def test_completion_lists_what_is_imported_lazily():
    """``dir(mmdet_ema)`` has every public name, imported or not."""
    assert set(mmdet_ema.__all__) <= set(dir(mmdet_ema))
    assert set(HOOKS) <= set(mmdet_ema.__all__)


@pytest.mark.skipif(load_hook() is None, reason='needs a framework')
def test_public_names_are_what_the_registry_builds():
    """Each name is there; those of a framework are of one generation."""
    values = {name: getattr(mmdet_ema, name) for name in mmdet_ema.__all__}
    folders = {values[name].__module__.split('.')[1] for name in HOOKS}
    assert len(folders) == 1
    assert values['EMAHook'] is load_hook()


@pytest.mark.skipif(find_spec('mypy') is None, reason='needs mypy')
def test_type_checkers_know_the_classes(tmp_path):
    """Mypy reveals classes of ours, not ``Any``."""
    names = (*HOOKS, 'WeightAverager')
    file = tmp_path / 'user.py'
    file.write_text(
        f'from mmdet_ema import {", ".join(names)}\n'
        + ''.join(f'reveal_type({name})\n' for name in names)
    )
    run = subprocess.run(
        [sys.executable, '-m', 'mypy', '--cache-dir', tmp_path, file],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    *lines, _ = run.stdout.decode().splitlines()
    assert 0 == run.returncode, lines
    assert len(names) == len(lines)
    for name, line in zip(names, lines):
        assert line.endswith(f'.{name}"'), line
