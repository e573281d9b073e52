"""Run as one of several ranks: average a model that fully_shard has sharded.

Usage: python -m tests.averaging.shards_program RANK RANKS FOLDER
"""

import copy
import functools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)

from mmdet_ema.averaging import WeightAverager
from mmdet_ema.averaging import averager as averager_module
from tests.collectives import CALLS, count_collectives

DECAYS = dict(ema=0.9, slow=0.99)
OPTIONS = dict(
    decay=0.9, averages=dict(slow=dict(schedule='constant', decay=0.99))
)
STEPS, BAD_STEP = 7, 4
# how fully_shard is called, and with which options the averager is made;
# 'deferred': the verdict stays on the device, as on a GPU
WAYS = {
    'default': (dict(), dict()),
    'kept': (dict(reshard_after_forward=False), dict(device='cpu')),
    'bfloat16': (
        dict(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
        dict(interval=2),
    ),
    'deferred': (dict(), dict()),
    'hybrid': (dict(), dict()),
}


class Block(nn.Module):
    """Dimensions that no number of ranks divides; one weight is tied."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7, affine=False)
        self.narrow = nn.Linear(7, 2)
        self.tied = nn.Linear(7, 2)
        self.tied.weight = self.narrow.weight
        self.fails = False

    def forward(self, x):
        wide = self.wide(x)
        hidden = self.norm(wide.float()).to(wide.dtype)
        if self.fails:
            raise RuntimeError('planted')
        return self.narrow(hidden) + self.tied(hidden)


class Model(nn.Module):
    """A block that is sharded apart, the root's own weights, a frozen one."""

    def __init__(self):
        super().__init__()
        self.block = Block()
        self.last = nn.Linear(2, 1)
        self.frozen = nn.Linear(1, 5)
        self.frozen.requires_grad_(False)
        self.big = nn.Linear(70, 71)  # more than is gathered

    def forward(self, x):
        y = self.last(self.block(x))
        return self.frozen(y) + self.big.weight.mean()


def plain():
    """Return the model with the same weights on every rank."""
    torch.manual_seed(0)
    return Model()


def sharded(mesh, **options):
    """Return it sharded, in two groups; one module is checkpointed."""
    model = plain()
    model.block.wide = checkpoint_wrapper(model.block.wide)
    fully_shard(model.block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def inputs(step, rank):
    """Return a batch."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 5, generator=generator)


def whole(model):
    """Return the gathered weights and this rank's buffers by name."""
    return {
        name: getattr(x, 'full_tensor', x.clone)().detach().clone()
        for name, x in model.state_dict().items()
    }


def train(model, optimizer, step):
    """Take one step."""
    optimizer.zero_grad()
    model.train()
    model(inputs(step, dist.get_rank())).pow(2).mean().backward()
    optimizer.step()


def outputs(model):
    """Evaluate."""
    model.eval()
    with torch.no_grad():
        return model(inputs(0, 0))


def twin_of(weights, dtype):
    """Evaluate the model without shards on these weights."""
    model = plain()
    model.load_state_dict(weights)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.eval()
    with torch.no_grad():
        return model(inputs(0, 0).to(dtype))


def average(mesh, shard, options):
    """Train, evaluate in turn, train on; return all that was seen."""
    found = dict(raws=[], pairs={})
    policy = shard.get('mp_policy')
    dtype = policy.param_dtype if policy else torch.float32
    model = sharded(mesh, **shard)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1
    )
    averager = WeightAverager(model, 'constant', **{**OPTIONS, **options})
    parts = [e.raw for e in averager.entries if e.role.value == 'averaged']
    found['bytes'] = averager.counts()['bytes']
    found['empty'] = sum(not x.numel() for x in parts)
    found['names'] = [entry.names for entry in averager.entries]
    found['raws'].append(whole(model))
    for step in range(1, STEPS + 1):
        train(model, optimizer, step)
        before = len(CALLS)
        if step == BAD_STEP and dist.get_rank() == 1:
            part = model.block.wide.weight._local_tensor
            kept = part.clone()
            part.view(-1)[-1] = float('nan')
        found['answer'] = averager.update() and averager.wait()
        if step == BAD_STEP:
            found['bad answer'] = found['answer']
            if dist.get_rank() == 1:
                part.copy_(kept)
        found['calls'] = len(CALLS) - before
        found['raws'].append(whole(model))
        if step == 5:
            evaluate(found, model, averager, dtype)
    found['distance'] = averager.distance(), averager.distance('slow')
    found['state'] = averager.state_dict()
    found['skipped'] = averager.num_skipped
    return found


def evaluate(found, model, averager, dtype):
    """Compare with a model without shards; no backward pass is between."""
    raw = whole(model)
    sets = dict(raw=raw)
    for name in averager.names:
        sets[name] = {
            key: getattr(x, 'full_tensor', x.clone)().clone()
            for key, x in averager.named_averages(name=name)
        }
    for turn in ('raw', 'ema', 'raw', 'ema', 'slow', 'raw'):
        seen = found['pairs'].setdefault(turn, [])
        if turn == 'raw':
            seen.append((outputs(model), twin_of(sets[turn], dtype)))
            continue
        with averager.applied(turn):
            seen.append((outputs(model), twin_of(sets[turn], dtype)))
            inside = dict(averager.named_raws())
            inside = {
                k: getattr(x, 'full_tensor', x.clone)()
                for k, x in inside.items()
            }
        found['raws inside'] = [
            k for k in raw if not torch.equal(inside[k], raw[k])
        ]
    found['back'] = [
        k for k, x in whole(model).items() if not torch.equal(x, raw[k])
    ]


def fail(mesh):
    """Let an evaluation fail half-way, on all ranks; go on after it."""
    model = sharded(mesh)
    averager = WeightAverager(model, 'constant', decay=0.5)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1
    )
    train(model, optimizer, 1)
    averager.update()
    raw = whole(model)
    model.block.fails = True
    try:
        with averager.applied():
            outputs(model)
    except RuntimeError as error:
        said = str(error)
    model.block.fails = False
    found = dict(said=said, pair=(outputs(model), twin_of(raw, torch.float32)))
    averager.refresh()
    found['back'] = [
        k for k, x in whole(model).items() if not torch.equal(x, raw[k])
    ]
    train(model, optimizer, 2)
    found['answer'] = averager.update()
    return found


