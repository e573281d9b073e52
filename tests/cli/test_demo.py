"""``mmdet-ema demo`` needs torch and scikit-learn, and no framework."""

import re

import pytest

from tests.averaging.models import run_python
from tests.cli.test_environment import BLOCK, SCRIPT

FRAMEWORKS = ('mmcv', 'mmdet', 'mmengine')


def test_raw_and_average_are_compared(tmp_path):
    """A table in which the average is better in the end, and a picture."""
    pytest.importorskip('sklearn')
    pytest.importorskip('matplotlib')
    picture = tmp_path / 'demo.png'
    code = BLOCK.format(names=FRAMEWORKS) + SCRIPT
    done = run_python(code, 'demo', '--out', picture, OMP_NUM_THREADS='1')
    assert (0, '') == (done.returncode, done.stderr)
    assert 10 == len(
        re.findall(r'^epoch +\d+( +\d+\.\d\d){2}$', done.stdout, 8)
    )
    (raw, ema) = re.search(
        r'^mean of last 10 +(\S+) +(\S+)$', done.stdout, 8
    ).groups()
    assert float(ema) < float(raw)
    assert f'picture: {picture}' in done.stdout
    assert picture.read_bytes().startswith(b'\x89PNG')


def test_missing_package_is_named(tmp_path):
    """Without scikit-learn one line says how to get it."""
    code = BLOCK.format(names=('sklearn', *FRAMEWORKS)) + SCRIPT
    done = run_python(code, 'demo', '--out', tmp_path / 'demo.png')
    assert 2 == done.returncode
    assert done.stderr.startswith('mmdet-ema: error: the digits come with')
    assert 1 == done.stderr.count('\n')
    assert 'pip install scikit-learn' in done.stderr
