"""Backbones of mmdet, of either generation, with their groups by hand."""

import re

from mmdet.models.backbones import ResNet, SwinTransformer
from torch import nn

# name -> kind: the first pattern that is found in the name
RESNET = [
    (r'(bn\d|downsample\.1)\.weight$', 'norm'),
    (r'(bn\d|downsample\.1)\.bias$', 'bias'),
    (r'conv_offset\.bias$', 'other'),
    (r'(conv\d|downsample\.0|conv_offset)\.weight$', 'weight'),
]
SWIN = [
    (r'(absolute_pos_embed|relative_position_bias_table)$', 'other'),
    (r'norm\d?\.weight$', 'norm'),
    (r'\.bias$', 'bias'),
    (r'\.(projection|qkv|proj|0|1|reduction)\.weight$', 'weight'),
]


def resnet(**options):
    """ResNet-50, its stem and first stage frozen."""
    return ResNet(50, frozen_stages=1, **options)


def dcn():
    """ResNet-50 with deformable convolutions in its last stage."""
    return resnet(
        dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, False, False, True),
    )


def swin():
    """Swin-T with tables of relative and absolute positions."""
    return SwinTransformer(use_abs_pos_embed=True)


class TiedFrozen(nn.Module):
    """Two heads with one weight on a backbone whose start is frozen."""

    def __init__(self):
        super().__init__()
        self.backbone = resnet()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight


TIED = [*RESNET, (r'first\.weight', 'weight'), (r'\.bias$', 'bias')]
MODELS = {
    'resnet': (resnet, RESNET),
    'swin': (swin, SWIN),
    'dcn': (dcn, RESNET),
    'tied': (TiedFrozen, TIED),
}
LR, DECAY, BATCH = 0.01, 5e-4, 16


def expected(name, model):
    """Return parameter -> (group, lr, scaled weight decay) by patterns."""
    patterns = MODELS[name][1]
    decays = dict(weight=DECAY * BATCH / 64, norm=0.0, bias=0.0, other=0.0)
    found = {}
    for leaf, _ in model.named_parameters():
        kind = next(kind for p, kind in patterns if re.search(p, leaf))
        found[leaf] = kind, LR, decays[kind]
    return found
