"""The warm-up where mmengine has more than mmcv 1.x."""

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import FlexibleRunner

from tests import needs
from tests.for_mmengine.toy import ToyModel, loader
from tests.optimizers.steps import SGD, seen
from tests.optimizers.toy import Training

WARMUP = dict(type='BiasWarmupHook', warmup_iters=10)


@OPTIM_WRAPPERS.register_module(force=True)
class ScaledWrapper(OptimWrapper):
    """mmengine's ``AmpOptimWrapper`` with a scaler that runs on CPU."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=4.0)

    def backward(self, loss, **kwargs):
        self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs):
        self.loss_scaler.unscale_(self.optimizer)
        self._clip_grad()
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update()


@needs.cpu_scaler
def test_gradient_scaler(tmp_path):
    """With the scaler of mixed precision each step is warmed as well."""
    options = dict(epochs=4, schedule='cosine')
    plain = Training(tmp_path / 'plain', WARMUP, **options).train()
    options.update(type='ScaledWrapper')
    scaled = Training(tmp_path / 'amp', WARMUP, **options).train()
    assert seen(plain.optimizer, 'lr') == seen(scaled.optimizer, 'lr')


def test_flexible_runner(tmp_path):
    """``FlexibleRunner`` has the same steps as ``Runner``."""
    plain = Training(tmp_path / 'plain', WARMUP).train()
    flexible = FlexibleRunner(
        model=ToyModel(),
        work_dir=str(tmp_path / 'flexible'),
        train_dataloader=loader(),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(
            constructor='EMAOptimizerConstructor', optimizer=dict(SGD)
        ),
        param_scheduler=dict(type='ConstantLR', factor=1.0),
        custom_hooks=[WARMUP],
    )
    flexible.train()
    for option in ('lr', 'momentum', 'weight_decay'):
        assert seen(plain.optimizer, option) == seen(
            flexible.optim_wrapper.optimizer, option
        )
