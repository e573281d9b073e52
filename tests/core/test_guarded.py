"""Averages that keep NaN and Inf out by themselves."""

import numpy as np
import pytest
import torch

from mmdet_ema.core.guarded import GuardedUpdate
from mmdet_ema.core.kernels import reference_update
from mmdet_ema.core.native.update import can_update
from tests.core.models import raw_bytes
from tests.core.test_kernels import DECAYS, paired, refill, seeded, strided

NAN = float('nan')
KINDS = (torch.float32, torch.bfloat16, torch.float16)


def guarded(dtype):
    """Return pairs of all layouts that are taken, and what updates them."""
    generator = seeded(11)
    averages, raws = paired(strided(dtype, generator), dtype)
    pairs = [p for p in zip(averages, raws) if can_update(*p)]
    averages, raws = map(list, zip(*pairs))
    return averages, raws, GuardedUpdate(averages, raws), generator


def bits(tensors):
    return [raw_bytes(tensor) for tensor in tensors]


@pytest.mark.parametrize('dtype', KINDS, ids=str)
def test_thousand_steps_of_every_layout(dtype):
    """1000 steps have the bits of the plain twin, every tenth one is bad."""
    if not can_update(torch.zeros(1), torch.zeros(1)):
        pytest.skip('no compiled kernels for this processor')
    averages, raws, update, generator = guarded(dtype)
    assert 4 == len(averages)
    twins = [average.clone() for average in averages]
    choices = np.random.default_rng(1)
    for step in range(1000):
        refill(raws, dtype, generator)
        decay = float(choices.choice([*DECAYS, choices.random()]))
        if step % 10 == 9:
            raw = raws[int(choices.integers(len(raws)))]
            kept = raw.clone()
            raw[(-1,) * raw.dim()] = NAN
            assert not update.update(decay, gated=True)
            assert bits(twins) == bits(averages)
            raw.copy_(kept)
        assert update.update(decay, gated=True)
        for twin, raw in zip(twins, raws):
            reference_update(twin, raw, decay)
        assert bits(twins) == bits(averages), (step, decay)


@pytest.mark.parametrize('decay', [0.25, 0.75, 0.9999])
def test_weights_that_no_longer_fit(decay):
    """Weights in another order, or of another dtype, go torch's way."""
    raws = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    averages = [raw.detach().clone() for raw in raws]
    update = GuardedUpdate(averages, raws)
    with torch.no_grad():
        raws[1].data = raws[1].data.t()
        expected = [
            decay * a.double() + (1 - decay) * r.double()
            for a, r in zip(averages, raws)
        ]
        raws[2].data[3, 3], kept = NAN, raws[2].data[3, 3].item()
        before = bits(averages)
        assert not update.update(decay, gated=True)
        assert before == bits(averages)
        raws[2].data[3, 3] = kept
        assert update.update(decay, gated=True)
    for average, wanted in zip(averages, expected):
        # three roundings of values below 4
        torch.testing.assert_close(
            average.double(), wanted, rtol=0, atol=4 * 3 * 2.0**-24
        )


def test_nothing_to_guard():
    """Without pairs nothing is done, and every step is good."""
    update = GuardedUpdate([], [])
    assert not update
    assert update.update(0.5, gated=True)
