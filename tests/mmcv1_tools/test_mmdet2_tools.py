"""``tools/train.py``, resuming and ``tools/test.py`` of mmdet 2."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests import oracle
from tests.e2e.conftest import environment
from tests.mmcv1_tools.conftest import (
    EPOCHS,
    RECORD,
    STEPS,
    check_against_the_formula,
    differing,
    load,
)

pytestmark = pytest.mark.e2e

# a float32 average takes one rounding of 6e-8 a step
NO_HOOK = 'custom_hooks = []\ncustom_imports = None\n'
OPTIMIZER = """
custom_hooks.append(dict(type='BiasWarmupHook', priority='NORMAL'))
optimizer = dict(constructor='EMAOptimizerConstructor')
"""


def last(work_dir):
    """Read the last checkpoint of a training."""
    return load(work_dir / f'epoch_{EPOCHS}.pth')


def test_plain_keys_are_the_averages(trained):
    """The plain keys hold the formula's average, the EMA part the raw."""
    _, work_dir, _ = trained
    rows = torch.load(work_dir / 'recorded.pt')
    assert all(len(row) == STEPS + 1 for row in rows.values())
    saved = last(work_dir)
    assert saved['ema_state_dict']['steps'] == STEPS
    check_against_the_formula(saved, rows)


def test_averages_have_left_the_raw_weights(trained):
    """Averages and raw weights differ, or the comparison says nothing."""
    _, work_dir, _ = trained
    saved = last(work_dir)
    name = 'bbox_head.atss_cls.weight'
    average = saved['state_dict'][name]
    raw = saved['ema_state_dict'][f'module.{name}']
    assert (average - raw).abs().max() > 1e-4


def test_file_has_no_key_beside_the_model(trained):
    """No ``ema_*`` key is in ``state_dict``: it is what the model has."""
    _, work_dir, _ = trained
    weights = last(work_dir)['state_dict']
    assert [name for name in weights if 'ema_' in name] == []
    names = {name for name, _ in torch.load(work_dir / 'recorded.pt').items()}
    counters = {n for n in weights if n.endswith('num_batches_tracked')}
    assert set(weights) == names | counters


INIT = """
import sys
sys.modules['mmdet_ema'] = None  # an import raises ImportError
import torch
from mmcv import Config
from mmdet.apis import inference_detector, init_detector
file, picture = sys.argv[1:]
text = torch.load(file, map_location='cpu')['meta']['config']
model = init_detector(Config.fromstring(text, '.py'), file, device='cpu')
print(len(inference_detector(model, picture)))
"""


def test_config_in_the_file_needs_nothing_of_the_package(tools, trained):
    """It builds the model where the package is not; the run's is kept."""
    _, work_dir, _ = trained
    file = work_dir / f'epoch_{EPOCHS}.pth'
    meta = load(file)['meta']
    assert 'mmdet_ema' not in meta['config']
    assert "type='EMAHook'" not in meta['config']
    assert "'mmdet_ema'" in meta['training_cfg']
    picture = next((tools.data / 'val').iterdir())
    done = subprocess.run(
        [sys.executable, '-c', INIT, file, picture],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1:] == ['10'], done.stderr[-2000:]


def test_file_deploys_as_it_is(tools, trained):
    """Without the package ``tools/test.py`` tests the averages, silently."""
    _, work_dir, _ = trained
    config = tools.config('plain', NO_HOOK)
    file = work_dir / f'epoch_{EPOCHS}.pth'
    metrics, printed = tools.test(config, file, 'plain')
    assert 'unexpected key' not in printed
    assert 'missing keys' not in printed
    assert 'mmdet_ema' not in printed
    assert {k: metrics[k] for k in validation(work_dir)} == validation(
        work_dir
    )


