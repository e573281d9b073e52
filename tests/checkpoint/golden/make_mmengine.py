"""Write golden files by mmengine's runner: its hook, and ours.

Run in a stack with mmengine:
``python -m tests.checkpoint.golden.make_mmengine``.
"""

import shutil
import tempfile

import mmengine
from mmengine.hooks import EMAHook as MMEngineEMAHook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from tests.checkpoint.golden.small import HERE, Small, batches, note


class Model(BaseModel):
    """The small model as mmengine trains it."""

    def __init__(self):
        super().__init__()
        for name, module in Small().named_children():
            setattr(self, name, module)

    def forward(self, inputs, mode='tensor'):
        """Return the loss, or outputs."""
        out = Small.forward(self, inputs)
        return dict(loss=out.square().mean()) if mode == 'loss' else [out]


class Data(list):
    """A data set with class names and colours."""

    @property
    def metainfo(self):
        """Return what detection data sets do."""
        return dict(classes=('a', 'b'), palette=[(1, 2, 3), (4, 5, 6)])


def run(hook, name):
    """Train with a hook, and keep the last file."""
    data = Data(dict(inputs=x) for batch in batches() for x in batch)
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            Model(),
            work_dir=folder,
            train_dataloader=DataLoader(data, batch_size=4),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(
                optimizer=dict(type='SGD', lr=0.05, momentum=0.9)
            ),
            default_hooks=dict(logger=None),
            custom_hooks=[hook],
            experiment_name='golden',
        )
        runner.train()
        shutil.copy(f'{folder}/epoch_1.pth', HERE / name)
    return runner.model.state_dict()


def main():
    """Write both files."""
    hook = MMEngineEMAHook(momentum=0.1)
    raw = run(hook, 'mmengine.pth')
    note(
        'mmengine.pth',
        format='mmengine',
        writer=f'mmengine {mmengine.__version__}, EMAHook',
        real=True,
        n=int(hook.ema_model.steps),
        raw=raw,
        ema=hook.ema_model.module.state_dict(),
    )
    import mmdet_ema

    fast = dict(fast=dict(decay=0.5, tau=1))
    hook = mmdet_ema.EMAHook(decay=0.9, tau=3, averages=fast)
    raw = run(hook, 'mmdet_ema.pth')
    note(
        'mmdet_ema.pth',
        format='mmdet_ema',
        writer=f'mmdet_ema {mmdet_ema.__version__} on mmengine',
        real=True,
        n=7,
        raw=raw,
        ema=dict(hook._life.averager.named_averages()),
    )


if __name__ == '__main__':
    main()
