"""Run as one of several ranks: train with a strategy that shards.

Usage: tests.ranks.run_ranks, with a folder, a number of epochs and the file
that is resumed, if any, for each run: NAME:EPOCHS[:FILE].
"""

import contextlib
import time

import torch
import torch.distributed as dist
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.runner import FlexibleRunner
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)

from tests.for_mmengine.toy import Score, ToyModel, loader
from tests.ranks import main as run_main

EMA = dict(
    type='EMAHook',
    decay=0.9,
    tau=3,
    evaluate='all',
    averages=dict(fast=dict(decay=0.5, tau=1)),
)
MORE = dict(
    low=dict(
        param_dtype='bfloat16', float32=['head'], reshard_after_forward=False
    ),
    offloaded=dict(cpu_offload=True),
    hybrid=dict(replicate=2),
)
FSDP1 = ('fsdp1', 'flat', 'local')  # how names of runs begin
BATCH = 12  # of all ranks together
WHOLE = dict(
    state_dict_type='FULL_STATE_DICT',
    state_dict_config=dict(
        type='FullStateDictConfig', rank0_only=True, offload_to_cpu=False
    ),
    optim_state_dict_config=dict(
        type='FullOptimStateDictConfig', rank0_only=True, offload_to_cpu=False
    ),
)


class Model(ToyModel):
    """Statistics that stand still: they differ by the number of ranks."""

    def __init__(self):
        super().__init__()
        self.low = nn.Parameter(torch.ones(4))
        self.head.is_head = True

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
        self.raws.append(self.gathered(runner.model))

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        self.raws.append(self.gathered(runner.model))
        Recorder.parts = self.parts_of(runner.model)

    def gathered(self, model):
        return gathered(model)

    def parts_of(self, model):
        return [
            getattr(x, '_local_tensor', x).detach().clone()
            for x in model.parameters()
        ]

    def after_val_epoch(self, runner, metrics=None):
        self.metrics.append(dict(metrics))


def gathered(model):
    """The raw weights, whole."""
    whole = contextlib.nullcontext()
    if isinstance(model, FullyShardedDataParallel):
        whole = model.state_dict_type(model, StateDictType.FULL_STATE_DICT)
    with whole:
        return {
            name: getattr(x, 'full_tensor', x.clone)().detach().clone()
            for name, x in model.state_dict().items()
        }


def strategy_of(name):
    """The strategy of a run."""
    if not name.startswith(FSDP1):
        more = MORE.get(name, {})
        return dict(type='FSDP2Strategy', shard=['head'], **more)
    wrapper = dict(
        type='MMFullyShardedDataParallel',
        device_id=torch.device('cpu'),
        use_orig_params=not name.endswith('flat'),
        auto_wrap_policy=wrap_head,
    )
    strategy = dict(type='FSDPStrategy', model_wrapper=wrapper)
    if not name.startswith('local'):
        strategy['state_dict_cfg'] = WHOLE
    return strategy


def wrap_head(module, recurse, nonwrapped_numel):
    """Wrap what is frozen apart, and the head."""
    if recurse:
        return True
    parameters = list(module.parameters())
    frozen = parameters and not any(x.requires_grad for x in parameters)
    return frozen or getattr(module, 'is_head', False)


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


def make_runner(
    folder,
    epochs,
    ranks,
    model,
    hooks,
    metric=None,
    checkpoint=None,
    **options,
):
    """Put together a run of the toy on several ranks."""
    return FlexibleRunner(
        model=model,
        work_dir=str(folder),
        train_dataloader=loader(48, BATCH // ranks),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        param_scheduler=dict(type='ExponentialLR', gamma=0.9, end=9),
        val_dataloader=loader(4, 2, seed=1),
        val_cfg=dict(),
        val_evaluator=Evaluator([metric or Score()]),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(
                type='CheckpointHook', interval=1, **checkpoint or {}
            ),
        ),
        custom_hooks=hooks,
        # those of one second would share a message hub
        experiment_name=f'{folder.name}{ranks}{epochs}',
        **options,
    )


