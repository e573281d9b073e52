"""Run as one of several ranks: train with ``FSDP2Strategy``.

Usage: python -m tests.for_mmengine.shards_program RANK RANKS FOLDER SPEC...
with MASTER_ADDR and MASTER_PORT in the environment; a SPEC is a folder, the
number of epochs and the file that is resumed, if any: NAME:EPOCHS[:FILE].
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.runner import FlexibleRunner
from torch import nn

from tests.for_mmengine.toy import Score, ToyModel, loader

EMA = dict(
    type='EMAHook',
    decay=0.9,
    tau=3,
    evaluate='all',
    averages=dict(fast=dict(decay=0.5, tau=1)),
)
LOW = dict(
    param_dtype='bfloat16', float32=['head'], reshard_after_forward=False
)
BATCH = 12  # of all ranks together


class Model(ToyModel):
    """Statistics that stand still: they differ by the number of ranks."""

    def __init__(self):
        super().__init__()
        self.low = nn.Parameter(torch.ones(4))

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


class Recorder(Hook):
    """Gathers the raw weights before and after every step, and metrics."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.raws, self.metrics = [], []

    def before_train(self, runner):
        self.raws.append(gathered(runner.model))

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        self.raws.append(gathered(runner.model))
        Recorder.parts = [
            getattr(x, '_local_tensor', x).detach().clone()
            for x in runner.model.parameters()
        ]

    def after_val_epoch(self, runner, metrics=None):
        self.metrics.append(dict(metrics))


def gathered(model):
    """The raw weights, whole."""
    return {
        name: getattr(x, 'full_tensor', x.clone)().detach().clone()
        for name, x in model.state_dict().items()
    }


class Failing(Score):
    """Fails on rank 1, in the pass on the main averages."""

    calls = 0

    def process(self, data_batch, data_samples):
        self.calls += 1
        if self.calls == 3 and dist.get_rank() == 1:
            raise RuntimeError('planted')
        super().process(data_batch, data_samples)


def fail(folder, strategy):
    """Return what each rank says of it, and what differs in its weights."""
    model = Model()
    try:
        train(
            folder,
            1,
            ranks=2,
            model=model,
            metric=Failing(),
            launcher='pytorch',
            strategy=strategy,
        )
    except RuntimeError as error:
        # it was kept after the last step
        parts = [x._local_tensor for x in model.parameters()]
        pairs = zip(parts, Recorder.parts)
        return str(error), [
            i for i, x in enumerate(pairs) if not torch.equal(*x)
        ]


def train(
    folder, epochs, resume=None, ranks=1, model=None, metric=None, **options
):
    """Train; return what was recorded."""
    recorder = Recorder()
    counts = 2 if folder.name == 'accumulated' else 1
    runner = FlexibleRunner(
        model=model or Model(),
        work_dir=str(folder),
        train_dataloader=loader(48, BATCH // ranks),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=0.01),
            clip_grad=dict(max_norm=0.5),
            accumulative_counts=counts,
        ),
        param_scheduler=dict(type='ExponentialLR', gamma=0.9, end=9),
        val_dataloader=loader(4, 2, seed=1),
        val_cfg=dict(),
        val_evaluator=Evaluator([metric or Score()]),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        custom_hooks=[EMA, recorder],
        resume=resume or False,
        **options,
    )
    runner.train()
    hub = runner.message_hub
    scalars = {
        name: hub.get_scalar(f'train/{name}').data[0].tolist()
        for name in ('ema_distance', 'grad_norm')
    }
    return dict(raws=recorder.raws, metrics=recorder.metrics, **scalars)


def refused(folder):
    """Return what is said of mmengine's strategy for FSDP1."""
    wrapper = dict(
        type='MMFullyShardedDataParallel', device_id=torch.device('cpu')
    )
    strategy = dict(type='FSDPStrategy', model_wrapper=wrapper)
    try:
        train(folder, 1, ranks=2, launcher='pytorch', strategy=strategy)
    except ValueError as error:
        return str(error)


def main(rank, ranks, folder, *specs):
    """Train with each spec, one after the other; dump what was seen."""
    time.sleep = lambda seconds: None
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks)
    )
    found = {}
    for spec in specs:
        name, epochs, *file = spec.split(':')
        found[name] = train(
            folder / name,
            int(epochs),
            str(folder / file[0]) if file else None,
            ranks,
            launcher='pytorch',
            strategy=dict(
                type='FSDP2Strategy',
                shard=['head'],
                **(LOW if name == 'low' else {}),
            ),
        )
    found['refused'] = refused(folder / 'refused')
    if specs[0].startswith('whole'):
        # last of all: where one rank stops, the other is told by gloo
        found['failed'] = fail(
            folder / 'failed', dict(type='FSDP2Strategy', shard=['head'])
        )
    torch.save(found, folder / f'rank{rank}.pt')


if __name__ == '__main__':
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
    sys.stdout.flush()
    sys.stderr.flush()
    # threads of gloo may outlive Python's shutdown
    os._exit(0)
