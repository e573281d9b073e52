"""Weight decay scaled to a nominal batch size."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mmdet_ema.optimizers.nominal import mark, remind, scale_weight_decay
from tests.optimizers.logs import Lines

DECAY = 5e-4


def optimizer_of(nominal=64, samples=None):
    """Return an optimizer with a decayed and an undecayed group."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(
        [
            dict(params=[model.weight], name='weight', weight_decay=DECAY),
            dict(params=[model.bias], name='bias', weight_decay=0.0),
        ],
        lr=0.1,
    )
    mark(optimizer, nominal, samples)
    return optimizer


def scale(optimizer, samples):
    """Scale to samples a step; return what was logged."""
    log = Lines()
    scale_weight_decay([optimizer], samples, log)
    return log


def decays(optimizer):
    """Return the weight decay of each group."""
    return [group['weight_decay'] for group in optimizer.param_groups]


@pytest.mark.parametrize('batch', [1, 2, 8, 16, 32, 48, 64, 100, 128, 256])
@pytest.mark.parametrize('ranks', [1, 8])
def test_formula(batch, ranks):
    """The decay is that of the formula, with the published accumulation."""
    counts = max(round(64 / (batch * ranks)), 1)
    expected = np.float64(DECAY) * batch * ranks * counts / 64
    optimizer = optimizer_of()
    scale(optimizer, batch * ranks * counts)
    # two roundings in another order
    np.testing.assert_allclose(decays(optimizer)[0], expected, rtol=1e-15)
    assert 0.0 == decays(optimizer)[1]


def test_once():
    """A second call with the same samples changes and says nothing."""
    optimizer = optimizer_of()
    (line,) = scale(optimizer, 16).all
    assert "group 'weight' 0.0005 -> 0.000125" in line
    assert [] == scale(optimizer, 16).all
    assert [DECAY / 4, 0.0] == decays(optimizer)


@pytest.mark.parametrize('samples', [16, 32])
def test_resume(samples):
    """A loaded state is not scaled twice, but to other samples a step."""
    saved, resumed = optimizer_of(), optimizer_of()
    scale(saved, 16)
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    lines = scale(resumed, samples).infos
    assert [DECAY * samples / 64, 0.0] == decays(resumed)
    assert (samples != 16) == any('16 before' in line for line in lines)


@pytest.mark.parametrize(
    ('nominal', 'samples', 'factor'),
    [(None, None, 1), (32, None, 0.5), (64, 128, 2)],
)
def test_what_the_user_gave(nominal, samples, factor):
    """The nominal batch size and the samples are used; None scales nothing."""
    optimizer = optimizer_of(nominal, samples)
    assert (nominal is not None) == bool(scale(optimizer, 16).infos)
    assert [DECAY * factor, 0.0] == decays(optimizer)


def test_other_optimizers_are_left_alone():
    """An optimizer of another constructor keeps its weight decay."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1, weight_decay=DECAY)
    assert [] == scale(optimizer, 16).all
    assert [DECAY] == decays(optimizer)


@pytest.mark.parametrize('scaled', [False, True])
def test_reminder(scaled):
    """One warning at the first step, if nobody has scaled by then."""
    optimizer, lines = optimizer_of(), Lines()
    remind(optimizer, lines)
    if scaled:
        scale(optimizer, 64)
    assert [] == lines.warnings
    optimizer.step()
    optimizer.step()
    assert (0 if scaled else 1) == len(lines.warnings)
    for line in lines.warnings:
        assert 'NOT scaled' in line
        assert 'batch_size=' in line


def test_scheduler_of_weight_decay():
    """A scheduler that was built before the scaling is warned of."""
    optimizer = optimizer_of()
    optimizer.param_groups[0]['initial_weight_decay'] = DECAY
    (line,) = scale(optimizer, 16).warnings
    assert 'scheduler of weight_decay' in line
