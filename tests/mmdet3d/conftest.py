"""Small 3D detectors, trained by mmdet3d's own tools in a subprocess."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Tools

HERE = Path(__file__).resolve().parent
# The data are where the configs look for them: below the working folder.
DATA = 'data/kitti_mini'
(POINTPILLARS,) = (ROOT / 'configs' / 'pointpillars').glob('*.py')
(SMOKE,) = (ROOT / 'configs' / 'smoke').glob('*.py')

# mmengine does not save the state of random generators: with random
# augmentations a resumed run sees other data than one that was not stopped.
WITHOUT_AUGMENTATION = {
    POINTPILLARS: """
train_set = _base_.train_dataloader.dataset.dataset
train_set.pipeline = [s for s in train_set.pipeline if s.type not in (
    'ObjectSample', 'RandomFlip3D', 'GlobalRotScaleTrans', 'PointShuffle')]
model = dict(test_cfg=dict(score_thr=0.0))
""",
    SMOKE: """
train_set = _base_.train_dataloader.dataset
train_set.pipeline[2].flip_ratio_bev_horizontal = 0.0
train_set.pipeline[3].aug_prob = 0.0
# SMOKE drops boxes below a score of 0.25, which few steps have to reach.
model = dict(bbox_head=dict(loss_cls=dict(neg_weight=0.02)))
""",
}
SETTINGS = """
train_cfg = dict(max_epochs=4, val_interval=4)
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=1))
test_evaluator = [dict(type='DumpResults', out_file_path='out.pkl')]
"""


class Tools3D(Tools):
    """Runs mmdet3d's own tools on a small config."""

    package = 'mmdet3d'

    def __init__(self, folder, base):
        super().__init__(folder, folder / DATA)
        self.base = base

    def config(self, name, extra=''):
        """Write a config; return its path."""
        path = self.folder / f'{self.base.parent.name}_{name}.py'
        head = f'_base_ = {str(self.base)!r}\n'
        text = head + WITHOUT_AUGMENTATION[self.base] + SETTINGS + extra
        path.write_text(text)
        return path

    def work_dir(self, name):
        """Return the folder of a run."""
        return self.folder / f'{self.base.parent.name}_{name}'

    def test(self, config, checkpoint, name, *options):
        """Run ``tools/test.py``; return the folder of its predictions."""
        work_dir = self.work_dir(f'test_{name}')
        out = f'test_evaluator.0.out_file_path={work_dir}/out.pkl'
        words = (checkpoint, '--cfg-options', out, *options)
        self.run('test', config, work_dir, *words)
        return work_dir

    def predict(self, config, checkpoint):
        """Predict with each half of a checkpoint, without our package."""
        out = self.work_dir('expected.pkl')
        words = (HERE / 'predict.py', config, checkpoint, out)
        self.finish([sys.executable, *words])
        return pickle.loads(out.read_bytes())


@pytest.fixture(scope='session')
def kitti(tmp_path_factory):
    """The folder below which the data are."""
    folder = tmp_path_factory.mktemp('mmdet3d')
    words = (HERE / 'kitti_data.py', folder / DATA, '--train 8 --val 4')
    command = f'{sys.executable} {" ".join(map(str, words))}'
    subprocess.run(command.split(), check=True)
    return folder


@pytest.fixture(
    scope='session',
    params=[POINTPILLARS, SMOKE],
    ids=lambda path: path.parent.name,
)
def tools(request, kitti):
    """Tools on one of the configs."""
    return Tools3D(kitti, request.param)


@pytest.fixture(scope='session')
def trained(tools):
    """A finished training: its config, work folder and log."""
    config, work_dir = tools.config('whole'), tools.work_dir('whole')
    return config, work_dir, tools.run('train', config, work_dir)
