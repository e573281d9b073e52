"""A real detector, small, trained by the tools of mmdet 2."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmdet_ema.checkpoint.mmcv1 import MESSAGE
from tests import oracle
from tests.e2e.conftest import ROOT, Tools

CONFIG = ROOT / 'configs' / 'atss_mmdet2' / 'atss_digits_1xb8-10e.py'
EPOCHS = 4
STEPS = 16
SCENES = '--train 16 --val 8'
# mmdet 2 does not save the state of its random numbers: only with pictures in
# a fixed order a resumed training can equal one in a go.
SETTINGS = """
_base_ = {config!r}
data = dict(
    train_dataloader=dict(samples_per_gpu=4, shuffle=False),
    train=dict(ann_file={data!r} + 'annotations/train.json',
               img_prefix={data!r} + 'train/'),
    val=dict(ann_file={data!r} + 'annotations/val.json',
             img_prefix={data!r} + 'val/'),
    test=dict(ann_file={data!r} + 'annotations/val.json',
              img_prefix={data!r} + 'val/'))
model = dict(test_cfg=dict(score_thr=0.0))
runner = dict(max_epochs={epochs})
evaluation = dict(interval=1)
checkpoint_config = dict(interval=1)
log_config = dict(interval=1)
"""
RECORD = """
custom_imports = dict(
    imports=['mmdet_ema', 'tests.mmcv1_tools.recorder'],
    allow_failed_imports=False)
custom_hooks = [
    dict(type='EMAHook', decay=0.9, tau=5, evaluate='all',
         averages=dict(fast=dict(decay=0.5))),
    dict(type='RecorderHook', priority='VERY_LOW')]
"""


class Mmdet2Tools(Tools):
    """Runs the tools of mmdet 2 on a small config."""

    def config(self, name, extra='', epochs=EPOCHS, base=CONFIG):
        """Write a config; return its path."""
        path = self.folder / f'{name}.py'
        settings = SETTINGS.format(
            config=str(base), data=f'{self.data}/', epochs=epochs
        )
        path.write_text(settings + extra)
        return path

    def train(self, config, work_dir, *arguments):
        """Run ``tools/train.py``; return what it printed."""
        words = ('--seed', 0, '--gpu-ids', 0, *arguments)
        return self.run('train', config, work_dir, *words)

    def test(self, config, checkpoint, name):
        """Run ``tools/test.py``; return its metrics and what it printed."""
        out = self.folder / f'test_{name}'
        words = (checkpoint, '--eval', 'bbox')
        printed = self.run('test', config, out, *words)
        (path,) = out.glob('eval_*.json')
        return json.loads(path.read_text())['metric'], printed


def check_against_the_formula(saved, rows, decay=None):
    """Compare a file with what NumPy makes of the recorded weights."""
    decay = decay or (lambda n: oracle.ramp(n, 0.9, 5))
    for name, row in rows.items():
        row = row.double().numpy()
        expected = oracle.average(row[0], row[1:], decay)
        found = saved['state_dict'][name].numpy()
        # a float32 average takes one rounding of 6e-8 a step
        error = oracle.relative_error(found, expected)
        assert error <= STEPS * 6e-8, name
        raw = saved['ema_state_dict'][f'module.{name}'].numpy()
        assert np.array_equal(raw, row[-1]), name


def load(path):
    """Read a checkpoint, its EMA part beside the weights."""
    checkpoint = torch.load(path, map_location='cpu')
    part = checkpoint['meta'].get('hook_msgs', {}).get(MESSAGE, {})
    return {**checkpoint, **part}


def differing(left, right):
    """Names that differ in a bit: weights, EMA part, optimizer, counters."""
    keys = ('state_dict', 'ema_state_dict', 'optimizer')
    flat = [
        dict(flatten({key: x[key] for key in keys})) for x in (left, right)
    ]
    assert flat[0].keys() == flat[1].keys()
    names = [k for k, v in flat[0].items() if not same(v, flat[1][k])]
    counters = ('iter', 'epoch')
    return names + [k for k in counters if left['meta'][k] != right['meta'][k]]


def flatten(tree, prefix=''):
    """Leaves of nested dicts and lists, with their paths."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in pairs:
        if isinstance(value, (dict, list)):
            yield from flatten(value, f'{prefix}{key}/')
        else:
            yield f'{prefix}{key}', value


def same(left, right):
    """Tell whether two leaves are equal to the bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return left == right


@pytest.fixture(scope='session')
def tools(tmp_path_factory):
    """Tools over a small digits set."""
    folder = tmp_path_factory.mktemp('mmcv1_tools')
    data = folder / 'digits'
    subprocess.run(
        [sys.executable, ROOT / 'demo' / 'digits.py', data, *SCENES.split()],
        check=True,
    )
    return Mmdet2Tools(folder, data)


@pytest.fixture(scope='session')
def trained(tools):
    """A finished training: its config, work folder and output."""
    config = tools.config('whole', RECORD)
    work_dir = tools.folder / 'whole'
    return config, work_dir, tools.train(config, work_dir)
