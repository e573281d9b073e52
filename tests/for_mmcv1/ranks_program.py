"""Run on two ranks: train with mmcv, dump what was seen.

Usage: python -m tests.for_mmcv1.ranks_program FOLDER SPEC...
with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from mmcv.parallel import MMDistributedDataParallel
from mmcv.runner import DistEvalHook
from torch import nn

from tests.collectives import CALLS, count_collectives
from tests.for_mmcv1.toy import Run, ToyModel, loader


class Model(ToyModel):
    """gloo reduces no bfloat16."""

    def __init__(self):
        super().__init__()
        self.low = nn.Parameter(torch.ones(4))


def options_of(spec):
    """Options of a run, by the words of its test."""
    by_epoch = 'iters' not in spec
    runner = dict(max_epochs=2)
    if 'runner' in spec:
        runner = dict(type='IterBasedRunner', max_iters=8)
    best = dict(save_best='score', rule='greater')
    return dict(
        runner=runner,
        evaluation=dict(
            kind=DistEvalHook,
            interval=1 if by_epoch else 3,
            by_epoch=by_epoch,
            **best,
        ),
        checkpoint=dict(interval=1, by_epoch=by_epoch),
    )


def hook_of(spec):
    """The EMA hook of a run, by the words of its test."""
    hook = dict(type='EMAHook', decay=0.9, tau=3)
    for word in spec.split(','):
        if word in ('VERY_HIGH', 'VERY_LOW'):
            hook['priority'] = word
        if word == 'both':
            hook['evaluate'] = word
    return hook


def train(spec, work_dir):
    """Train and dump start, records and what evaluations saw."""
    rank, before = dist.get_rank(), len(CALLS)
    model = Model()
    run = Run(
        work_dir,
        *([] if 'plain' in spec else [hook_of(spec)]),
        model=model,
        wrapped=MMDistributedDataParallel(model, broadcast_buffers=False),
        loader=loader(seed=rank),
        **options_of(spec),
    ).train()
    seen = dict(
        calls=len(CALLS) - before,
        start=run.recorder.start,
        records=run.records,
        seen=run.recorder.seen,
    )
    torch.save(seen, work_dir / f'rank{rank}.pt')


def main():
    """Train with each spec, one after the other."""
    time.sleep = lambda seconds: None
    count_collectives()
    dist.init_process_group('gloo')
    for spec in sys.argv[2:]:
        train(spec, Path(sys.argv[1], spec))
    dist.barrier()


if __name__ == '__main__':
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    # torch's threads may abort Python's shutdown
    os._exit(0)
