"""mmdet3d's ``tools/train.py``, ``--resume`` and ``tools/test.py``."""

import importlib.util
import json
import pickle
import subprocess
import sys

import pytest
import torch

from tests.e2e.conftest import differing, environment, load

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        importlib.util.find_spec('mmdet3d') is None,
        reason='mmdet3d is not installed: make setup',
    ),
]

STEPS = 16


def boxes(samples):
    """All predicted boxes with scores and labels, one row each."""
    rows = []
    for sample in samples:
        found = sample['pred_instances_3d']
        parts = [found['scores_3d'], found['labels_3d']]
        columns = [part[:, None] for part in parts]
        rows.append(torch.cat([found['bboxes_3d'].tensor, *columns], dim=1))
    assert len(torch.cat(rows)) > 0
    return torch.cat(rows)


def read(path):
    """Read dumped predictions."""
    return boxes(pickle.loads(path.read_bytes()))


def test_training_reports_logs_and_saves(trained):
    """The report, the scalars and a checkpoint of plain values are there."""
    _, work_dir, log = trained
    assert 'EMA: exponential(decay=' in log
    assert f'steps: {STEPS} planned' in log
    assert 'ema_decay: ' in log
    assert 'allow-listed' not in log
    saved = load(work_dir / 'epoch_4.pth')
    assert saved['ema_state_dict']['steps'] == STEPS
    assert saved['ema_meta']['roles']['state_dict'] == 'average'
    weights, raw = saved['state_dict'], saved['ema_state_dict']
    assert any(
        not torch.equal(value, raw[f'module.{name}'])
        for name, value in weights.items()
    )


def test_metrics_of_both_halves_reach_the_visualizer(trained):
    """KITTI's metric is there for averages and for raw weights."""
    _, work_dir, _ = trained
    (path,) = work_dir.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = {name for line in lines for name in line if 'KITTI' in name}
    raw = {name for name in names if name.endswith('_raw')}
    assert raw == {f'{name}_raw' for name in names - raw}
    assert raw


def test_resumed_training_equals_the_uninterrupted_one(tools, trained):
    """4 epochs at once equal 2, a validation and 2 with ``--resume``."""
    config, whole, _ = trained
    part = tools.work_dir('part')
    short = tools.config('part', 'train_cfg = dict(max_epochs=2)\n')
    tools.run('train', short, part)
    tools.run('train', config, part, '--resume')
    left, right = load(whole / 'epoch_4.pth'), load(part / 'epoch_4.pth')
    assert left['ema_state_dict']['steps'] == STEPS
    assert differing(left, right) == []
    assert left['ema_meta'] == right['ema_meta']


def test_test_tool_uses_the_weights_it_is_told(tools, trained):
    """Predictions are those of the chosen weights without our package."""
    config, work_dir, _ = trained
    file = work_dir / 'epoch_4.pth'
    expected = {k: boxes(v) for k, v in tools.predict(config, file).items()}
    assert expected['ema'].shape != expected['raw'].shape or not torch.equal(
        expected['ema'], expected['raw']
    )
    folders = {
        name: tools.test(config, file, name, f'custom_hooks.0.evaluate={name}')
        for name in ('ema', 'raw', 'both')
    }
    assert torch.equal(read(folders['ema'] / 'out.pkl'), expected['ema'])
    assert torch.equal(read(folders['raw'] / 'out.pkl'), expected['raw'])
    both = folders['both']
    assert torch.equal(read(both / 'out.pkl'), expected['ema'])
    assert torch.equal(read(both / 'out_raw.pkl'), expected['raw'])


UNCOPYABLE = """
custom_imports = dict(imports=['mmdet_ema', 'tests.mmdet3d.uncopyable'])
model = dict(middle_encoder=dict(type='UncopyableScatter'))
"""
PEER = """
custom_hooks = [dict(type='MMEngineEMAHook')]
train_cfg = dict(max_epochs=2, val_interval=1)
"""
# Those of the inherited config, which the short run goes without.
SCHEDULERS = """
param_scheduler = [
    dict(type=kind, T_max=4, eta_min=0.01, end=4, convert_to_iter_based=True)
    for kind in ('CosineAnnealingLR', 'CosineAnnealingMomentum')]
"""


def test_module_that_cannot_be_copied(pointpillars):
    """A module with a lock in it trains and resumes to the same bits."""
    work_dir = pointpillars.work_dir('uncopyable')
    for epochs in (1, 2):
        length = f'train_cfg = dict(max_epochs={epochs})\n'
        config = pointpillars.config(f'lock_{epochs}', UNCOPYABLE + length)
        pointpillars.run('train', config, work_dir, '--resume')
    _, whole, _ = pointpillars.whole
    left, right = load(whole / 'epoch_2.pth'), load(work_dir / 'epoch_2.pth')
    assert differing(left, right) == []


def test_mmengines_own_hook_needs_a_copy(pointpillars):
    """The peer's hook stops at such a module: what the test above avoids."""
    config = pointpillars.config('peer_copy', UNCOPYABLE + PEER)
    words = ('train', config, pointpillars.work_dir('peer_copy'))
    done = subprocess.run(
        pointpillars.command(*words),
        cwd=pointpillars.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode != 0
    assert "cannot pickle '_thread.lock' object" in done.stdout


def test_files_of_mmengines_own_hook_are_tested_and_resumed(pointpillars):
    """What mmengine wrote with KITTI's metric in it is read again."""
    work_dir = pointpillars.work_dir('peer')
    config = pointpillars.config('peer', PEER + SCHEDULERS)
    pointpillars.run('train', config, work_dir)
    file = work_dir / 'epoch_2.pth'
    # a process of its own: this one may have imported the package by now
    code = 'import sys, torch; torch.load(sys.argv[1], weights_only=True)'
    bare = subprocess.run(
        [sys.executable, '-c', code, file], capture_output=True, text=True
    )
    assert 'Weights only load failed' in bare.stderr
    longer = 'train_cfg = dict(max_epochs=3)\n'
    ours = pointpillars.config('go_on', SCHEDULERS + longer)
    out = pointpillars.test(ours, file, 'peer', 'custom_hooks.0.evaluate=ema')
    assert len(read(out / 'out.pkl')) > 0
    pointpillars.run('train', ours, work_dir, '--resume')
    saved = load(work_dir / 'epoch_3.pth')
    assert saved['ema_state_dict']['steps'] == STEPS * 3 // 4
