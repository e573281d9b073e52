"""Write golden files by the hooks of mmcv 1.x and mmdet 2, and by ours.

Run in a stack of mmcv 1.x: ``python -m tests.checkpoint.golden.make_mmcv1``.
"""

import logging
import shutil
import tempfile

import mmcv
import mmdet
import torch
from mmcv.runner import EpochBasedRunner, IterBasedRunner
from mmcv.runner.hooks.ema import EMAHook as MMCVEMAHook
from mmdet.core.hook.ema import ExpMomentumEMAHook
from torch.utils.data import DataLoader

from tests.checkpoint.golden.small import HERE, Small, batches, note


class Model(Small):
    """The small model as mmcv trains it."""

    def train_step(self, data, optimizer, **kwargs):
        """Return the loss."""
        loss = self(data).square().mean()
        return dict(loss=loss, log_vars=dict(), num_samples=4)


def run(hook, name, by_epoch=True, priority=49):
    """Train with a hook, and keep the last file."""
    data = [x for batch in batches() for x in batch]
    model = Model()
    with tempfile.TemporaryDirectory() as folder:
        kind = EpochBasedRunner if by_epoch else IterBasedRunner
        runner = kind(
            model,
            optimizer=torch.optim.SGD(model.parameters(), 0.05, 0.9),
            work_dir=folder,
            logger=logging.getLogger('golden'),
            meta=dict(CLASSES=('a', 'b'), PALETTE=[(1, 2, 3), (4, 5, 6)]),
            **(dict(max_epochs=1) if by_epoch else dict(max_iters=7)),
        )
        runner.register_training_hooks(
            dict(policy='fixed'),
            optimizer_config=dict(grad_clip=None),
            checkpoint_config=dict(interval=1 if by_epoch else 7),
        )
        runner.register_hook(hook, priority=priority)
        runner.run([DataLoader(data, batch_size=4)], [('train', 1)])
        last = 'epoch_1.pth' if by_epoch else 'iter_7.pth'
        shutil.copy(f'{folder}/{last}', HERE / name)
    return model


def halves(model, in_model_is):
    """Return raw weights and averages: one is in the model, one beside."""
    state = model.state_dict()
    plain = {k: x for k, x in state.items() if not k.startswith('ema_')}
    held = {
        k: state.get('ema_' + k.replace('.', '_'), x) for k, x in plain.items()
    }
    return (plain, held) if in_model_is == 'raw' else (held, plain)


def main():
    """Write a file of each hook, by epoch and by iteration."""
    hooks = {
        'mmdet2': (
            lambda: ExpMomentumEMAHook(momentum=0.1, total_iter=3),
            f'mmdet {mmdet.__version__}, ExpMomentumEMAHook',
        ),
        'mmcv1': (
            lambda: MMCVEMAHook(momentum=0.1, warm_up=1),
            f'mmcv {mmcv.__version__}, EMAHook',
        ),
    }
    for name, (make, writer) in hooks.items():
        for by_epoch in (True, False):
            file = f'{name}_epoch_1.pth' if by_epoch else f'{name}_iter_7.pth'
            model = run(make(), file, by_epoch)
            # mmcv swaps after an epoch; by iterations never
            raw, ema = halves(model, 'ema' if by_epoch else 'raw')
            note(
                *(file,),
                format=name,
                writer=writer,
                real=True,
                n=7,
                raw=raw,
                ema=ema,
            )
    import mmdet_ema

    hook = mmdet_ema.EMAHook(decay=0.9, tau=3)
    model = run(hook, 'mmdet_ema_mmcv1.pth')
    note(
        'mmdet_ema_mmcv1.pth',
        format='mmdet_ema',
        writer=f'mmdet_ema {mmdet_ema.__version__} on mmcv {mmcv.__version__}',
        real=True,
        n=7,
        raw=model.state_dict(),
        ema=dict(hook._life.averager.named_averages()),
    )


if __name__ == '__main__':
    main()