def thaw(mesh):
    """Let a frozen layer train after it was sharded."""
    model = sharded(mesh)
    averager = WeightAverager(model, 'constant', decay=0.5)
    before = averager.counts()
    for parameter in model.frozen.parameters():
        parameter.requires_grad_(True)
    averager.before_step()
    raws = [whole(model)]
    with torch.no_grad():
        for parameter in model.frozen.parameters():
            parameter._local_tensor.add_(1)
    averager.update()
    raws.append(whole(model))
    averages = averager.state_dict()['averages']
    return dict(
        before=before, after=averager.counts(), raws=raws, averages=averages
    )


def little(mesh):
    """Average a model of which one rank alone has anything but buffers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, affine=False))
    fully_shard(model, mesh=mesh)
    averager = WeightAverager(model, 'constant', decay=0.5)
    answers = []
    for value in (1.0, float('nan'), 2.0):
        for parameter in model.parameters():
            parameter._local_tensor.detach().fill_(value)
        averager.update()
        answers.append(averager.num_skipped)
    return answers, averager.state_dict()['averages']


def refused(mesh):
    """Return the messages of what cannot be averaged."""
    found = {}
    cpu = torch.device('cpu')
    fsdp1 = FullyShardedDataParallel(
        plain(), device_id=cpu, use_orig_params=True
    )
    makes = dict(
        fsdp1=lambda: WeightAverager(fsdp1),
        posthoc=lambda: WeightAverager(sharded(mesh), posthoc=True),
    )
    for name, make in makes.items():
        try:
            make()
        except ValueError as error:
            found[name] = str(error)
    return found


def main(rank, ranks, folder):
    """Go through all scenarios; dump what was seen."""
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/meeting',
        rank=rank,
        world_size=ranks,
    )
    count_collectives()
    mesh = init_device_mesh('cpu', (ranks,))
    found = {}
    for name, (shard, options) in WAYS.items():
        plan = averager_module.UpdatePlan
        if name == 'deferred':
            averager_module.UpdatePlan = functools.partial(plan, deferred=True)
        both = init_device_mesh(
            'cpu', (1, ranks), mesh_dim_names=('replicate', 'shard')
        )
        way_mesh = both if name == 'hybrid' else mesh
        found[name] = average(way_mesh, shard, options)
        if name == 'deferred':
            found['little'] = little(mesh)
        averager_module.UpdatePlan = plan
    found['given'] = copy.deepcopy(found['default']['state'])
    if rank == 0:
        # frozen after it was trained: it differs in the part of one rank
        found['given']['averages']['frozen.bias'][0] += 1
    state = [found['given']]
    dist.broadcast_object_list(state)
    model = sharded(mesh)
    other = WeightAverager(model, 'constant', **OPTIONS)
    other.load_state_dict(state[0])
    found['loaded'] = other.state_dict()
    found['fail'] = fail(mesh)
    found['thaw'] = thaw(mesh)
    found['refused'] = refused(mesh)
    torch.save(found, folder / f'rank{rank}.pt')
    dist.barrier()


if __name__ == '__main__':
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    # threads of gloo may outlive Python's shutdown
    os._exit(0)
