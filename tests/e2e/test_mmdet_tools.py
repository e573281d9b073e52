"""mmdet's ``tools/train.py``, ``--resume`` and ``tools/test.py``."""

import itertools
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from tests import needs
from tests.e2e.conftest import differing, environment, load, maps

pytestmark = pytest.mark.e2e
# what the names of metrics end with
ENDS = {'ema': '', 'raw': '_raw', 'fast': '_fast'}


def test_training_reports_logs_and_saves(trained):
    """The report, the scalars and the checkpoint's parts are there."""
    _, work_dir, log = trained
    assert 'EMA: exponential(decay=' in log
    assert 'steps: 16 planned' in log
    assert 'ema_decay: ' in log
    assert 'ema_distance: ' in log
    saved = load(work_dir / 'epoch_4.pth')
    assert saved['ema_state_dict']['steps'] == 16
    assert saved['ema_meta']['roles']['state_dict'] == 'average'


def test_second_stage_pipeline_is_kept(trained):
    """The safe way to add the hook keeps RTMDet's other hook."""
    _, _, log = trained
    assert 'PipelineSwitchHook' in log
    assert 'Switch pipeline now!' in log


def test_tied_head_is_averaged_once(trained):
    """RTMDet's shared head convolutions hold one average under 3 names."""
    _, work_dir, _ = trained
    weights = load(work_dir / 'epoch_4.pth')['state_dict']
    names = [f'bbox_head.cls_convs.{i}.0.conv.weight' for i in range(3)]
    pointers = {weights[name].data_ptr() for name in names}
    assert len(pointers) == 1


def test_killed_training_resumes_exactly(tools, trained):
    """A process killed in its third epoch goes on as if it had not been."""
    config, whole, _ = trained
    work_dir = tools.folder / 'killed'
    last = work_dir / 'last_checkpoint'
    tools.kill(
        tools.command('train', config, work_dir),
        work_dir,
        lambda: last.exists() and 'epoch_2' in last.read_text(),
    )
    tools.run('train', config, work_dir, '--resume')
    left, right = load(whole / 'epoch_4.pth'), load(work_dir / 'epoch_4.pth')
    assert differing(left, right) == []
    assert left['ema_meta'] == right['ema_meta']


def test_test_tool_uses_the_weights_it_is_told(tools, trained, tested):
    """'all' gives each set of weights the metrics that it has alone."""
    config, work_dir, _ = trained
    file, option = work_dir / 'epoch_4.pth', 'custom_hooks.0.evaluate=all'
    assert maps(tools.test(config, file, 'all', option)) == {
        k + end: v
        for name, end in ENDS.items()
        for k, v in tested[name].items()
    }
    boxes = {name: predictions(tools.folder / f'test_{name}') for name in ENDS}
    for name, end in ENDS.items():
        found = predictions(tools.folder / 'test_all', f'out{end}')
        assert torch.equal(found, boxes[name])
    for left, right in itertools.combinations(boxes.values(), 2):
        assert left.shape != right.shape or not torch.equal(left, right)


def predictions(folder, name='out'):
    """All predicted boxes with their scores, one row each."""
    images = pickle.loads((folder / f'{name}.pkl').read_bytes())
    rows = [
        torch.cat([p['bboxes'], p['scores'][:, None]], dim=1)
        for p in (image['pred_instances'] for image in images)
    ]
    assert len(torch.cat(rows)) > 0
    return torch.cat(rows)


