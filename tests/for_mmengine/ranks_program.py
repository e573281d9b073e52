"""Run by ``torchrun`` on two ranks: train with the hook, dump what was seen.

Usage: torchrun --nproc-per-node 2 \
    -m tests.for_mmengine.ranks_program KIND WORK_DIR
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.runner import FlexibleRunner

from tests.for_mmengine.toy import (
    Recorder,
    RecordingSGD,
    Run,
    Score,
    ToyModel,
    loader,
    state_of,
)

EMA = dict(type='EMAHook', schedule='constant', decay=0.9)
WRAPPER = dict(type='MMDistributedDataParallel', device_ids=None)


class Seen(Hook):
    """Keeps what the model holds during each validation."""

    def __init__(self):
        self.states = []

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == 0:
            self.states.append(state_of(runner.model.module))


def through_runner(work_dir, seen):
    """Train with ``Runner`` and ``launcher='pytorch'``."""
    run = Run(
        work_dir,
        EMA,
        seen,
        max_epochs=2,
        launcher='pytorch',
        cfg=dict(model_wrapper_cfg=WRAPPER),
    )
    run.runner.train()
    return run.recorder.start, run.records


def through_flexible_runner(work_dir, seen):
    """Train with ``FlexibleRunner`` and ``DDPStrategy``."""
    model = ToyModel()
    model.init_weights()
    optimizer = RecordingSGD(model.parameters(), lr=0.002).watch(model)
    recorder = Recorder()
    FlexibleRunner(
        model=model,
        work_dir=str(work_dir),
        strategy=dict(type='DDPStrategy', model_wrapper=WRAPPER),
        train_dataloader=loader(),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=optimizer),
        val_dataloader=loader(4, seed=1),
        val_cfg=dict(),
        val_evaluator=Evaluator([Score()]),
        custom_hooks=[EMA, seen, recorder],
    ).train()
    return recorder.start, optimizer.records


def main():
    """Train and dump start, records and what validation saw."""
    kind, work_dir = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group('gloo')
    torch.manual_seed(0)
    seen = Seen()
    train = dict(Runner=through_runner, FlexibleRunner=through_flexible_runner)
    start, records = train[kind](work_dir, seen)
    start = {k.replace('module.', '', 1): v for k, v in start.items()}
    dump = dict(start=start, records=records, seen=seen.states)
    torch.save(dump, work_dir / f'rank{os.environ["RANK"]}.pt')
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads may ask for the GIL while Python shuts down, which ends
    # in SIGABRT ("terminate called without an active exception")
    os._exit(0)
