"""Write ``shapes.json``: the tensors of detectors, from mmdet's own configs.

Usage: python -m benchmarks.write_shapes
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from benchmarks.shapes import PATH, Record

CONFIGS = {
    'rtmdet-tiny': 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'yolox-s': 'yolox/yolox_s_8xb8-300e_coco.py',
    'retinanet-r50': 'retinanet/retinanet_r50_fpn_1x_coco.py',
}
# Swin-L as in the configs of DINO and Mask2Former
SWIN_L = dict(
    type='SwinTransformer',
    pretrain_img_size=384,
    embed_dims=192,
    depths=[2, 2, 18, 2],
    num_heads=[6, 12, 24, 48],
    window_size=12,
)


def build_models() -> dict[str, nn.Module]:
    """Build the detectors and the Swin-L backbone (1 GB), untrained."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.hub import get_config

    register_all_modules()
    configs = {n: get_config(f'mmdet::{p}').model for n, p in CONFIGS.items()}
    configs['swin-l'] = Config(dict(model=SWIN_L)).model
    return {name: MODELS.build(cfg) for name, cfg in configs.items()}


def describe(model: nn.Module) -> list[Record]:
    """List a model's tensors.

    Args:
        model: The model.

    Returns:
        One record a name, tied tensors under every name.
    """
    saved = model.state_dict(keep_vars=True)
    named = [*_named(model.named_parameters), *_named(model.named_buffers)]
    first: dict[int, str] = {}
    records = []
    for name, tensor in named:
        tied = first.setdefault(id(tensor), name)
        records.append(
            Record(
                name=name,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).replace('torch.', ''),
                kind=_kind(name, tensor, saved),
                tied_to=None if tied == name else tied,
            )
        )
    return records


def _named(of: Any) -> Any:
    return of(remove_duplicate=False)


def _kind(name: str, tensor: torch.Tensor, saved: dict[str, Any]) -> str:
    if isinstance(tensor, nn.Parameter):
        return 'parameter' if tensor.requires_grad else 'frozen'
    return 'buffer' if name in saved else 'unsaved'


def main() -> None:
    """Write the file, one tensor a line."""
    models = [
        f'"{name}": [\n  '
        + ',\n  '.join(json.dumps(r.as_row()) for r in describe(model))
        + '\n]'
        for name, model in build_models().items()
    ]
    PATH.write_text('{\n' + ',\n'.join(models) + '\n}\n', encoding='utf-8')


if __name__ == '__main__':
    main()
