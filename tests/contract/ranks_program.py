"""Run on two ranks: train, dump what was seen.

Usage: tests.ranks.run_ranks, with words of each run, joined by commas.
"""

import time

import torch.distributed as dist

from mmdet_ema.checkpoint import start as start_file
from mmdet_ema.training import lifecycle
from tests.collectives import CALLS, count_collectives
from tests.conftest import MMCV1
from tests.contract.toy import (
    EMA,
    Hook,
    RankModel,
    Spoil,
    state_of,
    train_rank,
)
from tests.ranks import main as run_main

if MMCV1:
    from mmcv.runner import DistEvalHook
else:
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


class Plant(Hook):
    """Changes a weight on one rank."""

    def before_train_iter(self, runner, batch_idx=0, data_batch=None):
        if runner.iter == 1 and dist.get_rank() == 1:
            runner.model.module.head.bias.data[0] += 1


class Seen(Hook):
    """Keeps what mmengine's runner evaluates."""

    def __init__(self):
        self.states = []

    def before_val_iter(self, runner, batch_idx=0, data_batch=None):
        if batch_idx == 0:
            steps = len(runner.optim_wrapper.optimizer.records)
            self.states.append((steps, state_of(runner.model.module)))


def train(words, hooks, folder, resume=None):
    """Train as the words say; return start, steps and evaluations."""
    options = dict(model=RankModel(), epochs=3 if resume else 2, resume=resume)
    if MMCV1:
        by_epoch = 'iters' not in words
        if 'runner' in words:
            options['runner'] = dict(type='IterBasedRunner', max_iters=8)
        options['checkpoint'] = dict(interval=1, by_epoch=by_epoch)
        options['evaluation'] = dict(
            kind=DistEvalHook,
            interval=1 if by_epoch else 3,
            by_epoch=by_epoch,
            save_best='score',
            rule='greater',
        )
        run = train_rank(folder, *hooks, **options)
        return run.recorder.start, run.records, run.recorder.seen
    if 'flexible' in words:
        options['kind'] = FlexibleRunner
    seen = Seen()
    run = train_rank(folder, *hooks, seen, **options)
    start = run.recorder.start
    start = {k.replace('module.', '', 1): v for k, v in start.items()}
    return start, run.records, seen.states


def main(rank, count, folder, *specs):
    """Train with each spec, one after the other; return what was seen."""
    time.sleep = lambda seconds: None
    count_collectives()
    watch_start_files()
    dist.init_process_group('gloo')
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
