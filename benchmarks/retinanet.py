"""The forward pass of mmdet's RetinaNet-R50 in plain torch."""

from __future__ import annotations

from typing import Mapping

import torch
from torch import Tensor
from torch.nn import functional


def forward(tensors: Mapping[str, Tensor], pictures: Tensor) -> Tensor:
    """Return a number that every output has a part in, instead of a loss.

    Args:
        tensors: Those of the model under their names in mmdet.
        pictures: Of shape (N, 3, H, W).
    """

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = tensors[f'{name}.weight'], tensors.get(f'{name}.bias')
        padding = weight.shape[-1] // 2
        return functional.conv2d(x, weight, bias, stride, padding)

    def norm(x: Tensor, name: str) -> Tensor:
        kinds = ('running_mean', 'running_var', 'weight', 'bias')
        mean, var, weight, bias = (tensors[f'{name}.{k}'] for k in kinds)
        return functional.batch_norm(x, mean, var, weight, bias, True)

    x = norm(conv(pictures, 'backbone.conv1', 2), 'backbone.bn1').relu()
    x = functional.max_pool2d(x, 3, 2, 1)
    features = []
    for layer, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            name = f'backbone.layer{layer}.{block}'
            stride = 2 if layer > 1 and block == 0 else 1
            y = norm(conv(x, f'{name}.conv1'), f'{name}.bn1').relu()
            y = norm(conv(y, f'{name}.conv2', stride), f'{name}.bn2').relu()
            y = norm(conv(y, f'{name}.conv3'), f'{name}.bn3')
            if block == 0:
                x = conv(x, f'{name}.downsample.0', stride)
                x = norm(x, f'{name}.downsample.1')
            x = (x + y).relu()
        features.append(x)

    tops = [
        conv(feature, f'neck.lateral_convs.{k}.conv')
        for k, feature in enumerate(features[1:])
    ]
    for k in (1, 0):
        size = tops[k].shape[-2:]
        tops[k] = tops[k] + functional.interpolate(tops[k + 1], size)
    levels = [conv(x, f'neck.fpn_convs.{k}.conv') for k, x in enumerate(tops)]
    levels.append(conv(features[-1], 'neck.fpn_convs.3.conv', 2))
    levels.append(conv(levels[-1], 'neck.fpn_convs.4.conv', 2))

    outputs = []
    for kind in ('cls', 'reg'):
        for x in levels:
            for k in range(4):
                x = conv(x, f'bbox_head.{kind}_convs.{k}.conv').relu()
            outputs.append(conv(x, f'bbox_head.retina_{kind}'))
    return torch.stack([output.square().mean() for output in outputs]).sum()
