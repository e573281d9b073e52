"""Take one set of weights out of a checkpoint: to deploy, to fine-tune."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from torch import Tensor

from mmdet_ema.averaging.state import own_memory
from mmdet_ema.checkpoint import recipe as recipes
from mmdet_ema.checkpoint import saving
from mmdet_ema.checkpoint.compare import count_nonfinite
from mmdet_ema.checkpoint.contents import (
    Contents,
    Weights,
    holds,
    read_contents,
)
from mmdet_ema.checkpoint.format import WEIGHTS
from mmdet_ema.checkpoint.mapped import META
from mmdet_ema.errors import CheckpointError, OptionError

# what OpenMMLab's tools need to build and show a model
_META = ('CLASSES', 'PALETTE', 'dataset_meta', 'cfg', 'config')
_DTYPES = ('float16', 'bfloat16', 'float32', 'float64')


@dataclass
class Extracted:
    """Which weights were written, what was lost, notes on what was read."""

    path: str
    name: str
    role: str
    tensors: int
    lost: List[str]
    notes: List[str]


def extract(
    path: str,
    out: str,
    *,
    weights: Optional[str] = None,
    dtype: Optional[str] = None,
    add_hash: bool = False,
    safetensors: bool = False,
    force: bool = False,
    unsafe: bool = False,
    recipe: Optional[Dict[str, Any]] = None,
) -> Extracted:
    """Write a file with one set of weights, and what is needed to use them.

    It has ``state_dict`` and ``meta`` (class names and colours of the data
    set, and the config of the model): ``init_detector``, ``tools/test.py``
    and ``load_from`` take it. Optimizer and histories are left out.

    Args:
        path: The file to read.
        out: The file to write; ``'-'`` for the standard output.
        weights: ``'ema'``, ``'raw'`` or the name of an average. Defaults to
            the average that the file deploys; where it holds one set only, to
            that.
        dtype: What floating-point tensors become. Defaults to what they are.
        add_hash: Whether to name it ``OUT-<8 digits of its SHA-256>.pth``.
            Defaults to False.
        safetensors: Whether to write safetensors; also by the name of the
            file. Defaults to False.
        force: Whether to replace a file. Defaults to False.
        unsafe: Whether to run code that the file asks for. Defaults to False.
        recipe: Goes into the file. Defaults to that of this call.

    Raises:
        CheckpointError: If the file cannot be read or has no such weights.
        OptionError: If an option is wrong.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise OptionError(
            f'--dtype {dtype!r} is not known; use one of {", ".join(_DTYPES)}.'
        )
    if add_hash and out == saving.STDOUT:
        raise OptionError(
            '--hash goes into the name of a file, which the standard output '
            'has not; leave it out.'
        )
    saving.check_free(out, force or add_hash)
    contents = read_contents(path, unsafe=unsafe)
    name = contents.choose(weights)
    chosen = contents.sets[name]
    safetensors = safetensors or is_safetensors(out)
    if recipe is None:
        options = dict(weights=weights, dtype=dtype, safetensors=safetensors)
        recipe = recipes.make('extract', [path], options)
    recipe = {**recipe, 'holds': holds(contents, name)}
    wanted = None if dtype is None else getattr(torch, dtype)
    chosen = Weights(_cast(chosen.tensors, wanted), metadata=chosen.metadata)
    meta, unread = meta_for_use(contents)
    written = write_weights(
        *(chosen.state_dict(), meta, recipe, out),
        force=force,
        add_hash=add_hash,
        safetensors=safetensors,
    )
    lost = [f'{x} of meta, which only its own code reads' for x in unread]
    return Extracted(
        *(written, name, contents.sets[name].role, len(chosen.tensors)),
        *(lost, list(contents.notes)),
    )


def write_weights(
    state: Mapping[str, Tensor],
    meta: Dict[str, Any],
    recipe: Mapping[str, Any],
    out: str,
    *,
    force: bool = False,
    add_hash: bool = False,
    safetensors: bool = False,
) -> str:
    """Write one set of weights, its meta and recipe; return the path."""
    place = dict(force=force, add_hash=add_hash)
    if not safetensors and not is_safetensors(out):
        content = {'meta': meta, WEIGHTS: state}
        recipes.add(content, recipe)
        return saving.save(content, out, **place)
    metadata = {'format': 'pt', recipes.KEY: json.dumps(recipe)}
    try:
        if meta:
            metadata[META] = json.dumps(meta)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f'the meta of the file cannot be kept in safetensors ({error}); '
            f'write a .pth file.'
        ) from None
    return saving.save_safetensors(state, out, metadata, **place)


def is_safetensors(path: str) -> bool:
    """Return whether a file of this name is one of safetensors."""
    return path.endswith('.safetensors')


def meta_for_use(contents: Contents) -> Tuple[Dict[str, Any], List[str]]:
    """Return what tools need of ``meta``, and the names of what is lost."""
    meta = {k: contents.meta[k] for k in _META if k in contents.meta}
    return saving.plain(meta)


def _cast(
    tensors: Dict[str, Tensor], dtype: Optional[torch.dtype]
) -> Dict[str, Tensor]:
    """Return tensors with storages of their own, ties kept."""
    done: Dict[int, Tensor] = {}
    result: Dict[str, Tensor] = OrderedDict()
    for name, tensor in tensors.items():
        if id(tensor) not in done:
            new = tensor
            if dtype is not None and tensor.is_floating_point():
                new = tensor.to(dtype)
                if count_nonfinite(new) and not count_nonfinite(tensor):
                    raise CheckpointError(
                        f'{name} has values that {dtype} cannot hold; use '
                        f'--dtype bfloat16, or leave it as it is.'
                    )
            done[id(tensor)] = new
        result[name] = done[id(tensor)]
    return own_memory(result)
