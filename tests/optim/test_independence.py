"""The grouping, the scaling and the warm-up know no framework."""

import pytest

from tests.core.test_independence import files_of, import_alone, strangers

MODULES = ('construction', 'warmup_start')


@pytest.mark.parametrize('module', MODULES)
def test_imports_without_frameworks(module):
    """What both adapters forward to imports where no framework can be."""
    run = import_alone(f'mmdet_ema.optim.{module}')
    assert 0 == run.returncode, run.stderr
    loaded = run.stdout.split()
    assert [] == [name for name in loaded if 'for_mm' in name]


def test_imports_torch_and_the_core():
    """No file beside the adapters names anything but torch and the core."""
    files = [f for f in files_of('optim') if 'for_mm' not in str(f)]
    assert len(files) > 8
    assert {} == {
        str(path): found
        for path in files
        if (found := strangers(path, ['core', 'optim']))
    }
