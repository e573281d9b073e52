"""Parameters that DeepSpeed's ZeRO-3 has partitioned.

Each rank holds a part of the flat parameter, as ``ds_tensor``, filled up at
its end so that all parts are of one size; ``ds_shape`` is the true shape. The
parameter itself is empty, or whole as long as somebody needs it: small ones
stay whole, and so does what a forward pass has gathered ahead. Whoever swaps
parts calls :func:`forget_gathered` before. Stages 1 and 2 leave parameters
whole.

DeepSpeed is not imported: all that is needed hangs on the parameters.
"""

from __future__ import annotations

from typing import Any, Iterable, List, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from mmdet_ema.errors import OptionError


def is_partitioned(tensor: Any) -> bool:
    """Return whether a tensor is a parameter that ZeRO-3 has partitioned."""
    return hasattr(tensor, 'ds_tensor')


def own_part(parameter: Any) -> Tensor:
    """Return what this rank holds of a parameter, without what fills it up."""
    return _without_filling(parameter.ds_tensor.detach(), parameter)


def part_of(whole: Tensor, parameter: Any) -> Tensor:
    """Return what this rank holds of a whole tensor of that shape."""
    size = parameter.ds_tensor.numel()
    start = dist.get_rank(parameter.ds_process_group) * size
    return whole.reshape(-1)[start : start + size]


def master_part(parameter: Any, part: Tensor) -> Optional[Tensor]:
    """Return the part that the optimizer steps, where it is more precise.

    None where it is the same, or nobody trains the parameter.

    Raises:
        OptionError: If it does not stay where it is.
    """
    optimizer = getattr(parameter, '_z3_optimizer', None)
    if part.dtype == torch.float32 or optimizer is None:
        return None
    left, right = (optimizer.get_local_fp32_param(parameter) for _ in 'ab')
    if left is None:
        return None
    if left.data_ptr() != right.data_ptr():
        raise OptionError(
            'ZeRO-3 in half precision with offload_optimizer: the weights '
            'that are stepped lie elsewhere, and their rounded copies would '
            'be averaged; leave offload_optimizer or half precision out.'
        )
    return _without_filling(left.detach(), parameter)


def refuse_second_copies(name: str, parameter: Any) -> None:
    """Refuse what makes copies of the parts that a swap would not reach.

    Raises:
        OptionError: If a parameter has such a copy, or its part is on a disk.
    """
    second = getattr(parameter, 'ds_secondary_tensor', None)
    place = str(getattr(parameter.ds_tensor, 'final_location', None))
    if second is not None or 'nvme' in place:
        raise OptionError(
            f'{name} is partitioned by ZeRO-3 with zero_hpz_partition_size or '
            f'with offload_param to a disk, which is not averaged; leave that '
            f'out.'
        )


def forget_gathered(parameters: Iterable[Any]) -> None:
    """Let a model forget the whole weights that it holds just now.

    A forward pass gathers them again. No rank has to wait for another.
    """
    for parameter in parameters:
        optimizer = getattr(parameter, '_z3_optimizer', None)
        if optimizer is not None:
            # of the whole model, as a step does
            optimizer.parameter_offload.partition_all_parameters()
            return


class ZeroPart:
    """A tensor that ranks hold parts of, partitioned like a parameter.

    Args:
        part: What this rank holds, flat.
        parameter: The parameter.
    """

    def __init__(self, part: Tensor, parameter: Any):
        self._local_tensor, self._parameter = part, parameter

    @property
    def shape(self) -> torch.Size:
        """That of the whole tensor."""
        return torch.Size(self._parameter.ds_shape)

    def detach(self) -> ZeroPart:
        """Return itself: a part has no gradient."""
        return self

    def full_tensor(self) -> Tensor:
        """Gather the whole tensor; call it on all ranks."""
        owner, part = self._parameter, self._local_tensor
        mine = part.new_zeros(owner.ds_tensor.numel(), device=owner.device)
        mine[: part.numel()] = part
        group = owner.ds_process_group
        parts: List[Tensor] = [
            torch.empty_like(mine) for _ in range(dist.get_world_size(group))
        ]
        dist.all_gather(parts, mine, group)
        return torch.cat(parts)[: owner.ds_numel].view(self.shape)


def _without_filling(part: Tensor, parameter: Any) -> Tensor:
    size = parameter.ds_tensor.numel()
    start = dist.get_rank(parameter.ds_process_group) * size
    return part[: max(min(parameter.ds_numel - start, size), 0)]
