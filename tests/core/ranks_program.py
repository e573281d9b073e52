"""Run as two ranks: average, with NaN on one of them, dump what came of it.

Usage: python -m tests.core.ranks_program RANK FOLDER DECAY OVERLAP
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mmdet_ema.core import WeightAverager

STEPS, BAD_STEP, BAD_RANK = 6, 3, 1


def weights_of(step, numel):
    """Return the values of all weights after a step, the same everywhere."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(numel, generator=generator)


def main(rank, folder, decay, overlap):
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/meeting',
        rank=rank,
        world_size=2,
    )
    model = nn.Linear(40, 7, bias=False)
    model.weight.data.copy_(weights_of(0, 280).view(7, 40))
    averager = WeightAverager(
        model, 'constant', decay=decay, overlap=bool(overlap)
    )
    for step in range(1, STEPS + 1):
        averager.before_step()
        model.weight.data.copy_(weights_of(step, 280).view(7, 40))
        if step == BAD_STEP and rank == BAD_RANK:
            model.weight.data[6, 39] = float('nan')
        averager.update()
    found = {
        'average': dict(averager.named_averages())['weight'].clone(),
        'steps': averager.num_steps,
        'skipped': averager.num_skipped,
    }
    torch.save(found, folder / f'rank{rank}.pt')
    dist.barrier()


if __name__ == '__main__':
    main(
        int(sys.argv[1]),
        Path(sys.argv[2]),
        float(sys.argv[3]),
        int(sys.argv[4]),
    )
    # threads of gloo may outlive Python's shutdown
    os._exit(0)
