"""``mmdet-ema train`` of RTMDet under ZeRO-3, on two real ranks."""

import json
import subprocess
import sys

import pytest
import torch

from tests.e2e.conftest import environment, load

pytest.importorskip('deepspeed')
SHARDED = """
runner_type = 'FlexibleRunner'
strategy = dict(
    type='DeepSpeedStrategy',
    config=dict(zero_allow_untested_optimizer=True),
    train_micro_batch_size_per_gpu=4,
    zero_optimization=dict(
        stage=3, stage3_param_persistence_threshold=1000))
optim_wrapper = dict(type='DeepSpeedOptimWrapper')
train_cfg = dict(max_epochs=2)
# torch's synchronized BatchNorm wants a GPU
model.update(use_syncbn=False)
_base_.custom_hooks[0].update(evaluate='both', decay=0.9, tau=2)
custom_imports = dict(imports=[
    'mmdet_ema', 'tests.e2e.confidence', 'tests.e2e.cpu_deepspeed'])
val_evaluator = dict(_delete_=True, type='Confidence')
test_evaluator = val_evaluator
"""


@pytest.fixture(scope='module')
def sharded(tools):
    """A finished training on two ranks: its config and work folder."""
    config = tools.config('zero', SHARDED)
    folder = tools.folder / 'zero'
    words = ['--nproc_per_node', 2, '--standalone', '-m', 'mmdet_ema']
    words += ['train', config, '--launcher', 'pytorch', '--work-dir', folder]
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', *map(str, words)],
        cwd=tools.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return config, folder


def test_one_process_tests_to_the_last_validation(tools, sharded):
    """The same config without DeepSpeed: the same metric from one file."""
    config, folder = sharded
    (path,) = folder.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    last = [line for line in lines if 'digits/mAP' in line][-1]
    file = folder / 'epoch_2.pth' / 'ema.pth'
    metrics = tools.test(config, file, 'zero', 'runner_type=Runner')
    assert last['digits/mAP'] != last['digits/mAP_raw']
    # sums of float32 in another order
    expected = pytest.approx(last['digits/mAP'], rel=1e-4)
    assert expected == metrics['digits/mAP']


def test_file_is_whole(tools, sharded, trained):
    """The names, kinds and shapes of a file of one process."""
    file = load(sharded[1] / 'epoch_2.pth' / 'ema.pth')
    one = load(trained[1] / 'epoch_2.pth')
    for part in ('state_dict', 'ema_state_dict'):
        left, right = (
            {k: (x.dtype, x.shape) for k, x in each[part].items()}
            for each in (file, one)
        )
        assert [*left.items()] == [*right.items()]
    assert not any(
        torch.equal(x, file['ema_state_dict'][f'module.{k}'])
        for k, x in file['state_dict'].items()
        if k.endswith('conv.weight')
    )
