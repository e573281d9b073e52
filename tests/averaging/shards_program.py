"""Run as one of several ranks: average a model that torch has sharded.

Usage: tests.ranks.run_ranks
"""

import copy
import functools

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)

from mmdet_ema.averaging import WeightAverager
from mmdet_ema.averaging import averager as averager_module
from tests.collectives import CALLS, count_collectives
from tests.ranks import main as run_main

DECAYS = dict(ema=0.9, slow=0.99)
OPTIONS = dict(
    decay=0.9, averages=dict(slow=dict(schedule='constant', decay=0.99))
)
STEPS, BAD_STEP = 7, 4
# how fully_shard, or FSDP1, is called, and with which options the averager is
# made; 'deferred': the verdict stays on the device, as on a GPU
WAYS = {
    'default': (dict(), dict()),
    'kept': (dict(reshard_after_forward=False), dict(device='cpu')),
    'bfloat16': (
        dict(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
        dict(interval=2),
    ),
    'deferred': (dict(), dict()),
    'hybrid': (dict(), dict()),
    'fsdp1': (dict(use_orig_params=True), dict()),
    'flat': (dict(use_orig_params=False), dict(device='cpu')),
    'fsdp1 kept': (
        dict(use_orig_params=True, sharding_strategy='SHARD_GRAD_OP'),
        dict(),
    ),
    'flat kept': (
        dict(use_orig_params=False, sharding_strategy='SHARD_GRAD_OP'),
        dict(),
    ),
    'fsdp1 whole': (
        dict(use_orig_params=True, sharding_strategy='NO_SHARD'),
        dict(),
    ),
    'flat whole': (
        dict(use_orig_params=False, sharding_strategy='NO_SHARD'),
        dict(),
    ),
    'fsdp1 bfloat16': (
        dict(
            use_orig_params=True,
            mixed_precision=MixedPrecision(param_dtype=torch.bfloat16),
        ),
        dict(interval=2),
    ),
}


# in which a state is loaded, an evaluation fails, and a layer thaws
SEVERAL = ('default', 'fsdp1', 'flat', 'fsdp1 kept', 'flat kept')


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
    if 'use_orig_params' in options:
        return by_fsdp1(model, **options)
    fully_shard(model.block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def by_fsdp1(model, sharding_strategy='FULL_SHARD', **options):
    """Return it sharded by FSDP1, in as many groups as that needs."""
    wrap = functools.partial(
        FullyShardedDataParallel,
        device_id=torch.device('cpu'),
        sharding_strategy=ShardingStrategy[sharding_strategy],
        **options,
    )
    if not options['use_orig_params']:
        # what is frozen cannot be in one tensor with what is not
        model.frozen = wrap(model.frozen)
    model.block = wrap(model.block)
    return wrap(model)


def inputs(step, rank):
    """Return a batch."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 5, generator=generator)


def whole(model):
    """Return the gathered weights and this rank's buffers by name."""
    return gathered(model.state_dict().items())


def gathered(named):
    """Return whole copies of tensors by name; FSDP1's are on rank 0 alone."""
    found = {
        name: getattr(x, 'full_tensor', x.clone)().detach().clone()
        for name, x in named
    }
    everywhere = [found]
    dist.broadcast_object_list(everywhere)
    return {**everywhere[0], **found}


def part_of(parameter):
    """Return what this rank holds of it."""
    return getattr(parameter, '_local_tensor', parameter).detach()


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
    policy = shard.get('mp_policy') or shard.get('mixed_precision')
    dtype = policy.param_dtype if policy else torch.float32
    model = sharded(mesh, **shard)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1
    )
    averager = WeightAverager(model, 'constant', **{**OPTIONS, **options})
    parts = [
        entry.raw
        for entry in averager.entries
        if entry.role.value == 'averaged' and entry.parameters
    ]
    found['bytes'] = averager.counts()['bytes']
    found['empty'] = sum(not x.numel() for x in parts)
    found['names'] = [entry.names for entry in averager.entries]
    found['raws'].append(whole(model))
    for step in range(1, STEPS + 1):
        train(model, optimizer, step)
        before = len(CALLS)
        bad = dist.get_rank() == 1 or 'NO_SHARD' in shard.values()
        if step == BAD_STEP and bad:
            part = next(x.detach() for x in reversed(parts) if x.numel() > 1)
            kept = part.clone()
            part.view(-1)[-1] = float('nan')
        found['answer'] = averager.update() and averager.wait()
        if step == BAD_STEP:
            found['bad answer'] = found['answer']
            if bad:
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
    raw, by_rank_0 = whole(model), not dict(averager.named_raws())
    sets = dict(raw=raw)
    for name in averager.names:
        sets[name] = gathered(averager.named_averages(name=name))
        # each rank has its own
        sets[name].update(
            (key, value.clone())
            for key, value in averager.named_parts(name)
            if 'norm' in key
        )
    for turn in ('raw', 'ema', 'raw', 'ema', 'slow', 'raw'):
        seen = found['pairs'].setdefault(turn, [])
        if turn == 'raw':
            seen.append((outputs(model), twin_of(sets[turn], dtype)))
            continue
        with averager.applied(turn):
            seen.append((outputs(model), twin_of(sets[turn], dtype)))
            inside = gathered(averager.named_raws())
        # rank 0 alone is told of buffers by FSDP1
        found['raws inside'] = [
            k
            for k in raw
            if not ('norm' in k and dist.get_rank() and by_rank_0)
            and not torch.equal(inside[k], raw[k])
        ]
    found['back'] = [
        k for k, x in whole(model).items() if not torch.equal(x, raw[k])
    ]


def folder_of_ranks(mesh, state, folder):
    """Write the averages by torch's checkpoints of ranks; read them again."""
    averager = WeightAverager(sharded(mesh), 'constant', **OPTIONS)
    averager.load_state_dict(state)
    saved = {
        'ema': dict(averager.named_averages()),
        'num_steps': averager.num_steps,
    }
    dcp.save(saved, checkpoint_id=folder / 'dcp')
    if dist.get_rank() == 0:
        dcp_to_torch_save(folder / 'dcp', folder / 'dcp.pth')
    other = WeightAverager(sharded(mesh), 'constant', decay=0.9)
    read = {'ema': dict(other.named_averages()), 'num_steps': 0}
    dcp.load(read, checkpoint_id=folder / 'dcp')
    other.load_state_dict(
        {'averages': read['ema'], 'num_steps': read['num_steps']}
    )
    return other.state_dict()


def fail(mesh, shard):
    """Let an evaluation fail half-way, on all ranks; go on after it."""
    model = sharded(mesh, **shard)
    averager = WeightAverager(model, 'constant', decay=0.5)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1
    )
    train(model, optimizer, 1)
    averager.update()
    raw = whole(model)
    block = getattr(model.block, 'module', model.block)
    block.fails = True
    try:
        with averager.applied():
            outputs(model)
    except RuntimeError as error:
        said = str(error)
    block.fails = False
    found = dict(said=said, pair=(outputs(model), twin_of(raw, torch.float32)))
    averager.refresh()
    found['back'] = [
        k for k, x in whole(model).items() if not torch.equal(x, raw[k])
    ]
    train(model, optimizer, 2)
    found['answer'] = averager.update()
    return found