def test_deployed_weights_are_the_averages(tools, trained):
    """Without the package mmdet loads the averages from the same file."""
    config, work_dir, _ = trained
    code = (
        'import sys, torch\n'
        'from mmengine.config import Config\n'
        'from mmdet.registry import MODELS\n'
        'from mmdet.utils import register_all_modules\n'
        'register_all_modules()\n'
        f'path = {str(config)!r}\n'
        'cfg = Config.fromfile(path, import_custom_modules=False)\n'
        'model = MODELS.build(cfg.model)\n'
        f'c = torch.load({str(work_dir / "epoch_4.pth")!r})\n'
        "print(model.load_state_dict(c['state_dict']))\n"
        "assert 'mmdet_ema' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert 'All keys matched successfully' in done.stdout, done.stderr


PEER = """
_base_.custom_hooks[0] = dict(
    type='MMEngineEMAHook', ema_type='mmdet.ExpMomentumEMA',
    momentum=0.01, gamma=50, update_buffers=True, priority=49)
train_cfg = dict(max_epochs=1)
"""


def test_files_of_mmengines_own_hook_are_tested_and_resumed(tools, trained):
    """On today's torch, what mmengine wrote is read: tested and resumed."""
    config, _, _ = trained
    work_dir = tools.folder / 'peer'
    tools.run('train', tools.config('peer', PEER), work_dir)
    file = work_dir / 'epoch_1.pth'
    code = f'import torch; torch.load({str(file)!r})'
    plain = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    # torch before 2.6 reads files unsafely unless asked
    refused = 'Weights only load failed' in plain.stderr
    assert refused is (needs.TORCH >= (2, 6))
    # it has none of the further averages of the config
    option = 'custom_hooks.0.evaluate=both'
    assert 'coco/bbox_mAP' in tools.test(config, file, 'peer', option)
    short = tools.config('go_on', 'train_cfg = dict(max_epochs=2)\n')
    tools.run('train', short, work_dir, '--resume')
    saved = load(work_dir / 'epoch_2.pth')
    assert saved['ema_state_dict']['steps'] == 8


def test_scalars_reach_the_visualizer(trained):
    """The local visualizer wrote raw metrics and the decay."""
    _, work_dir, _ = trained
    (path,) = work_dir.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum('ema_decay' in line for line in lines) == 16
    assert sum('coco/bbox_mAP_raw' in line for line in lines) == 4


NAMES = {name: f'digits/mAP{end}' for name, end in ENDS.items()}
SEVERAL = f"""
_base_.custom_hooks[0].update(
    averages=dict(fast=dict(decay=0.9, tau=20)), evaluate='all')
custom_imports = dict(imports=['mmdet_ema', 'tests.e2e.confidence'])
val_evaluator = dict(_delete_=True, type='Confidence')
test_evaluator = val_evaluator
default_hooks['checkpoint'].update(
    save_best={[*NAMES.values()]}, rule=['greater', 'less', 'greater'])
"""


@pytest.fixture(scope='module')
def several(tools):
    """A training that evaluates three sets: config, folder, validations."""
    config, work_dir = tools.config('several', SEVERAL), tools.folder / 'all'
    tools.run('train', config, work_dir)
    (path,) = work_dir.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return config, path, [line for line in lines if NAMES['ema'] in line]


@pytest.mark.parametrize('weights', NAMES)
def test_best_file_tests_to_the_metric_that_chose_it(tools, several, weights):
    """A run keeps a best file for each set of weights that it evaluates."""
    config, path, validations = several
    work_dir, end = path.parents[2], ENDS[weights]
    (file,) = work_dir.glob(f'best_digits_mAP{end}_epoch_?.pth')
    choose = min if weights == 'raw' else max
    chosen = choose(validations, key=lambda line: line[NAMES[weights]])
    assert file.stem[-1] == str(chosen['step'])
    assert len({chosen[name] for name in NAMES.values()}) == 3
    option = f'custom_hooks.0.evaluate={weights}'
    found = tools.test(config, file, f'best_{weights}', option)
    assert found['digits/mAP'] == chosen[NAMES[weights]]
    assert [k for k in found if 'mAP' in k] == ['digits/mAP']


CAPTURE = """
import json, runpy, sys
from matplotlib import pyplot
drawn = {}
pyplot.plot = lambda x, y, label, **_: drawn.update({label: [x, y]})
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
print(json.dumps(drawn))
"""


def test_mmdets_own_tool_plots_each_set_under_its_key(
    tools, several, tmp_path
):
    """``analyze_logs.py`` keeps what follows the last slash of a name."""
    pytest.importorskip('matplotlib')
    _, path, validations = several
    # all that the tool takes from it
    (tmp_path / 'seaborn.py').write_text('def set_style(name): pass\n')
    tool = tools.path('analysis_tools/analyze_logs')
    keys = [f'mAP{end}' for end in ENDS.values()]
    words = ['plot_curve', path, '--keys', *keys, '--legend', *keys]
    words += ['--backend', 'agg', '--out', tmp_path / 'curves.png']
    search = os.pathsep.join([str(tmp_path), environment()['PYTHONPATH']])
    done = subprocess.run(
        [sys.executable, '-c', CAPTURE, *map(str, [tool, *words])],
        capture_output=True,
        text=True,
        env={**environment(), 'PYTHONPATH': search},
    )
    assert done.returncode == 0, done.stderr
    drawn = json.loads(done.stdout.splitlines()[-1])
    assert drawn == {
        key: [[1, 2, 3, 4], [line[f'digits/{key}'] for line in validations]]
        for key in keys
    }
