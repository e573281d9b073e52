"""What is timed is an average: each peer's numbers follow its formula."""

import numpy as np
import pytest
import torch

from benchmarks import peers
from benchmarks.loading import (
    NotInstalledError,
    find_peers,
    load,
    load_file,
)
from benchmarks.modules import build_module
from benchmarks.shapes import records_of
from tests.oracle import relative_error

UPDATES_OF_MAKE = 3
STEPS = 4
# float32 rounds to 6e-8 of the value; a few of these add up
TOLERANCE = 1e-6


def constant(n):
    return 0.9998


def of_mmdet(n):
    # its class counts updates from 0
    return 1 - ((1 - 0.9998) + 0.9998 * np.exp(-n / 2000))


def of_ema_pytorch(n):
    # it counts from 0 too, and ramps up with the power 2/3
    return min(1 - (1 + (n - 1)) ** (-2 / 3), 0.9998)


DECAYS = {
    'ours': constant,
    'ours-ramp': lambda n: 0.9,
    'ours-ignore': constant,
    'ours-host': constant,
    'ours-overlap': constant,
    'mmengine': constant,
    'mmengine-buffers': constant,
    'mmdet': of_mmdet,
    'mmdet-buffers': of_mmdet,
    'torch': constant,
    'ema-pytorch': of_ema_pytorch,
    'timm': constant,
}


@pytest.fixture(autouse=True)
def _peers():
    find_peers()


@pytest.mark.parametrize('name', DECAYS)
def test_peer_averages_every_weight(name):
    """After every step each average is that of NumPy float64."""
    model = build_module(records_of('3x3072'))
    peer = made(name, model)
    expected = float64(dict(model.named_parameters()))

    for n in range(UPDATES_OF_MAKE + 1, UPDATES_OF_MAKE + STEPS + 1):
        peer.before_step()
        move(model)
        peer.update()
        peer.settle()
        decay = DECAYS[name](n)
        for key, weight in float64(dict(model.named_parameters())).items():
            expected[key] = decay * expected[key] + (1 - decay) * weight

    found = float64(peer.named())
    for key, value in expected.items():
        assert relative_error(found[key], value) < TOLERANCE


@pytest.mark.parametrize('name', DECAYS)
def test_peer_leaves_the_model_alone(name):
    """An update changes no weight of the model."""
    model = build_module(records_of('3x3072'))
    before = float64(dict(model.named_parameters()))

    peer = made(name, model)
    peer.update()
    peer.settle()

    after = float64(dict(model.named_parameters()))
    for key, value in before.items():
        assert np.array_equal(value, after[key])


@pytest.mark.parametrize(
    'name', [n for n in DECAYS if n not in ('mmengine', 'mmdet')]
)
def test_peer_averages_float_buffers(name):
    """Means and variances of BatchNorm are averaged, not copied."""
    model = build_module(records_of('rtmdet-tiny'))
    peer = made(name, model)
    key = 'backbone.stem.0.bn.running_mean'
    before = model.get_buffer(key).clone()

    peer.before_step()
    model.get_buffer(key).add_(1)
    peer.update()
    peer.settle()

    found = peer.named()[key]
    assert not torch.equal(before, found)
    assert not torch.equal(model.get_buffer(key), found)


def test_floor_reads_and_writes_every_float_of_the_model():
    """The floor is as large as the model's float tensors together."""
    model = build_module(records_of('rtmdet-tiny'))
    # the frozen mean and variance of the pictures are two of them
    bytes_of_model = 19_655_928

    average = peers.make('floor', model).average

    assert bytes_of_model == average.numel() * average.element_size()


def test_every_peer_has_a_label():
    """No table can meet a name that it does not know."""
    assert peers.PEERS.keys() <= peers.LABELS.keys()


def test_missing_package_is_said_to_be_missing():
    """A peer that is not there is no error of the benchmark."""
    with pytest.raises(NotInstalledError, match='no_such_package'):
        load('no_such_package')
    with pytest.raises(NotInstalledError, match='no_such_package'):
        load_file('no_such_package', 'average.py')


def made(name, model):
    try:
        return peers.make(name, model)
    except NotInstalledError as error:
        pytest.skip(f'{name} is not installed: {error}')


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.1)


def float64(named):
    return {
        key: tensor.detach().numpy().astype('float64')
        for key, tensor in named.items()
    }
