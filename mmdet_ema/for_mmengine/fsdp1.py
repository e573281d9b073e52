"""mmengine's ``FSDPStrategy`` (FSDP1): what its files need to be resumed.

A whole file holds the states of an optimizer by name, where one of a single
process has numbers; and mmengine hands them to torch in an order of arguments
that torch 2.1 has changed. With ``state_dict_cfg='local'``, each rank writes a
file of its own, of tensors that torch 2.6 does not read any more.
"""

from __future__ import annotations

import os
import uuid
from collections import OrderedDict
from itertools import chain
from typing import Any, Dict, List, Mapping, MutableMapping, Optional, Sequence

import torch.distributed as dist
from torch import Tensor

from mmdet_ema.averaging.fsdp1 import is_fsdp1, is_local, pieces, plain
from mmdet_ema.averaging.state import check_fit
from mmdet_ema.checkpoint.files import read_structure
from mmdet_ema.errors import CheckpointError

Checkpoint = MutableMapping[str, Any]
_SET = 'ema_rank_files'


def prepare(runner: Any) -> None:
    """Let a strategy write and read what torch does, in this run."""
    strategy: Any = getattr(runner, 'strategy', None)
    model: Any = getattr(strategy, 'model', None)
    if not is_fsdp1(model) or 'load_optim_state_dict' in vars(strategy):
        return

    def load_optimizer(state: Dict[str, Any]) -> None:
        strategy.optim_wrapper.load_state_dict(
            model.optim_state_dict_to_load(
                model=model,
                optim=strategy.optim_wrapper.optimizer,
                optim_state_dict=state,
            )
        )

    def model_state() -> Dict[str, Tensor]:
        return {x.name: x.tensor.detach() for x in pieces(model)}

    def load_model(state: Mapping[str, Any], **options: Any) -> None:
        own = model_state()
        check_fit(own, state, strict=True)
        for name, piece in own.items():
            piece.copy_(state[name])

    strategy.load_optim_state_dict = load_optimizer
    if is_local(model):
        # they are only read where they were written: as they are
        strategy.model_state_dict = model_state
        strategy.load_model_state_dict = load_model
        strategy.optim_state_dict = lambda: strategy.optim_wrapper.state_dict()
        strategy.load_optim_state_dict = lambda state: (
            strategy.optim_wrapper.load_state_dict(state)
        )


def finish(model: Any, checkpoint: Checkpoint) -> None:
    """Make a checkpoint of FSDP1 one that can be resumed; on all ranks."""
    if is_local(model):
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name)
        # of a set that was not finished, some files are older
        checkpoint[_SET] = {
            'name': name[0],
            'rank': dist.get_rank(),
            'ranks': dist.get_world_size(),
        }
        return
    weights = checkpoint['state_dict']
    versions = getattr(weights, '_metadata', {})
    weights._metadata = OrderedDict(
        (plain(f'{path}.')[:-1], x) for path, x in versions.items()
    )
    state = checkpoint.get('optimizer', {})
    groups = state.get('param_groups', [])
    place = {name: i for i, name in enumerate(weights)}
    named = [sorted(x['params'], key=place.__getitem__) for x in groups]
    if named:
        number = {x: i for i, x in enumerate(chain.from_iterable(named))}
        slots = ((number[name], x) for name, x in state['state'].items())
        checkpoint['optimizer'] = {
            'state': dict(sorted(slots)),
            'param_groups': [
                {**group, 'params': [number[name] for name in names]}
                for group, names in zip(groups, named)
            ],
        }


def begin(
    model: Any,
    checkpoint: Checkpoint,
    optimizers: Sequence[Any],
    path: Optional[str],
) -> None:
    """Make a checkpoint what FSDP1 loads; on all ranks.

    This rank has read it from the local file, or folder of files, ``path``.
    """
    if is_local(model):
        _check_set(checkpoint.get(_SET), path)
        return
    if _SET in checkpoint:
        raise CheckpointError(
            "the file holds what one rank has (state_dict_cfg='local'); give "
            "the folder that it lies in, and state_dict_cfg='local'."
        )
    state, names = checkpoint.get('optimizer', {}), {}
    for piece in reversed(list(pieces(model))):  # the first name of tied ones
        names[id(piece.tensor)] = piece.inside or (piece.name,)
    place = {name: i for i, name in enumerate(checkpoint['state_dict'])}
    if any(isinstance(key, str) for key in state.get('state', ())):
        return  # by name already: without EMAHook
    for optimizer in optimizers if 'param_groups' in state else ():
        mine: List[List[str]] = [
            sorted(
                (name for x in group['params'] for name in names[id(x)]),
                key=lambda name: place.get(name, -1),
            )
            for group in optimizer.param_groups
        ]
        groups = state['param_groups']
        if [len(x['params']) for x in groups] != [*map(len, mine)]:
            raise CheckpointError(
                f'the optimizer of the checkpoint has groups of '
                f'{[len(x["params"]) for x in groups]} parameters, that of '
                f'this run {[*map(len, mine)]}; resume with the same '
                f'optimizer config, or use load_from without resume.'
            )
        number = {
            i: name
            for group, own in zip(groups, mine)
            for i, name in zip(group['params'], own)
        }
        checkpoint['optimizer'] = {
            'state': {number[i]: x for i, x in state['state'].items()},
            'param_groups': [
                {**group, 'params': own} for group, own in zip(groups, mine)
            ],
        }


def _check_set(mine: Any, folder: Optional[str]) -> None:
    here = {'rank': dist.get_rank(), 'ranks': dist.get_world_size()}
    if not isinstance(mine, Mapping):
        raise CheckpointError(
            "state_dict_cfg='local' reads a folder of files that it wrote "
            'itself, with EMAHook; to read a whole file, give '
            "state_dict_cfg=dict(state_dict_type='FULL_STATE_DICT', ...)."
        )
    if {key: mine.get(key) for key in here} != here:
        raise CheckpointError(
            f'the file of rank {mine.get("rank")} of {mine.get("ranks")} was '
            f'read by rank {here["rank"]} of {here["ranks"]}: files of '
            f"state_dict_cfg='local' resume on as many ranks as wrote them."
        )
    files = [f'rank{rank}.pth' for rank in range(here['ranks'])]
    there = os.listdir(folder) if folder else files
    missing = [name for name in files if name not in there]
    if missing:
        raise CheckpointError(
            f'{folder} has no {", ".join(missing)}: a run was killed while it '
            f'wrote the files of its ranks. Take another checkpoint.'
        )
    damaged = ''
    try:
        if folder:
            read_structure(os.path.join(folder, files[here['rank']]))
    except CheckpointError as error:
        damaged = str(error)
    found: List[Any] = [None] * here['ranks']
    dist.all_gather_object(found, (mine.get('name'), damaged))
    for _, damaged in found:
        if damaged:  # all stop together
            raise CheckpointError(damaged)
    if len({name for name, _ in found}) > 1:
        raise CheckpointError(
            'the files of the ranks in this folder were not written together: '
            'a run was killed while it wrote them. Take another checkpoint.'
        )
