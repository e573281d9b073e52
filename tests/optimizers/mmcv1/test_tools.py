"""The config that shows the constructor, through mmdet 2's own tools."""

import pytest
import torch

from tests.e2e.conftest import ROOT, tools  # noqa: F401  a fixture

pytestmark = pytest.mark.e2e
CONFIG = ROOT / 'configs/yolox_mmdet2/yolox_tiny_ema-optim_8x8_300e_coco.py'
SMALL = """
_base_ = {config!r}
model = dict(
    input_size=(64, 64), random_size_range=(2, 2),
    backbone=dict(widen_factor=0.25, deepen_factor=0.167),
    neck=dict(in_channels=[64, 128, 256], out_channels=32),
    bbox_head=dict(num_classes=10, in_channels=32, feat_channels=32))
pipeline = [
    dict(type='Resize', img_scale=(64, 64), keep_ratio=True),
    dict(type='RandomFlip', flip_ratio=0.0),
    dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_bboxes', 'gt_labels'])]
data = dict(
    samples_per_gpu=8, workers_per_gpu=0, persistent_workers=False,
    train=dict(pipeline=pipeline, dataset=dict(
        ann_file={data!r} + 'annotations/train.json',
        img_prefix={data!r} + 'train/', classes=[*'0123456789'])))
runner = dict(max_epochs=3)
workflow = [('train', 1)]
checkpoint_config = dict(interval=1)
log_config = dict(interval=1)
optimizer_config = dict(
    type='GradientCumulativeOptimizerHook', cumulative_iters=2)
custom_hooks = [dict(type='EMAHook'),
                dict(type='BiasWarmupHook', warmup_iters=4)]
device = 'cpu'
"""


@pytest.fixture(scope='module')
def config(tools):  # noqa: F811
    """Write the config of a small run."""
    path = tools.folder / 'optim.py'
    path.write_text(SMALL.format(config=str(CONFIG), data=f'{tools.data}/'))
    return path


def test_train_and_resume(tools, config):  # noqa: F811
    """Training says and does what the config asks; resume scales once."""
    work_dir = tools.folder / 'optim'
    words = ('--gpu-ids', 0, '--no-validate')
    log = tools.run('train', config, work_dir, *words)
    for text in (
        'mmdet - INFO - EMAOptimizerConstructor: SGD, ',
        'weight decay x 0.25 for 16 samples a step (nominal 64)',
        'BiasWarmupHook: 4 iterations; lr of biases from 0.1',
    ):
        assert 1 == log.count(text), text
    for text in ('warms up the lr as well', 'NOT scaled', 'no parameter'):
        assert text not in log
    last = work_dir / 'epoch_2.pth'
    log = tools.run('train', config, work_dir, *words, '--resume-from', last)
    assert 'weight decay x' not in log
    for epoch in (2, 3):
        file = work_dir / f'epoch_{epoch}.pth'
        state = torch.load(file)['optimizer']
        found = {g['name']: g['weight_decay'] for g in state['param_groups']}
        assert dict(weight=5e-4 / 4, norm=0, bias=0) == found
