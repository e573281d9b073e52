"""mmdet3d's ``tools/train.py``, ``--resume`` and ``tools/test.py``."""

import importlib.util
import json
import pickle

import pytest
import torch

from tests.e2e.conftest import differing, load

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
    """The second half, resumed from a file in between, ends as the whole."""
    config, whole, _ = trained
    part = tools.work_dir('part')
    tools.run('train', config, part, '--resume', whole / 'epoch_2.pth')
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
    both = tools.test(config, file, 'both', 'custom_hooks.0.evaluate=both')
    assert torch.equal(read(both / 'out.pkl'), expected['ema'])
    assert torch.equal(read(both / 'out_raw.pkl'), expected['raw'])


# Those of the inherited config, which the short run goes without.
