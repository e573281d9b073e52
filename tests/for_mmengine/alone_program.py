"""Run on two ranks: moments at which one of them is alone.

Usage: tests.ranks.run_ranks
"""

import datetime
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.dist import master_only
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, ValLoop
from torch import nn
from torch.distributed.algorithms.join import Join

from tests.collectives import CALLS, count_collectives
from tests.for_mmengine.toy import (
    Run,
    Score,
    ToyData,
    ToyModel,
    loader,
    state_of,
)
from tests.ranks import main as run_main

EMA = dict(type='EMAHook', schedule='constant', decay=0.9)
LOWEST = torch.finfo(torch.float32).min


class Model(ToyModel):
    """Has masks, and as many more BatchNorm layers as are wanted."""

    def __init__(self, more=0):
        super().__init__()
        # gloo reduces no bfloat16
        self.low = nn.Parameter(torch.ones(4))
        self.more = nn.Sequential(*[nn.BatchNorm1d(4) for _ in range(more)])
        self.register_buffer('mask', torch.tensor([0.0, LOWEST, LOWEST]))
        self.register_buffer('hidden', torch.tensor([0.0, -float('inf')]))
        self.register_buffer('narrow', torch.tensor([6e4]).half())

    def forward(self, inputs, mode='tensor'):
        return super().forward(self.more(inputs), mode)


class Local(Evaluator):
    """Evaluates what this rank has, without the others."""

    def evaluate(self, size):
        (metric,) = self.metrics
        found = metric.compute_metrics(metric.results)
        metric.results.clear()
        return found


@LOOPS.register_module()
class LoopOfRank0(ValLoop):
    """Validates on rank 0; the others wait."""

    def run(self):
        self.on_rank_0()
        dist.barrier()

    @master_only
    def on_rank_0(self):
        return super().run()


@LOOPS.register_module()
class JoiningLoop(EpochBasedTrainLoop):
    """Trains on data of another length on each rank."""

    def run_epoch(self):
        with Join([self.runner.model]):
            super().run_epoch()


class At(Hook):
    """Does something after an iteration, before the EMA hook has its turn."""

    def __init__(self, action, iteration=5):
        self.action, self.iteration = action, iteration

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == self.iteration:
            self.action(runner)


class Watch(Hook):
    """Keeps the states after steps, and how many calls were made by then."""

    priority = 'LOWEST'

    def __init__(self):
        self.states, self.calls, self.shown = [], [], []

    def after_train_iter(self, runner, *args, **kwargs):
        self.states.append(state_of(runner.model.module))
        self.calls.append(len(CALLS))

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == 0:
            self.shown.append(state_of(runner.model.module))


def data(size, batch, split=True):
    """A loader whose samples are shared out, or the same on both ranks."""
    if not split:
        return torch.utils.data.DataLoader(ToyData(size, 0), batch_size=batch)
    return loader(size, batch)


def train(folder, name, *hooks, model=None, wrapper=None, ema=EMA, **options):
    """Train as a scenario says; return what this rank saw."""
    CALLS.clear()
    watch = Watch()
    wrapper = dict(
        type='MMDistributedDataParallel', device_ids=None, **(wrapper or {})
    )
    run = Run(
        folder / name,
        *hooks,
        ema,
        watch,
        model=model or Model(),
        launcher='pytorch',
        cfg=dict(model_wrapper_cfg=wrapper),
        **{'train_dataloader': data(16, 2), **options},
    )
    error = ''
    try:
        run.runner.train()
    except AssertionError as caught:
        error = str(caught)
        # a script around the run rescues what there is
        run.runner.save_checkpoint(run.runner.work_dir, 'rescue.pth')
    logs = sorted(Path(run.runner.work_dir).glob('*/*.log'))
    return dict(
        states=watch.states,
        calls=watch.calls,
        total=list(CALLS),
        shown=watch.shown,
        error=error,
        log='\n'.join(path.read_text() for path in logs),
    )


def save_and_wait(runner):
    """Save on rank 0; the others wait."""
    runner.save_checkpoint(runner.work_dir, 'now.pth')
    dist.barrier()


def save_on_rank_0(runner):
    """Save on rank 0, which nobody else knows of."""
    if dist.get_rank() == 0:
        runner.save_checkpoint(runner.work_dir, 'now.pth')


def validate_on_rank_0(runner):
    """Validate on rank 0, by a hook of the user's own."""
    if dist.get_rank() == 0:
        runner.val_loop.run()
        runner.model.train()
    dist.barrier()


def stop(runner):
    """Raise on every rank."""
    raise AssertionError('the loss is not finite')


def main(rank, count, folder):
    """Go through the scenarios; return what was seen."""
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group('gloo', timeout=timeout)
    count_collectives()
    local = dict(
        val_evaluator=Local([Score()]), val_dataloader=data(4, 2, False)
    )
    none = dict(val_dataloader=None, val_cfg=None, val_evaluator=None)
    by_iteration = dict(type='IterBasedTrainLoop', max_iters=8, val_interval=3)
    checkpoint = dict(type='CheckpointHook', interval=1, by_epoch=False)
    every = dict(hooks=dict(checkpoint=checkpoint))
    joining = dict(
        local,
        train_dataloader=data(8 + 4 * rank, 2, False),
        train_cfg=dict(type='JoiningLoop', max_epochs=2),
    )
    runs = {
        'epochs': ([], {}),
        'large': ([], dict(model=Model(more=9))),
        'copied': ([], dict(ema=dict(EMA, update_buffers=False))),
        'iterations': ([], dict(train_cfg=by_iteration, **every)),
        'no validation': ([], dict(every, **none)),
        'unused': ([], dict(wrapper=dict(find_unused_parameters=True))),
        'rank 0 validates': (
            [],
            dict(local, val_cfg=dict(type='LoopOfRank0')),
        ),
        'joined': ([], joining),
        'save and wait': ([At(save_and_wait)], {}),
        'rank 0 saves': ([At(save_on_rank_0)], {}),
        'hook validates': ([At(validate_on_rank_0)], local),
        'rescue': ([At(stop)], {}),
    }
    found = {}
    for name, (hooks, options) in runs.items():
        found[name] = train(folder, name, *hooks, **options)
    dist.barrier()
    return found


if __name__ == '__main__':
    run_main(main)
