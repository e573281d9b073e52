"""Models that are sharded: by ``fully_shard`` (FSDP2), FSDP1 or ZeRO-3.

Each rank averages its own part of every parameter, in place: a step needs no
communication but one flag. A forward pass puts whole weights in the place of
the sharded ones, and after an evaluation the root still uses them: whoever
looks at the model's tensors or swaps them calls :func:`reshard` before.

FSDP2's parts are DTensors, which know the whole that they belong to. What is
different in FSDP1 and ZeRO-3 is in ``fsdp1`` and ``zero``.
"""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmdet_ema.averaging import fsdp1, zero
from mmdet_ema.errors import OptionError


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds a part of a tensor alone."""
    return hasattr(tensor, '_local_tensor') or zero.is_partitioned(tensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: of a plain one, itself."""
    if zero.is_partitioned(tensor):
        return zero.own_part(tensor)
    return getattr(tensor, '_local_tensor', tensor)


def part_of(whole: Tensor, like: Any) -> Tensor:
    """Return what this rank holds of a whole tensor, sharded like another."""
    if zero.is_partitioned(like):
        return zero.part_of(whole, like)
    for i, placement in enumerate(like.placements):
        if placement.is_shard():
            dim: int = placement.dim
            chunks = whole.chunk(like.device_mesh.size(i), dim)
            rank: int = like.device_mesh.get_local_rank(i)
            # there are fewer chunks than ranks where the dimension is short
            empty = whole.narrow(dim, 0, 0)
            return chunks[rank] if rank < len(chunks) else empty
    return whole


def as_sharded(part: Tensor, like: Any) -> Tensor:
    """Return the tensor that this rank holds a part of, sharded as another.

    It shares the memory of the part.
    """
    if zero.is_partitioned(like):
        return zero.ZeroPart(part, like)  # type: ignore[return-value]
    return type(like).from_local(  # type: ignore[no-any-return]
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        # of uneven parts no rank can tell them
        shape=like.shape,
        stride=like.stride(),
    )


@torch.no_grad()
def gather(named: Iterable[Tuple[str, Tensor]]) -> Dict[str, Tensor]:
    """Return tensors by name; where some are sharded, whole on rank 0 alone.

    There they are in host memory, and the other ranks get an empty dict. Call
    it on all ranks.
    """
    found: Dict[str, Tensor] = {}
    any_sharded, last, whole = False, None, torch.empty(0)
    first = not (dist.is_available() and dist.is_initialized())
    first = first or dist.get_rank() == 0
    for name, tensor in named:
        if not is_sharded(tensor):
            found[name] = tensor
            continue
        any_sharded = True
        if tensor is not last:  # names of tied tensors come together
            last, value = tensor, tensor.detach()
            if zero.is_partitioned(tensor):
                value = as_sharded(local_part(tensor), tensor)
            whole = value.full_tensor()  # type: ignore[attr-defined]
            whole = whole.cpu() if first else whole
        if first:
            found[name] = whole
    return found if first or not any_sharded else {}


def sharded_modules(model: nn.Module) -> List[Any]:
    """Return the modules that ``fully_shard`` was called on, or FSDP1's.

    Raises:
        OptionError: If the model is sharded in another way.
    """
    found = []
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if fsdp1.is_fsdp1(module) and not fsdp1.is_known():
            raise OptionError(
                f'FullyShardedDataParallel is averaged from torch 2.6 on, '
                f'this is {torch.__version__}; update it, or use '
                f'DistributedDataParallel.'
            )
        if 'FSDPModule' in kinds or fsdp1.is_fsdp1(module):
            found.append(module)
    return found


def layout(model: nn.Module) -> Dict[str, Any]:
    """Return a model's ``state_dict``, for its names, kinds and shapes.

    All ranks of a model that FSDP1 has sharded call it, and get all of them.
    A parameter that ZeRO-3 has partitioned is without values.
    """
    if any(map(fsdp1.is_fsdp1, model.modules())):
        if fsdp1.is_local(model):
            return {piece.name: piece.tensor for piece in fsdp1.pieces(model)}
        return fsdp1.layout(model)
    state: Dict[str, Any] = model.state_dict(keep_vars=True)
    return {
        name: torch.empty(x.ds_shape, dtype=x.dtype, device='meta')
        if zero.is_partitioned(x)
        else x.detach()
        if isinstance(x, Tensor)
        else x
        for name, x in state.items()
    }


def reshard(modules: Sequence[Any]) -> None:
    """Let modules forget the whole weights that a forward pass left."""
    for module in modules:
        if fsdp1.is_fsdp1(module):
            fsdp1.reshard(module)
        else:
            module.reshard()


def recover(modules: Sequence[Any]) -> None:
    """Do so after a forward pass that has failed half-way."""
    for module in modules:
        # newer torch has it, for the root alone; an older one goes on as
        # if that pass had not ended
        with contextlib.suppress(AttributeError, RuntimeError):
            module.reset_iter_state()


class Ranks:
    """The ranks that hold the parts of sharded tensors.

    Every method is a collective.

    Args:
        groups: Their process groups, one for each dimension of a mesh.
        device: Type of the device that they communicate on.
    """

    def __init__(self, groups: Sequence[Any], device: str):
        self._groups, self._device = groups, device

    def maximum(self, flag: Tensor) -> Tensor:
        """Return the largest values over the ranks, by element.

        On a GPU nobody waits: it is one more kernel.
        """
        flag = flag.to(self._device)
        for group in self._groups:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group)
        return flag

    def all_agree(self, verdict: bool) -> bool:
        """Return whether the verdict is True on all ranks."""
        return not bool(self.maximum(torch.tensor(float(not verdict))))

    def add_up(self, values: Sequence[float]) -> List[float]:
        """Return the sums of numbers over the ranks."""
        sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        for group in self._groups:
            dist.all_reduce(sums, group=group)
        return sums.tolist()


def ranks_of(model: nn.Module, modules: Sequence[Any]) -> Optional[Ranks]:
    """Return the ranks that share tensors; None where all are whole.

    Args:
        model: The model.
        modules: Its sharded modules.

    Raises:
        OptionError: If a tensor is spread in more than one direction.
    """
    wrappers = [module for module in modules if fsdp1.is_fsdp1(module)]
    groups = fsdp1.groups_of(wrappers)
    device = wrappers[0].compute_device.type if groups else ''
    tensor: Any
    for name, tensor in model.named_parameters():
        if zero.is_partitioned(tensor):
            zero.refuse_second_copies(name, tensor)
            device = tensor.device.type
            if tensor.ds_process_group not in groups:
                groups.append(tensor.ds_process_group)
            continue
        if not is_sharded(tensor):
            continue
        device = tensor.device_mesh.device_type
        placements = tensor.placements
        shards = [i for i, x in enumerate(placements) if x.is_shard()]
        if len(shards) > 1 or any(x.is_partial() for x in placements):
            raise OptionError(
                f'{name} is a DTensor with the placements {placements}: '
                f'averaged is what one dimension of a mesh shards (FSDP2, '
                f'hybrid sharding too); leave tensor parallelism out.'
            )
        for dim in shards:
            group = tensor.device_mesh.get_group(dim)
            if group not in groups:
                groups.append(group)
    return Ranks(groups, device) if device else None
