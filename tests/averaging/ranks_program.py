"""Run as one of three ranks: average, and make tensors equal.

Usage: tests.ranks.run_ranks
"""

import torch
import torch.distributed as dist
from torch import nn

from mmdet_ema.averaging import WeightAverager
from mmdet_ema.averaging.distributed import make_equal
from tests import needs, ranks
from tests.collectives import CALLS, count_collectives

RANKS, STEPS, BAD_STEP = 3, 6, 3
WAYS = [(0.9, False), (0.9, True), (0.9999, False), (0.9999, True)]


def weights_of(step, numel):
    """Return the values of all weights after a step, the same everywhere."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(numel, generator=generator)


def tensors_of(rank):
    """Return tensors that become the mean, and others of rank 0."""
    generator = torch.Generator().manual_seed(rank)
    lowest = torch.finfo(torch.float32).min
    means = dict(
        single=torch.randn(5, 7, generator=generator),
        double=torch.randn(3, generator=generator).double(),
        half=torch.randn(4, generator=generator).half(),
        phase=torch.randn(2, dtype=torch.complex64, generator=generator),
        last=torch.randn(2, 3, 4, 4, generator=generator).contiguous(
            memory_format=torch.channels_last
        ),
        scalar=torch.tensor(float(rank)),
        # the same on all ranks
        third=torch.full((3,), 0.1),
        lowest=torch.tensor([0.0, lowest, -lowest]),
        halves=torch.full((2,), 60000.0, dtype=torch.float16),
        infinite=torch.tensor([0.0, -float('inf')]),
        # equal in one element
        large=torch.tensor([3e38, -3e38 if rank else 3e38]),
        none=torch.zeros(0, 2),
    )
    copies = dict(
        count=torch.tensor([2**60 + rank, rank]),
        flags=torch.tensor([rank == 0, rank == 1]),
        vector=torch.randn(3, generator=generator),
        small=torch.tensor(rank, dtype=torch.uint8),
    )
    return means, copies


def average(decay, overlap):
    """Take steps, one of them bad; return what came of it."""
    model = nn.Linear(40, 7, bias=False)
    model.weight.data.copy_(weights_of(0, 280).view(7, 40))
    averager = WeightAverager(model, 'constant', decay=decay, overlap=overlap)
    for step in range(1, STEPS + 1):
        averager.before_step()
        model.weight.data.copy_(weights_of(step, 280).view(7, 40))
        if step == BAD_STEP:
            model.weight.data[6, 39] = float('nan')
        averager.update()
    return {
        'average': dict(averager.named_averages())['weight'].clone(),
        'steps': averager.num_steps,
        'skipped': averager.num_skipped,
    }


def verify(rank):
    """Return what is said without a difference, and with planted ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    averager = WeightAverager(model, 'constant', decay=0.9)
    model[1].running_mean.fill_(rank)  # buffers may differ, averages not
    averager.update()
    averager.synchronize()
    found, before = [], len(CALLS)
    averages = dict(averager.named_averages())
    for plant in (None, model[2].bias, averages['1.running_mean']):
        words = torch.zeros(2, dtype=torch.int32)
        if plant is not None:
            words = plant.data.view(torch.int32)
        words[-1] += int(rank == 1)  # the lowest bit of the last element
        try:
            found.append(averager.verify_ranks())
        except RuntimeError as error:
            found.append(str(error))
        words[-1] -= int(rank == 1)
    return found, len(CALLS) - before


def main(rank, count, folder):
    """Go through all scenarios; return what was seen."""
    # where torch chooses it does not say 'gloo' afterwards
    chosen = needs.TORCH >= (2, 1) and not dist.is_nccl_available()
    dist.init_process_group(None if chosen else 'gloo')
    count_collectives()
    found = {'averages': [average(*way) for way in WAYS]}
    found['calls of steps'] = len(CALLS)
    means, copies = tensors_of(rank)
    found['equal'] = make_equal([*means.values()], [*copies.values()])
    found['calls'] = len(CALLS)
    found['means'], found['copies'] = means, copies
    # another shape on one rank
    odd = torch.full((2 + (rank == 2),), float(rank))
    found['odd'] = make_equal([odd, torch.ones(1)], []), odd
    found['nothing'] = make_equal([], [])
    found['verified'] = verify(rank)
    dist.barrier()
    return found


if __name__ == '__main__':
    ranks.main(main)
