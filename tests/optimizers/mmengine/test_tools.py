"""The config that shows the constructor, through mmdet 3's own tools."""

import pytest
import torch

from tests.e2e.conftest import ROOT, tools  # noqa: F401  a fixture

pytestmark = pytest.mark.e2e
CONFIG = ROOT / 'configs/yolox/yolox_tiny_ema-optim_8xb8-300e_coco.py'
SMALL = """
_base_ = {config!r}
model = dict(
    data_preprocessor=dict(batch_augments=None),
    backbone=dict(widen_factor=0.25, deepen_factor=0.167),
    neck=dict(in_channels=[64, 128, 256], out_channels=32),
    bbox_head=dict(num_classes=10, in_channels=32, feat_channels=32))
digits = dict(data_root={data!r}, metainfo=dict(classes=[*'0123456789']))
resize = dict(type='Resize', scale=(64, 64), keep_ratio=True)
loader = dict(batch_size=8, num_workers=0, persistent_workers=False)
train_dataloader = dict(**loader, dataset=dict(
    dataset=dict(
        ann_file='annotations/train.json', data_prefix=dict(img='train/'),
        **digits),
    pipeline=[resize, dict(type='PackDetInputs')]))
val_dataloader = val_cfg = val_evaluator = None
test_dataloader = test_cfg = test_evaluator = None
train_cfg = dict(_delete_=True, by_epoch=True, max_epochs=3)
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=1))
optim_wrapper = dict(accumulative_counts=2)
_base_.custom_hooks[-1].update(warmup_iters=4)
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
    log = tools.run('train', config, work_dir)
    for text in (
        'EMAOptimizerConstructor: SGD, ',
        'weight decay x 0.25 for 16 samples a step (nominal 64)',
        'BiasWarmupHook: 4 iterations; lr of biases from 0.1',
        'step_lr: 2.5000e-03 bias_lr: 7.7500e-02',
    ):
        assert 1 == log.count(text), text
    for text in ('warms up the lr as well', 'NOT scaled', 'no parameter'):
        assert text not in log
    (work_dir / 'epoch_3.pth').unlink()
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_2.pth'))
    log = tools.run('train', config, work_dir, '--resume')
    assert 'weight decay x' not in log
    for epoch in (2, 3):
        file = work_dir / f'epoch_{epoch}.pth'
        state = torch.load(file, weights_only=True)['optimizer']
        found = {g['name']: g['weight_decay'] for g in state['param_groups']}
        assert dict(weight=5e-4 / 4, norm=0, bias=0) == found