def validation(work_dir, end=''):
    """Metrics of the last validation, as they were logged."""
    (path,) = work_dir.glob('*.log.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (line,) = [x for x in lines if x.get('mode') == 'val'][-1:]
    names = ('bbox_mAP', 'bbox_mAP_50', 'bbox_mAP_75')
    return {name: line[name + end] for name in names}


def test_training_reports_and_logs(trained):
    """The report, the decay and the raw metrics are in the log."""
    _, work_dir, log = trained
    assert 'EMA: exponential(decay=0.9, tau=5' in log
    assert f'steps: {STEPS} planned' in log
    (path,) = work_dir.glob('*.log.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    train = [line for line in lines if line.get('mode') == 'train']
    found = [line['ema_decay'] for line in train]
    expected = [oracle.ramp(n, 0.9, 5) for n in range(1, STEPS + 1)]
    # the log has five digits
    assert np.allclose(found, expected, rtol=0, atol=1e-5)
    assert sum('bbox_mAP_raw' in line for line in lines) == EPOCHS


def test_resumed_training_equals_the_uninterrupted_one(tools, trained):
    """The second half, resumed from a file in between, ends as the whole."""
    config, whole, _ = trained
    part = tools.folder / 'part'
    log = tools.train(config, part, '--resume-from', whole / 'epoch_2.pth')
    assert 'unexpected key' not in log
    left, right = last(whole), last(part)
    assert differing(left, right) == []
    assert left['ema_meta'] == right['ema_meta']


def test_killed_training_resumes_exactly(tools, trained):
    """A process killed in its third epoch goes on as if it had not been."""
    config, whole, _ = trained
    work_dir = tools.folder / 'killed'
    words = ('--seed', 0, '--gpu-ids', 0)
    tools.kill(
        tools.command('train', config, work_dir, *words),
        work_dir,
        (work_dir / 'epoch_2.pth').exists,
    )
    tools.train(config, work_dir, '--auto-resume')
    assert differing(last(whole), last(work_dir)) == []


def test_half_written_files_are_never_resumed(trained):
    """Nothing but whole checkpoints is left in the folder of a training."""
    _, work_dir, _ = trained
    names = {path.name for path in work_dir.glob('*.pth*')}
    epochs = {f'epoch_{n}.pth' for n in range(1, EPOCHS + 1)}
    assert names == {*epochs, 'latest.pth'}


ITERATIONS = """
runner = dict(_delete_=True, type='IterBasedRunner', max_iters={iterations})
evaluation = dict(interval=4)
checkpoint_config = dict(by_epoch=False, interval=4)
workflow = [('train', 1)]
"""


def train_iterations(tools, name, iterations):
    """Train, or go on, for a number of iterations; return the folder."""
    settings = RECORD + ITERATIONS.format(iterations=iterations)
    config = tools.config(f'{name}_{iterations}', settings)
    tools.train(config, tools.folder / name, '--auto-resume')
    return tools.folder / name


def test_iterations_instead_of_epochs(tools):
    """IterBasedRunner's file holds averages, resumed or not the same.

    mmcv alone counts one iteration too few in such a file, and repeats it.
    """
    whole = train_iterations(tools, 'iterations', STEPS)
    train_iterations(tools, 'iterations_in_parts', STEPS // 2)
    part = train_iterations(tools, 'iterations_in_parts', STEPS)
    left, right = (load(x / f'iter_{STEPS}.pth') for x in (whole, part))
    check_against_the_formula(left, torch.load(whole / 'recorded.pt'))
    assert left['ema_state_dict']['steps'] == STEPS
    assert differing(left, right) == []


def test_hook_and_optimizer_constructor_in_one_config(tools):
    """One ``custom_imports`` is enough for hook and constructor."""
    work_dir = tools.folder / 'optimizer'
    config = tools.config('optimizer', RECORD + OPTIMIZER)
    log = tools.train(config, work_dir)
    assert 'EMA: exponential(decay=0.9, tau=5' in log
    saved = last(work_dir)
    check_against_the_formula(saved, torch.load(work_dir / 'recorded.pt'))
    decays = {
        weight_decay
        for group in saved['optimizer']['param_groups']
        for weight_decay in [group['weight_decay']]
    }
    # 0.05 is meant for 64 samples a step; these steps have 4
    assert decays == {0.0, 0.05 * 4 / 64}
