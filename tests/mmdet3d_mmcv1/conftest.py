"""Small 3D detectors, trained by the tools of mmdet3d 1.0 (mmcv 1.x)."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import ROOT, Tools, environment

HERE = Path(__file__).resolve().parent
WRITE_KITTI = ROOT / 'tests' / 'mmdet3d' / 'kitti_data.py'
# The data are where the configs look for them: below the working folder.
DATA = 'data/kitti_mini'
(POINTPILLARS,) = ROOT.glob('configs/pointpillars_mmdet3d1.0rc/*.py')
SMOKE = HERE / 'smoke_small.py'
EPOCHS = 4
STEPS = 16
SETTINGS = """
_base_ = {base!r}
runner = dict(max_epochs={epochs})
evaluation = dict(interval={epochs}, pklfile_prefix='{prefix}')
checkpoint_config = dict(interval=1)
log_config = dict(interval=1)
"""
FEW_LAYERS = """
model = dict(
    backbone=dict(layer_nums=[1, 1, 1]), test_cfg=dict(score_thr=0.0))
"""
# Nothing of ours, not even what the config above imports.
PLAIN = """
custom_imports = None
custom_hooks = []
optimizer = dict(constructor='DefaultOptimizerConstructor')
"""
HOOK = "dict(type='EMAHook', decay=0.9, tau=5, evaluate='both')"
IMPORTS = """
custom_imports = dict(
    imports=[{ours}'tests.mmdet3d_mmcv1.recorder'],
    allow_failed_imports=False)
custom_hooks = [{hook}
    dict(type='ValRecorderHook', priority='VERY_LOW'),
    dict(type='SeedHook')]
"""


def hooks(hook):
    """Return the lines of a config with a hook of ours, or without."""
    ours = "'mmdet_ema', " if hook else ''
    return IMPORTS.format(ours=ours, hook=hook and f'\n    {hook},')


class Tools3D(Tools):
    """Runs the tools of mmdet3d on a small config."""

    package = 'mmdet3d'

    def config(self, name, extra='', epochs=EPOCHS, base=POINTPILLARS):
        """Write a config; return its path."""
        path = self.folder / f'{name}.py'
        prefix = self.folder / name
        text = SETTINGS.format(base=str(base), epochs=epochs, prefix=prefix)
        small = FEW_LAYERS if base == POINTPILLARS else ''
        path.write_text(text + small + extra)
        return path

    def command(self, tool, config, work_dir, *arguments):
        """Return the command line of a tool."""
        words = super().command(tool, config, work_dir, *arguments)
        if tool == 'test':
            words = words[: words.index('--work-dir')]  # it has no such option
        return [words[0], str(HERE / 'on_cpu.py'), *words[1:]]

    def train(self, config, *arguments):
        """Run ``tools/train.py``; return the work folder and the output."""
        work_dir = self.folder / f'{config.stem}_run'
        words = ('--seed', 0, *arguments)
        return work_dir, self.run('train', config, work_dir, *words)

    def test(self, config, checkpoint, name):
        """Run ``tools/test.py``; return the predictions and the output."""
        prefix = self.folder / name
        words = (checkpoint, '--eval', 'img_bbox')
        words += ('--eval-options', f'pklfile_prefix={prefix}')
        printed = self.run('test', config, None, *words)
        return predictions(prefix), printed


def predictions(prefix):
    """Read what KITTI's evaluation was given last: one row a box."""
    (path,) = [
        path
        for path in prefix.parent.glob('*.pkl')
        if path.stem in (prefix.name, f'{prefix.name}img_bbox')
    ]
    rows = []
    for scene in pickle.loads(path.read_bytes()):
        names = ('bbox', 'location', 'dimensions')
        columns = [scene['rotation_y'][:, None], scene['score'][:, None]]
        rows.append(np.hstack([*(scene[name] for name in names), *columns]))
    found = np.concatenate(rows)
    assert len(found) > 0
    return found


@pytest.fixture(scope='session')
def tools(tmp_path_factory):
    """Tools, with data."""
    folder = tmp_path_factory.mktemp('mmdet3d_mmcv1')
    with pytest.MonkeyPatch.context() as patch:
        # KITTI's evaluation imports numba.cuda, whatever it computes
        patch.setenv('NUMBA_ENABLE_CUDASIM', '1')
        words = (WRITE_KITTI, folder / DATA, '--train', 8, '--val', 4)
        subprocess.run(
            [sys.executable, *map(str, words)], env=environment(), check=True
        )
        yield Tools3D(folder, folder / DATA)


@pytest.fixture(scope='session')
def trained(tools):
    """A finished training: its config, work folder and output."""
    config = tools.config('whole', hooks(HOOK))
    return (config, *tools.train(config))
