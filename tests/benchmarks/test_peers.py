"""What is timed is an average: each peer's numbers follow its formula."""

import numpy as np
import pytest
import torch

from benchmarks import models, peers
from tests.oracle import average, relative_error

UPDATES_OF_MAKE = 3
# not one of the tied tensors, which some average once for each of their names
NAMES = ('backbone.stem.0.conv.weight', 'backbone.stem.0.bn.running_mean')


def constant(n):
    return peers.DECAY


def of_mmdet(n):
    # its class counts updates from 0
    return peers.DECAY * (1 - np.exp(-n / 2000))


def of_ema_pytorch(n):
    # it counts from 0 too, and ramps up with the power 2/3
    return min(1 - n ** (-2 / 3), peers.DECAY)


DECAYS = {
    'mmdet `ExpMomentumEMA`': of_mmdet,
    'ema-pytorch `EMA`': of_ema_pytorch,
}


@pytest.mark.parametrize('name', [n for n in peers.PEERS if n != peers.FLOOR])
def test_peer_averages_parameters_and_float_buffers(name):
    """After four steps each average is that of NumPy in float64."""
    model = models.build('rtmdet-tiny')
    start = numbers(model.state_dict())
    peer = made(name, model)
    steps = []

    for _ in range(4):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1)
        before = numbers(model.state_dict())
        peer.update()
        steps.append(numbers(model.state_dict()))
        assert all(np.array_equal(before[k], steps[-1][k]) for k in NAMES)

    decay = DECAYS.get(name, constant)
    found = numbers(peer.named())
    for key in NAMES:
        expected = average(
            start[key],
            [step[key] for step in steps],
            lambda n: decay(n + UPDATES_OF_MAKE),
        )
        # float32 rounds to 6e-8 of the value; a few of these add up
        assert relative_error(found[key], expected) < 1e-6


@pytest.mark.parametrize('name', peers.COMPARED['swap'])
def test_swap_leaves_the_model_as_it_was(name):
    """In and out again: no weight changes."""
    model = models.build('rtmdet-tiny')
    peer = made(name, model)
    before = numbers(model.state_dict())

    peer.swap()

    after = numbers(model.state_dict())
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_floor_is_as_large_as_the_floats_of_the_model():
    """Tied tensors count once."""
    model = models.build('rtmdet-tiny')
    tensors = [*model.parameters(), *model.buffers()]
    floats = [t for t in tensors if t.is_floating_point()]

    (flat,) = peers.make(peers.FLOOR, model).named().values()

    assert sum(t.nbytes for t in floats) == flat.nbytes == 19_655_928


@pytest.mark.parametrize('count', peers.COUNTS)
def test_floor_of_several_averages(count):
    """It writes as many averages of the size of the model."""
    model = models.build('rtmdet-tiny')

    floor = peers.make(f'{peers.FLOOR} of {count}', model).named()

    assert sum(x.nbytes for x in floor.values()) == count * 19_655_928


def made(name, model):
    try:
        return peers.make(name, model)
    except ModuleNotFoundError as error:
        pytest.skip(f'{name} is not installed: {error}')


def numbers(named):
    return {
        key: tensor.detach().numpy().astype('float64')
        for key, tensor in named.items()
        if key in NAMES
    }
