"""What the toys of both generations are made of: data, layers, optimizer."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset


class Samples(Dataset):
    """Deterministic data: two runs see the same batches."""

    def __init__(self, size, seed):
        draw = np.random.RandomState(seed)
        self.inputs = draw.randn(size, 4).astype('float32')

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return dict(inputs=torch.from_numpy(self.inputs[index]))


def add_layers(model, classes):
    """BatchNorm, tied weights, a bfloat16 and a frozen parameter."""
    model.first = nn.Linear(4, 4)
    model.norm = nn.BatchNorm1d(4)
    model.tied = nn.Linear(4, 4)
    model.tied.weight = model.first.weight
    model.head = nn.Linear(4, classes)
    model.frozen = nn.Linear(4, 4).requires_grad_(False)
    model.low = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))


@torch.no_grad()
def set_weights(model):
    for parameter in model.parameters():
        values = torch.linspace(-1, 1, parameter.numel())
        parameter.copy_(values.view_as(parameter) + 0.3)


def outputs(model, inputs):
    out = model.tied(model.norm(model.first(inputs))) + model.frozen(inputs)
    return model.head(out * model.low.float())


def loss_of(out):
    return (out**2).mean() + out.sin().mean()


class RecordingSGD(torch.optim.SGD):
    """Records the whole state of the model after every real step."""

    def watch(self, model):
        self.model, self.records = model, []
        return self

    def step(self, closure=None):
        loss = super().step(closure)
        self.records.append(state_of(self.model))
        return loss


def state_of(model):
    """Copy the ``state_dict`` of a model."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(left, right):
    """Names of the tensors that differ in a bit between two states."""
    assert left.keys() == right.keys()
    return [k for k in left if not torch.equal(left[k], right[k])]
