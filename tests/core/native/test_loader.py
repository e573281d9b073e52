"""Where the compiled kernels come from, and what is done without them."""

import importlib.machinery
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from mmdet_ema.core import WeightAverager
from mmdet_ema.core.native import loader, update
from mmdet_ema.core.native.interface import fingerprint

ROOT = pathlib.Path(__file__).parents[3]
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
needs_compiler = pytest.mark.skipif(
    shutil.which('gcc') is None, reason='no compiler'
)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Look for kernels in an empty folder."""
    monkeypatch.setattr(loader, '__file__', str(tmp_path / 'loader.py'))
    loader.load.cache_clear()
    yield tmp_path
    loader.load.cache_clear()


def build(source, target):
    command = ['gcc', '-shared', '-fPIC', '-O1', '-xc', '-', '-o', str(target)]
    subprocess.run(command, input=source, text=True, check=True)


def test_missing_file(folder):
    """Without the file there are no kernels."""
    assert loader.load() is None


def test_broken_file(folder):
    """A file that is no library is passed over."""
    (folder / f'_kernels{SUFFIX}').write_bytes(b'no library')
    assert loader.load() is None


@needs_compiler
def test_library_without_the_functions(folder):
    """A library that is another one is passed over."""
    build('int other(void) { return 1; }', folder / f'_kernels{SUFFIX}')
    assert loader.load() is None


@needs_compiler
@pytest.mark.parametrize('off', [0, -1, 1 << 24, 8 << 16])
def test_other_interface(folder, off):
    """Kernels of another version, or another processor, are passed over."""
    number = 0 if off == -1 else fingerprint() + off
    source = f"""
    int mmdet_ema_interface(void) {{ return {number}; }}
    int mmdet_ema_update(void) {{ return 1; }}
    int mmdet_ema_copy(void) {{ return 1; }}
    int mmdet_ema_note(void) {{ return 1; }}
    int mmdet_ema_are_right(void) {{ return 1; }}
    int mmdet_ema_understands(void) {{ return 1; }}
    int mmdet_ema_bytes_of_place(void) {{ return 8; }}"""
    build(source, folder / f'_kernels{SUFFIX}')
    assert (off == 0) == (loader.load() is not None)


def test_switched_off(monkeypatch):
    """MMDET_EMA_NATIVE=0 leaves everything to torch, with the same bits."""
    code = """
import hashlib, torch
from mmdet_ema.core import WeightAverager
from mmdet_ema.core.native.loader import load
torch.manual_seed(0)
model = torch.nn.Linear(300, 70)
averager = WeightAverager(model)
for _ in range(5):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape))
    averager.update()
total = hashlib.sha256()
for _, average in averager.named_averages():
    total.update(average.numpy().tobytes())
print(load() is not None, total.hexdigest())
"""
    found = []
    for value in ('0', '1'):
        monkeypatch.setenv('MMDET_EMA_NATIVE', value)
        command = [sys.executable, '-c', code]
        printed = subprocess.check_output(command, text=True, cwd=ROOT)
        found.append(printed.split()[-2:])
    assert 'False' == found[0][0]
    assert str(loader.load() is not None) == found[1][0]
    assert found[0][1] == found[1][1]


def test_kernels_with_other_bits(monkeypatch):
    """Kernels that do not give torch's bits are not used."""
    update._trial.cache_clear()
    monkeypatch.setattr(update.NativeUpdate, 'update', lambda *_, **__: True)
    try:
        assert not update.can_update(torch.zeros(3), torch.zeros(3))
    finally:
        monkeypatch.undo()
        update._trial.cache_clear()


@needs_compiler
@pytest.mark.skipif(sys.platform != 'linux', reason='GCC on Linux')
def test_it_is_built_and_used(tmp_path):
    """setup.py builds the kernels where there is a compiler."""
    run_setup(tmp_path)
    assert 1 == len(list(tmp_path.rglob('_kernels*.so')))


def test_no_compiler(tmp_path, monkeypatch):
    """Without a compiler the build goes on, without the kernels."""
    monkeypatch.setenv('CC', str(tmp_path / 'nothing'))
    run_setup(tmp_path)
    assert [] == list(tmp_path.rglob('_kernels*.so'))


def run_setup(folder):
    command = [sys.executable, 'setup.py', '-q', 'build_ext']
    subprocess.run(
        [*command, '-b', str(folder / 'lib'), '-t', str(folder / 'temp')],
        cwd=ROOT,
        check=True,
    )


def test_averager_uses_them():
    """An average of float32 weights is kept by the compiled kernels."""
    averager = WeightAverager(torch.nn.Linear(3, 4))
    guarded = averager._store.intake._steps._guarded
    assert bool(guarded) == (loader.load() is not None)
