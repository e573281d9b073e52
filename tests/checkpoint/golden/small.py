"""The model of the golden files, and what is noted of each."""

import json
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent
EXPECTED = HERE / 'expected.json'
STEPS = 7


class Small(nn.Module):
    """Parameters, BatchNorm statistics, and a weight of two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.head = nn.Linear(3, 2)

    def forward(self, inputs):
        """Return outputs."""
        return self.head(self.tied(self.norm(self.first(inputs))))


def batches(count=STEPS):
    """Return inputs of as many steps."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, generator=generator) for _ in range(count)]


def train(model, after_step, count=STEPS):
    """Train by plain SGD; the callback comes after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for inputs in batches(count):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        after_step()
    return optimizer


def values(weights):
    """Return tensors as lists of float64: what JSON keeps exactly."""
    return {
        name: tensor.detach().double().reshape(-1).tolist()
        for name, tensor in weights.items()
    }


def note(file, **known):
    """Note what is in a golden file, from the objects that were in memory.

    Args:
        file: Its name.
        **known: ``format``, ``writer``, ``real`` (whether that project's own
            code wrote it), ``n``, ``raw`` and ``ema``.
    """
    found = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    for half in ('raw', 'ema'):
        if known.get(half) is not None:
            known[half] = values(known[half])
    found[file] = known
    text = json.dumps(dict(sorted(found.items())), indent=0)
    EXPECTED.write_text(text + '\n')
