"""The tensors of real detectors, in modules that any average can take.

``shapes.json`` has them by name, shape, dtype and kind, so that a measurement
needs torch alone. ``python -m benchmarks.models`` writes it from mmdet's own
configs.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List

import torch
from torch import Tensor, nn

PATH = Path(__file__).with_name('shapes.json')
SHAPES: Dict[str, List[List[Any]]] = json.loads(PATH.read_text())
"""Rows of name, shape, dtype, kind and, if tied, the name it is tied to.

Kinds: 'parameter', 'frozen', 'buffer' and 'unsaved', a buffer that is not in
the ``state_dict``.
"""
CONFIGS = {
    'rtmdet-tiny': 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'yolox-s': 'yolox/yolox_s_8xb8-300e_coco.py',
    'retinanet-r50': 'retinanet/retinanet_r50_fpn_1x_coco.py',
}
# as in the configs of DINO and Mask2Former
SWIN_L = dict(
    type='SwinTransformer',
    pretrain_img_size=384,
    embed_dims=192,
    depths=[2, 2, 18, 2],
    num_heads=[6, 12, 24, 48],
    window_size=12,
)


def build(name: str, device: str = 'cpu') -> nn.Module:
    """Build nested modules with the tensors of a model under their names.

    Modules without tensors (activations) are left out, which flatters the
    averages that walk through the modules at every update.

    Args:
        name: A model of ``shapes.json``.
        device: Where the tensors are. Defaults to 'cpu'.

    Returns:
        The module; its values are the same at every call.
    """
    values = torch.Generator().manual_seed(0)
    root = nn.Module()
    tensors: Dict[str, Tensor] = {}
    for key, shape, dtype, kind, *tied in SHAPES[name]:
        tensor = torch.zeros(shape, dtype=getattr(torch, dtype))
        if tensor.is_floating_point():
            # not so small that products are denormal, which is slow
            tensor.normal_(0, 0.02, generator=values)
        tensor = tensor.to(device)
        if kind in ('parameter', 'frozen'):
            tensor = nn.Parameter(tensor, requires_grad=kind == 'parameter')
        tensor = tensors[key] = tensors[tied[0]] if tied else tensor

        *parents, leaf = key.split('.')
        owner = root
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor, persistent=kind == 'buffer')
    return root


def build_real(name: str) -> nn.Module:
    """Build mmdet's own model of that name, untrained."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import ConfigDict
    from mmengine.hub import get_config

    register_all_modules()
    config = ConfigDict(SWIN_L)
    if name in CONFIGS:
        config = get_config(f'mmdet::{CONFIGS[name]}').model
        # pretrained weights would be downloaded, and change no time
        config.backbone.init_cfg = None
    model: nn.Module = MODELS.build(config)
    return model


def rows_of(model: nn.Module) -> Iterator[List[Any]]:
    """Yield the rows of a model, tied tensors under every name."""
    saved = model.state_dict()
    first: Dict[int, str] = {}
    named = itertools.chain(
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    )
    for name, tensor in named:
        kind = 'buffer' if name in saved else 'unsaved'
        if isinstance(tensor, nn.Parameter):
            kind = 'parameter' if tensor.requires_grad else 'frozen'
        dtype = str(tensor.dtype).partition('.')[2]
        row = [name, list(tensor.shape), dtype, kind]
        tied = first.setdefault(id(tensor), name)
        yield row if tied == name else [*row, tied]


def write() -> None:
    """Write the file, one tensor a line."""
    models = []
    for name in (*CONFIGS, 'swin-l'):
        rows = ',\n  '.join(map(json.dumps, rows_of(build_real(name))))
        models.append(f'"{name}": [\n  {rows}\n]')
    PATH.write_text('{\n' + ',\n'.join(models) + '\n}\n')


if __name__ == '__main__':
    write()
