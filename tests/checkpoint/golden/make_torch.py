"""Write golden files by other projects' own code, where it is installed.

``pip install timm ema-pytorch lightning safetensors``, then ``python -m
tests.checkpoint.golden.make_torch``; a project that is missing is left out.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.checkpoint.golden.small import HERE, Small, batches, note, train


def averaged_model():
    """Write the ``state_dict`` of torch's ``AveragedModel``."""
    model = Small()
    average = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    train(model, lambda: average.update_parameters(model))
    torch.save(average.state_dict(), HERE / 'averaged_model.pth')
    note(
        'averaged_model.pth',
        format='averaged-model',
        writer=f'torch {torch.__version__}, AveragedModel',
        real=True,
        n=int(average.n_averaged),
        ema=average.module.state_dict(),
    )


def timm_saver():
    """Write a file by timm's ``CheckpointSaver``, with its ``args``."""
    import timm
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = Small()
    average = ModelEmaV3(model, decay=0.9)
    optimizer = train(model, lambda: average.update(model))
    with tempfile.TemporaryDirectory() as folder:
        saver = CheckpointSaver(
            model,
            optimizer,
            args=argparse.Namespace(model='small', lr=0.05),
            model_ema=average,
            checkpoint_dir=folder,
            recovery_dir=folder,
        )
        saver.save_checkpoint(0, metric=0.5)
        (HERE / 'timm.pth').write_bytes(
            Path(folder, 'last.pth.tar').read_bytes()
        )
    note(
        'timm.pth',
        format='timm',
        writer=f'timm {timm.__version__}, CheckpointSaver, ModelEmaV3',
        real=True,
        n=None,
        raw=model.state_dict(),
        ema=average.module.state_dict(),
    )


def ema_pytorch():
    """Write the ``state_dict`` of ema-pytorch's ``EMA``."""
    from importlib.metadata import version

    from ema_pytorch import EMA

    model = Small()
    average = EMA(model, beta=0.9, update_after_step=0, update_every=1)
    train(model, average.update)
    torch.save(average.state_dict(), HERE / 'ema_pytorch.pth')
    note(
        'ema_pytorch.pth',
        format='ema-pytorch',
        writer=f'ema-pytorch {version("ema-pytorch")}, EMA',
        real=True,
        n=int(average.step),
        raw=model.state_dict(),
        ema=average.ema_model.state_dict(),
    )


def lightning():
    """Write a checkpoint by Lightning's trainer and ``EMAWeightAveraging``."""
    import lightning
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import (
        EMAWeightAveraging,
        ModelCheckpoint,
    )

    class Model(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Small()

        def training_step(self, batch, index):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    kept = {}

    class Keep(ModelCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            super()._save_checkpoint(trainer, filepath)
            kept['raw'] = copy.deepcopy(trainer.model.state_dict())
            averaged = average._average_model
            kept['ema'] = copy.deepcopy(averaged.module.state_dict())
            kept['n'] = int(averaged.n_averaged)

    data = [x for batch in batches() for x in batch]
    average = EMAWeightAveraging(decay=0.9)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            accelerator='cpu',
            callbacks=[average, Keep(folder, filename='last')],
            logger=False,
            enable_progress_bar=False,
            default_root_dir=folder,
        )
        loader = torch.utils.data.DataLoader(data, batch_size=4)
        trainer.fit(Model(), loader)
        (HERE / 'lightning.ckpt').write_bytes(
            Path(folder, 'last.ckpt').read_bytes()
        )
    note(
        'lightning.ckpt',
        format='lightning',
        writer=f'lightning {lightning.__version__}, EMAWeightAveraging',
        real=True,
        n=kept['n'],
        raw=kept['raw'],
        ema=kept['ema'],
    )


def safetensors_file():
    """Write a file by the library of safetensors, tied names and all."""
    import safetensors
    from safetensors.torch import save_model

    model = Small()
    train(model, lambda: None)
    save_model(model, str(HERE / 'plain.safetensors'))
    note(
        'plain.safetensors',
        format='plain',
        writer=f'safetensors {safetensors.__version__}, save_model',
        real=True,
        n=None,
        weights=None,
    )


def main():
    """Write what can be written here."""
    makers = (
        averaged_model,
        timm_saver,
        ema_pytorch,
        lightning,
        safetensors_file,
    )
    for make in makers:
        try:
            make()
        except ImportError as error:
            print(f'{make.__name__}: left out ({error})')


if __name__ == '__main__':
    main()