def train(
    folder, epochs, resume=None, ranks=1, model=None, metric=None, **options
):
    """Train; return what was recorded."""
    recorder = Recorder()
    counts = 2 if folder.name == 'accumulated' else 1
    keep = {}
    if folder.name.startswith('local'):
        keep = dict(max_keep_ckpts=1, save_best='score', rule='greater')
    unclipped = folder.name.startswith((*FSDP1, 'unclipped'))
    runner = make_runner(
        folder,
        epochs,
        ranks,
        model or Model(),
        [EMA, recorder],
        metric,
        keep,
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=0.01),
            # mmengine clips FSDP1's by the norm of each rank's pieces
            clip_grad=None if unclipped else dict(max_norm=0.5),
            accumulative_counts=counts,
        ),
        resume=resume or False,
        **options,
    )
    runner.train()
    hub = runner.message_hub
    scalars = {
        name: hub.get_scalar(f'train/{name}').data[0].tolist()
        for name in ('ema_distance', 'grad_norm')
        if f'train/{name}' in hub.log_scalars
    }
    return dict(raws=recorder.raws, metrics=recorder.metrics, **scalars)


def refused(folder):
    """Return what is said of files that are parts of tensors."""
    strategy = strategy_of('local')
    strategy['state_dict_cfg'] = dict(
        state_dict_type='SHARDED_STATE_DICT',
        state_dict_config=ShardedStateDictConfig(),
        optim_state_dict_config=ShardedOptimStateDictConfig(),
    )
    try:
        train(folder, 1, ranks=2, launcher='pytorch', strategy=strategy)
    except ValueError as error:
        return str(error)


def refused_sets(folder, rank, ranks):
    """Return what is said of sets of files that are not whole."""
    found, file = {}, f'rank{rank}.pth'
    (folder / 'wrong').mkdir(exist_ok=True)
    for name in ('killed', 'missing', 'damaged', 'foreign'):
        path = folder / 'wrong' / f'{name}.pth'
        source = folder / 'local' / 'epoch_3.pth'
        path.mkdir(exist_ok=True)
        if name == 'killed' and rank == 0:
            source = folder / 'local_part' / 'epoch_3.pth'
        if name == 'foreign':
            file = f'rank{(rank + 1) % ranks}.pth'
        if name != 'missing' or rank == 0:
            data = bytearray((source / file).read_bytes())
            if name == 'damaged' and rank == 1:
                weights = torch.load(source / file)['state_dict'].values()
                largest = max(weights, key=torch.Tensor.numel)
                data[data.find(largest.numpy().tobytes())] ^= 1
            (path / f'rank{rank}.pth').write_bytes(data)
        dist.barrier()
        try:
            train(
                folder / 'local_wrong',
                4,
                str(path),
                ranks,
                launcher='pytorch',
                strategy=strategy_of('local'),
            )
        except (ValueError, FileNotFoundError) as error:
            found[name] = str(error)
        dist.barrier()
    return found


def main(rank, ranks, folder, *specs):
    """Train with each spec, one after the other; return what was seen."""
    time.sleep = lambda seconds: None
    found = {}
    if specs[0].startswith(FSDP1):
        # mmengine would set the device of a GPU
        dist.init_process_group('gloo')
    for spec in specs:
        name, epochs, *file = spec.split(':')
        found[name] = train(
            folder / name,
            int(epochs),
            str(folder / file[0]) if file else None,
            ranks,
            launcher='pytorch',
            strategy=strategy_of(name),
        )
    if specs[0].startswith(FSDP1):
        found['refused'] = refused(folder / 'refused')
    if 'local:3' in specs:
        found['sets'] = refused_sets(folder, rank, ranks)
    if specs[0].startswith('whole'):
        # last of all: where one rank stops, the other is told by gloo
        found['failed'] = fail(
            folder / 'failed', dict(type='FSDP2Strategy', shard=['head'])
        )
    return found


if __name__ == '__main__':
    run_main(main)
