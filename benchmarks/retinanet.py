"""A RetinaNet-R50 in plain torch: mmdet's weights, without its losses.

It makes a training step of the right size where mmdet is not installed.
A test compares its tensors with those of mmdet's model.
"""

from __future__ import annotations

from typing import List

import torch
from torch import Tensor, nn
from torch.nn import functional

_BLOCKS = (3, 4, 6, 3)
_ANCHORS, _CLASSES = 9, 80


class _Bottleneck(nn.Module):
    """Three convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *_normed(inputs, width, 1),
            nn.ReLU(inplace=True),
            *_normed(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_normed(width, outputs, 1),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential(
            *([] if same else _normed(inputs, outputs, 1, stride))
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.relu(self.body(inputs) + self.shortcut(inputs))


class RetinaNet(nn.Module):
    """ResNet-50, feature pyramid and both heads; the stem is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_normed(3, 64, 7, 2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        self.stages = nn.ModuleList(
            _stage(k, blocks) for k, blocks in enumerate(_BLOCKS)
        )
        for frozen in (self.stem, self.stages[0]):
            frozen.requires_grad_(False)
        self.laterals = nn.ModuleList(
            nn.Conv2d(c, 256, 1) for c in (512, 1024, 2048)
        )
        self.smooth = nn.ModuleList(_conv(256) for _ in range(3))
        self.coarse = nn.ModuleList(
            nn.Conv2d(c, 256, 3, 2, 1) for c in (2048, 256)
        )
        self.classify = _head(_ANCHORS * _CLASSES)
        self.regress = _head(_ANCHORS * 4)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return a number that every output has a part in."""
        levels = self._pyramid(pictures)
        outputs = [head(x) for head in self._heads() for x in levels]
        return torch.stack([out.square().mean() for out in outputs]).sum()

    def _heads(self) -> List[nn.Module]:
        return [self.classify, self.regress]

    def _pyramid(self, pictures: Tensor) -> List[Tensor]:
        x, features = self.stem(pictures), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        tops = [f(x) for f, x in zip(self.laterals, features[1:])]
        for k in (1, 0):
            size = tops[k].shape[-2:]
            tops[k] = tops[k] + functional.interpolate(tops[k + 1], size)
        sixth = self.coarse[0](features[-1])
        fine = [f(top) for f, top in zip(self.smooth, tops)]
        return [*fine, sixth, self.coarse[1](sixth)]


def _stage(k: int, blocks: int) -> nn.Sequential:
    width, inputs = 64 * 2**k, 64 if k == 0 else 128 * 2**k
    first = _Bottleneck(inputs, width, 1 if k == 0 else 2)
    rest = [_Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def _normed(
    inputs: int, outputs: int, kernel: int, stride: int = 1
) -> List[nn.Module]:
    convolution = nn.Conv2d(
        inputs, outputs, kernel, stride, kernel // 2, bias=False
    )
    return [convolution, nn.BatchNorm2d(outputs)]


def _conv(outputs: int) -> nn.Conv2d:
    return nn.Conv2d(256, outputs, 3, padding=1)


def _head(outputs: int) -> nn.Sequential:
    layers: List[nn.Module] = []
    for _ in range(4):
        layers += [_conv(256), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, _conv(outputs))
