"""Models that ``FullyShardedDataParallel`` (FSDP1) has sharded.

It keeps the parameters of a group of layers in one flat tensor, of which each
rank holds a piece; with ``use_orig_params=True`` a parameter is a slice of
that piece. Pieces are averaged in place, as any tensor is. Nothing here knows
how they are cut: for whole tensors under their own names they are put into
the model, and the wrapper's own ``state_dict()`` or ``load_state_dict()`` is
asked for the rest.
"""

from __future__ import annotations

import contextlib
import functools
from typing import (
    Any,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Sequence,
    Tuple,
)

import torch.distributed as dist
from torch import Tensor, nn

# what the wrapper leaves out of names in a ``state_dict``
_WRAPPERS = ('_fsdp_wrapped_module.', '_checkpoint_wrapped_module.')


def is_fsdp1(module: nn.Module) -> bool:
    """Return whether a module is a wrapper of FSDP1."""
    kind: Any = type(module)
    return _is_wrapper(kind)


@functools.lru_cache(None)
def _is_wrapper(kind: type) -> bool:
    return any(x.__name__ == 'FullyShardedDataParallel' for x in kind.__mro__)


def is_known() -> bool:
    """Return whether torch is as new as what was run: it has FSDP2, too."""
    from torch.distributed import fsdp

    return hasattr(fsdp, 'fully_shard')


class Piece(NamedTuple):
    """What a rank holds of a tensor, or of all tensors of a group.

    Attributes:
        name: Its name in the model's own local state.
        tensor: The parameter or buffer.
        inside: Names of the parameters in it, where they are not apart.
    """

    name: str
    tensor: Tensor
    inside: Tuple[str, ...] = ()


def pieces(model: nn.Module) -> Iterator[Piece]:
    """Yield what this rank holds of a model that FSDP1 has sharded.

    The model's ``state_dict`` would gather all of it.
    """
    for path, parameter in model.named_parameters(remove_duplicate=False):
        name = plain(path)
        before = name.rpartition('.')[0]
        names = getattr(parameter, '_fqns', ())
        inside = tuple(f'{before}.{x}'.lstrip('.') for x in names)
        yield Piece(name, parameter, tuple(map(plain, inside)))
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set:
                continue
            yield Piece(plain(f'{path}.{name}'.lstrip('.')), buffer)


def plain(name: str) -> str:
    """Return a name as it is in a ``state_dict``."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, '')
    return name


def cut_parameters(wrappers: Sequence[Any]) -> List[Tensor]:
    """Return the parameters of which a rank holds a piece alone."""
    found: List[Tensor] = []
    for wrapper in wrappers:
        flat = wrapper._flat_param
        if flat is not None and wrapper._handle.uses_sharded_strategy:
            found += [flat, *(flat._params or ())]
            found += flat._shared_params or ()
    return found


def groups_of(wrappers: Sequence[Any]) -> List[Any]:
    """Return the process groups that share pieces."""
    found: List[Any] = []
    for wrapper in wrappers:
        handle, group = wrapper._handle, wrapper.process_group
        if handle is not None and handle.uses_sharded_strategy:
            found += [] if group in found else [group]
    return found


def reshard(wrapper: Any) -> None:
    """Let a wrapper forget the whole weights that a forward pass left."""
    from torch.distributed.fsdp._runtime_utils import _reshard

    handle = wrapper._handle
    # before the first forward pass nothing is prepared yet
    if handle is None or wrapper._is_root is None:
        return
    if handle.uses_sharded_strategy and not handle.needs_unshard():
        _reshard(wrapper, handle, True)


def end_forward(wrapper: Any) -> None:
    """Let a wrapper forget that a forward pass has failed half-way."""
    from torch.distributed.fsdp._common_utils import (
        HandleTrainingState,
        TrainingState,
    )

    wrapper.training_state = TrainingState.IDLE
    if wrapper._handle is not None:
        wrapper._handle._training_state = HandleTrainingState.IDLE


def is_local(model: nn.Module) -> bool:
    """Return whether each rank saves a file of its own pieces."""
    from torch.distributed.fsdp import (
        FullyShardedDataParallel,
        StateDictType,
    )

    settings = FullyShardedDataParallel.get_state_dict_type(model)
    return bool(settings.state_dict_type == StateDictType.LOCAL_STATE_DICT)


def saves_whole(model: nn.Module, modules: Sequence[nn.Module]) -> bool:
    """Return whether what is saved is not what this rank holds.

    Args:
        model: The model.
        modules: Its sharded modules.
    """
    return any(map(is_fsdp1, modules)) and not is_local(model)


def whole(
    model: nn.Module, live: Sequence[Tensor], values: Sequence[Tensor]
) -> Dict[str, Tensor]:
    """Return the model's ``state_dict`` with other pieces in it, on rank 0.

    The other ranks get an empty dict; call it on all of them.

    Args:
        model: The model.
        live: Pieces of the model.
        values: What they are to hold.
    """
    with _holding(model, live, values), _whole_state(model):
        mine = {piece.untyped_storage().data_ptr() for piece in live}
        state = {
            # a copy, but for what the wrapper does not manage
            name: value.clone()
            if value.untyped_storage().data_ptr() in mine
            else value.cpu()
            for name, value in model.state_dict().items()
            if isinstance(value, Tensor)
        }
    return state if dist.get_rank() == 0 else {}


def cut(
    model: nn.Module, live: Sequence[Tensor], given: Mapping[str, Tensor]
) -> List[Tensor]:
    """Return whole tensors in the pieces that the model holds.

    A piece of which nothing is given is that of the model.

    Args:
        model: The model; it is left as it is.
        live: Pieces of the model.
        given: Whole tensors by name, on all ranks.
    """
    with _holding(model, live, live), _whole_state(model, everywhere=True):
        model.load_state_dict(dict(given), strict=False)
        return [piece.detach().clone() for piece in live]


def layout(model: nn.Module) -> Dict[str, Tensor]:
    """Return whole tensors by name on every rank, for their shapes."""
    with _whole_state(model, everywhere=True):
        return {
            name: value
            for name, value in model.state_dict().items()
            if isinstance(value, Tensor)
        }


def _whole_state(model: nn.Module, everywhere: bool = False) -> Any:
    from torch.distributed.fsdp import (
        FullStateDictConfig,
        FullyShardedDataParallel,
        StateDictType,
    )

    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    return FullyShardedDataParallel.state_dict_type(
        model,
        StateDictType.FULL_STATE_DICT,
        # offloaded on a CPU, torch 2.13 dies
        FullStateDictConfig(
            offload_to_cpu=on_gpu and not everywhere,
            rank0_only=not everywhere,
        ),
    )


@contextlib.contextmanager
def _holding(
    model: nn.Module, live: Sequence[Tensor], values: Sequence[Tensor]
) -> Iterator[None]:
    """Run the body with other pieces in a model; then they are as before."""
    aside = [piece.detach().clone() for piece in live]
    try:
        for piece, value in zip(live, values):
            piece.data.copy_(value)
        yield
    finally:
        for piece, before in zip(live, aside):
            piece.data.copy_(before)
