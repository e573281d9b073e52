"""What the toys of both generations are made of: data, layers, optimizer."""

import copy

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from tests import oracle


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


class TracedRun:
    """A run with a ``recorder`` of its start and such an ``optimizer``."""

    @property
    def records(self):
        """States of the model after every optimizer step."""
        return self.optimizer.records

    def trace(self, key, steps=None):
        """Values of one tensor before and after every step, in float64."""
        start = self.recorder.start[key].double().numpy()
        return start, [r[key].double().numpy() for r in self.records[:steps]]

    def wrong(self, weights, decay_of, chosen=None):
        """Names of tensors that are not what the steps make of them.

        Args:
            weights: Tensors by name: floats are averages, integers copies.
            decay_of: Maps n to the decay.
            chosen: Which records were averaged; all by default.
        """
        found = {}
        for key, value in weights.items():
            start, values = self.trace(key)
            if chosen is not None:
                values = [values[i] for i in chosen]
            expected = np.asarray(values[-1] if values else start)
            if value.is_floating_point():
                expected = oracle.average(start, values, decay_of)
            error = oracle.relative_error(value.double(), expected)
            # float32 rounds each of up to 200 updates to 6e-8; a model
            # itself holds the average of a bfloat16 rounded to 8 bits
            allowed = 2**-8 if value.dtype == torch.bfloat16 else 1e-6
            if error > allowed:
                found[key] = error
        return found


def untied(model):
    """Nothing tied or low, where the frameworks' own hooks are right."""
    model.tied = copy.deepcopy(model.tied)
    model.low = nn.Parameter(torch.ones(4))
    return model


def state_of(model):
    """Copy the ``state_dict`` of a model."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(left, right):
    """Names of the tensors that differ in a bit between two states."""
    assert left.keys() == right.keys()
    return [k for k in left if not torch.equal(left[k], right[k])]
