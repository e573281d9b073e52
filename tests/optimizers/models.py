"""Models of torch alone, with what each of their parameters is by hand."""

import torch
from torch import nn

KINDS = {
    'token': 'other',
    'table_bias_table': 'other',
    'stem.weight': 'weight',
    'stem_norm.weight': 'norm',
    'stem_norm.bias': 'bias',
    'depthwise.weight': 'weight',
    'depthwise.bias': 'bias',
    'attention.in_proj_weight': 'weight',
    'attention.in_proj_bias': 'bias',
    'attention.bias_k': 'bias',
    'attention.bias_v': 'bias',
    'attention.out_proj.weight': 'weight',
    'attention.out_proj.bias': 'bias',
    'memory.weight_ih_l0': 'weight',
    'memory.weight_hh_l0': 'weight',
    'memory.bias_ih_l0': 'bias',
    'memory.bias_hh_l0': 'bias',
    'queries.weight': 'weight',
    'image_norm.weight': 'norm',
    'image_norm.bias': 'bias',
    'own_norm.weight': 'norm',
    'wide_norm.weight': 'norm',
    'wide_norm.bias': 'bias',
    'normed.weight': 'weight',
    'slope.weight': 'other',
    'scale.scale': 'other',
    'spectral.bias': 'bias',
    'spectral.parametrizations.weight.original': 'weight',
    'sparse.kernel': 'weight',
    'weights.0': 'weight',
    'weights.1': 'weight',
}


class RMSNorm(nn.Module):
    """A norm that is no subclass of torch's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class LayerNorm2d(nn.Module):
    """A norm over channels whose parameters have four dimensions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, 4, 1, 1))


class NormedLinear(nn.Linear):
    """A linear layer that normalizes its input, as mmdet has one."""


class Scale(nn.Module):
    """A learned factor, as FCOS has one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


class Sparse(nn.Module):
    """A convolution that calls its weight a kernel."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(27, 4, 4))


class Zoo(nn.Module):
    """A parameter of every sort; it cannot be run."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.table_bias_table = nn.Parameter(torch.zeros(169, 3))
        self.stem = nn.Conv2d(3, 4, 3, bias=False)
        self.stem_norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.memory = nn.GRU(4, 4)
        self.queries = nn.Embedding(5, 4)
        self.image_norm = nn.LayerNorm((4, 8, 8))
        self.own_norm = RMSNorm()
        self.wide_norm = LayerNorm2d()
        self.normed = NormedLinear(4, 4, bias=False)
        self.slope = nn.PReLU()
        self.scale = Scale()
        self.spectral = nn.utils.parametrizations.spectral_norm(
            nn.Linear(4, 4)
        )
        self.sparse = Sparse()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.ones(4, 4)) for _ in range(2)
        )


class Tied(nn.Module):
    """A tied weight, a shared module and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3)
        self.frozen = nn.Conv2d(4, 4, 3).requires_grad_(False)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.shared = nn.Sequential(self.first, nn.LayerNorm(4))


def rows(optimizer, model):
    """Return parameter -> (group, lr, weight decay), each parameter once."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [
        (names[id(p)], (g['name'], g['lr'], g['weight_decay']))
        for g in optimizer.param_groups
        for p in g['params']
    ]
    assert len(found) == len(dict(found)) == len(names)
    return dict(found)
