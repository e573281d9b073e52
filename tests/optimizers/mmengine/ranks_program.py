"""Run on two ranks: build optimizers, return their groups.

Usage: tests.ranks.run_ranks
"""

import torch
import torch.distributed as dist
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import mmdet_ema  # noqa: F401  registers the constructor
from tests.optimizers.models import rows
from tests.ranks import main as run_main

CFG = dict(
    constructor='EMAOptimizerConstructor',
    optimizer=dict(type='SGD', lr=0.01, weight_decay=0.064),
    accumulative_counts=2,
    paramwise_cfg=dict(batch_size=4),
)


def model():
    """Return a small model with a parameter of three kinds."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)
    )


def sharded(**options):
    """Return the model in FSDP."""
    cpu = torch.device('cpu')
    return FullyShardedDataParallel(model(), device_id=cpu, **options)


def groups(wrapped):
    """Return parameter -> (group, lr, weight decay)."""
    print('BUILT', type(wrapped).__name__, flush=True)
    optimizer = build_optim_wrapper(wrapped, CFG).optimizer
    return rows(optimizer, wrapped.module)


def main(rank, count, folder):
    """Build for each wrapper; return what this rank has."""
    dist.init_process_group('gloo')
    return dict(
        ddp=groups(DistributedDataParallel(model())),
        fsdp=groups(sharded(use_orig_params=True)),
        flat=groups(sharded(use_orig_params=False)),
    )


if __name__ == '__main__':
    run_main(main)
