"""Measure the update of a sharded model beside the floor of a rank's shards.

Usage: torchrun --nproc_per_node 2 -m benchmarks.shards [ROUNDS]
"""

from __future__ import annotations

import sys
from typing import Dict, Tuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from benchmarks import models, peers
from benchmarks.rounds import FLUSH, Call, Figure, Sample, compare, seconds
from benchmarks.tables import models_table
from mmdet_ema import WeightAverager


def main(rounds: int) -> None:
    """Print a table: each rank times its own update, rank 0 tells."""
    dist.init_process_group('gloo')
    torch.set_num_threads(1)
    results = {}
    for name in models.CONFIGS:
        model = models.build(name)
        size = WeightAverager(model).counts()['bytes']
        fully_shard(model)
        share = WeightAverager(model).counts()['bytes'] / size
        results[f'{name}, {share:.1%} of its bytes'] = _measure(model, rounds)
    if dist.get_rank() == 0:
        print(models_table(results))
    dist.destroy_process_group()


def _measure(model: nn.Module, rounds: int) -> Dict[str, Figure]:
    checked = WeightAverager(model, decay=peers.DECAY)
    unchecked = WeightAverager(model, decay=peers.DECAY, nonfinite='ignore')
    sizes = [x.raw.numel() for x in checked.entries if x.has_mean]
    raw, average = torch.ones(2, sum(sizes))
    flush = torch.ones(FLUSH // 4)
    calls: Dict[str, Call] = {
        'flat floor of the shards': lambda: average.lerp_(raw, 0.5),
        'mmdet_ema': checked.update,
        "mmdet_ema, `nonfinite='ignore'`": unchecked.update,
    }

    def make(name: str) -> Sample:
        def sample() -> Tuple[float]:
            flush.sum()
            dist.barrier()  # both begin together
            return (seconds(calls[name], 'cpu'),)

        return sample

    return compare(calls, make, rounds)


if __name__ == '__main__':
    main(int((sys.argv[1:] or ['40'])[0]))
