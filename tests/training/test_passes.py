"""What a body does to a model and to random generators is undone."""

import contextlib
import operator
import random

import numpy as np
import pytest
import torch
from torch import nn

from mmdet_ema.training.passes import leaving_no_trace
from tests import needs


class Model(nn.Module):
    """Has something of every kind."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.number, self.items, self.table = 1.0, [1], {'a': 1}
        self.register_buffer('held', torch.zeros(3))
        self.register_buffer('empty', torch.zeros(0))


def replace_a_layer(model):
    model.first, model.norm = nn.Linear(3, 3), nn.Identity()


def delete_a_layer(model):
    del model.norm
    del model.held


def add(model):
    model.more, model.extra = 5, nn.Linear(1, 1)
    model.register_buffer('late', torch.ones(1))


def change_attributes(model):
    model.number = 2.0
    model.items.append(2)
    model.table.clear()
    model.norm.momentum = 0.5
    model.eval()


def write_buffers(model):
    model.held.fill_(float('nan'))
    model.norm.running_mean.add_(1)
    model.norm.num_batches_tracked.add_(1)


def replace_buffers(model):
    model.held.fill_(1)
    model.held = torch.full((3,), 2.0)


def resize_a_buffer(model):
    model.empty.resize_(4).fill_(1)


def description(model):
    """Every attribute and tensor of the modules, as text."""
    return [
        (name, {k: v for k, v in vars(m).items() if k[:1] != '_'}, repr(m))
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize('fails', [False, True])
@pytest.mark.parametrize(
    'change',
    [
        replace_a_layer,
        delete_a_layer,
        add,
        change_attributes,
        write_buffers,
        replace_buffers,
        resize_a_buffer,
    ],
)
def test_changes_are_undone(change, fails):
    """The model is as before, also where the body fails."""
    model = Model()
    items, table, buffer = model.items, model.table, model.held
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = repr(description(model))
    with contextlib.suppress(KeyError), leaving_no_trace(model):
        change(model)
        changed = repr(description(model)) + repr(model.state_dict())
        if fails:
            raise KeyError
    assert changed != before + repr(state)
    assert repr(description(model)) == before
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert (model.items, model.table) == ([1], {'a': 1})
    assert model.items is items
    assert model.table is table
    assert model.held is buffer


# before, it takes torch's hooks of optimizers away, for the tests that follow
COMPILE = needs.torch(2, 4, why='torch.compile leaves optimizers as they are')


@pytest.mark.parametrize(
    'of', ['jit.script', pytest.param('compile', marks=COMPILE)]
)
def test_modes_that_are_no_attributes(of):
    """A module of TorchScript, or compiled, keeps its mode elsewhere."""
    change = operator.attrgetter(of)(torch)
    model = nn.Sequential(change(nn.Linear(2, 2)), nn.Linear(2, 2).eval())
    # which has none
    frozen = torch.jit.freeze(torch.jit.script(nn.Linear(2, 2).eval()))
    before = [module.training for module in model.modules()]
    model.add_module('frozen', frozen)
    with leaving_no_trace(model):
        model.eval()
    del model.frozen
    assert before == [module.training for module in model.modules()]


def test_handles_of_hooks_still_remove_them():
    """A forward hook that was there is there, and its handle removes it."""
    model, calls = Model(), []
    handle = model.first.register_forward_hook(lambda *_: calls.append(1))
    with leaving_no_trace(model):
        model.first.register_forward_hook(lambda *_: calls.append(2))
        model.first(torch.zeros(1, 2))
    model.first(torch.zeros(1, 2))
    handle.remove()
    model.first(torch.zeros(1, 2))
    assert calls == [1, 2, 1]


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


@pytest.mark.parametrize('fails', [False, True])
def test_random_numbers_are_those_that_would_have_come(fails):
    """Python's, NumPy's and torch's generators go on as if nothing was."""
    model = Model()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with contextlib.suppress(KeyError), leaving_no_trace(model):
        draw()
        if fails:
            raise KeyError
    assert draw() == expected


def test_optimizer_still_holds_the_parameters():
    """Parameters are the same objects, and keep what the body wrote."""
    model = Model()
    before = dict(model.named_parameters())
    with leaving_no_trace(model):
        model.first.weight.data.fill_(3)
        model.first.weight = nn.Parameter(torch.zeros(1))
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert after['first.weight'].eq(3).all()
