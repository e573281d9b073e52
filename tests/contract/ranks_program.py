"""Run on two ranks: train, dump what was seen.

Usage: tests.ranks.run_ranks, with words of each run, joined by commas.
"""

import time

import torch
import torch.distributed as dist
from torch import nn

from mmdet_ema.checkpoint import start as start_file
from mmdet_ema.training import lifecycle
from tests.collectives import CALLS, count_collectives
from tests.conftest import MMCV1
from tests.contract.toy import (
    EMA,
    Hook,
    RecordingSGD,
    Spoil,
    state_of,
    toy,
)
from tests.ranks import main as run_main

if MMCV1:
    from mmcv.parallel import MMDistributedDataParallel
    from mmcv.runner import DistEvalHook
else:
    from mmengine.evaluator import Evaluator
    from mmengine.runner import FlexibleRunner


# what posthoc=True did with the file of the starting weights
STARTS = []


def watch_start_files():
    write, is_there = start_file.write_whole, lifecycle.is_there

    def write_and_keep(path, content):
        STARTS.append('written')
        write(path, content)

    def look_and_keep(path, found):
        STARTS.append('found' if is_there(path, found) else 'not found')
        return STARTS[-1] == 'found'

    start_file.write_whole = write_and_keep
    lifecycle.is_there = look_and_keep


class Model(toy.ToyModel):
    """gloo reduces no bfloat16."""

    def __init__(self):
        super().__init__()
        self.low = nn.Parameter(torch.ones(4))


class Plant(Hook):
    """Changes a weight on one rank."""

    def before_train_iter(self, runner, batch_idx=0, data_batch=None):
        if runner.iter == 1 and dist.get_rank() == 1:
            runner.model.module.head.bias.data[0] += 1


def train_with_mmcv(words, hooks, folder, resume=None):
    by_epoch = 'iters' not in words
    runner = dict(max_epochs=3 if resume else 2)
    if 'runner' in words:
        runner = dict(type='IterBasedRunner', max_iters=8)
    model = Model()
    run = toy.Run(
        folder,
        *hooks,
        model=model,
        wrapped=MMDistributedDataParallel(model, broadcast_buffers=False),
        loader=toy.loader(seed=dist.get_rank()),
        runner=runner,
        evaluation=dict(
            kind=DistEvalHook,
            interval=1 if by_epoch else 3,
            by_epoch=by_epoch,
            save_best='score',
            rule='greater',
        ),
        checkpoint=dict(interval=1, by_epoch=by_epoch),
    ).train(resume)
    return run.recorder.start, run.records, run.recorder.seen


class Seen(Hook):
    """Keeps what the model holds during each validation."""

    def __init__(self, optimizer=None):
        self.optimizer, self.states = optimizer, []

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == 0:
            steps = len(self.optimizer.records)
            self.states.append((steps, state_of(runner.model.module)))


def train_with_mmengine(words, hooks, folder, resume=None):
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
    seen, data = Seen(), toy.loader(32)
    if 'flexible' not in words:
        run = toy.Run(
            folder,
            *hooks,
            seen,
            model=Model(),
            train_dataloader=data,
            launcher='pytorch',
            cfg=dict(model_wrapper_cfg=wrapper),
            load_from=resume and str(resume),
            resume=resume is not None,
            max_epochs=3 if resume else 2,
        )
        seen.optimizer = run.optimizer
        run.train()
        recorder, records = run.recorder, run.records
    else:
        model, recorder = Model(), toy.Recorder()
        model.init_weights()
        optimizer = RecordingSGD(model.parameters(), lr=0.002).watch(model)
        seen.optimizer, records = optimizer, optimizer.records
        FlexibleRunner(
            model=model,
            work_dir=str(folder),
            strategy=dict(type='DDPStrategy', model_wrapper=wrapper),
            train_dataloader=data,
            train_cfg=dict(by_epoch=True, max_epochs=2),
            optim_wrapper=dict(optimizer=optimizer),
            val_dataloader=toy.loader(4, seed=1),
            val_cfg=dict(),
            val_evaluator=Evaluator([toy.Score()]),
            custom_hooks=[*hooks, seen, recorder],
        ).train()
    start = {k.replace('module.', '', 1): v for k, v in recorder.start.items()}
    return start, records, seen.states


def main(rank, count, folder, *specs):
    """Train with each spec, one after the other; return what was seen."""
    time.sleep = lambda seconds: None
    count_collectives()
    watch_start_files()
    dist.init_process_group('gloo')
    train = train_with_mmcv if MMCV1 else train_with_mmengine
    found = {}
    for spec in specs:
        words, before = spec.split(','), len(CALLS)
        STARTS.clear()
        hook = dict(EMA, evaluate='both' if 'both' in words else 'ema')
        priority = [word for word in words if word.isupper()]
        if priority:
            hook['priority'] = priority[0]
        hooks = [] if 'plain' in words else [hook]
        if 'verify' in words:
            hook['verify_ranks'] = True
            hooks.append(Plant())
        if 'sync' in words:
            hooks.append(dict(type='SyncBuffersHook'))
        if 'recalibrate' in words:
            hook['recalibrate'] = 9  # all batches that there are
            hooks.append(Spoil())
        if 'posthoc' in words:
            hook.update(decay=0.99, tau=8, posthoc=True)
        # what resumes does so in the folder of the run before
        work_dir = folder / spec.replace(',resumed', '')
        resume = work_dir / 'epoch_2.pth' if 'resumed' in words else None
        try:
            start, records, seen = train(words, hooks, work_dir, resume)
        except RuntimeError as error:
            if 'verify' not in words:
                raise
            found[spec] = str(error)
            continue
        calls = len(CALLS) - before
        dump = dict(start=start, records=records, seen=seen, calls=calls)
        found[spec] = dict(dump, starts=[*STARTS])
    dist.barrier()
    return found


if __name__ == '__main__':
    run_main(main)