def thaw(mesh, shard):
    """Let a frozen layer train after it was sharded."""
    model = sharded(mesh, **shard)
    averager = WeightAverager(model, 'constant', decay=0.5)
    before = averager.counts()
    for parameter in model.frozen.parameters():
        parameter.requires_grad_(True)
    averager.before_step()
    raws = [whole(model)]
    with torch.no_grad():
        for parameter in model.frozen.parameters():
            part_of(parameter).add_(1)
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
    flat = sharded(mesh, use_orig_params=False)
    half = by_fsdp1(plain().bfloat16(), use_orig_params=True)
    makes = dict(
        copied=lambda: WeightAverager(flat, copied=['block.wide.*']),
        half=lambda: WeightAverager(half),
        posthoc=lambda: WeightAverager(sharded(mesh), posthoc=True),
        posthoc_fsdp1=lambda: WeightAverager(flat, posthoc=True),
    )
    for name, make in makes.items():
        try:
            make()
        except ValueError as error:
            found[name] = str(error)
    return found


def main(rank, ranks, folder):
    """Go through all scenarios; return what was seen."""
    dist.init_process_group('gloo')
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
    for name in SEVERAL:
        shard = WAYS[name][0]
        model = sharded(mesh, **shard)
        other = WeightAverager(model, 'constant', **OPTIONS)
        before = whole(model)
        other.load_state_dict(state[0])
        found[name].update(
            loaded=other.state_dict(),
            same=[
                k for k, x in whole(model).items() if (x != before[k]).any()
            ],
            fail=fail(mesh, shard),
            thaw=thaw(mesh, shard),
        )
    found['dcp'] = folder_of_ranks(mesh, state[0], folder)
    found['refused'] = refused(mesh)
    dist.barrier()
    return found


if __name__ == '__main__':
    run_main(main)
