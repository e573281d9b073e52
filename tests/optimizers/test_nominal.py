"""Weight decay scaled to a nominal batch size."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mmdet_ema.optimizers.nominal import (
    is_waiting,
    mark,
    remind,
    scale_weight_decay,
)

DECAY = 5e-4


class Lines:
    """Keeps what is logged."""

    def __init__(self):
        self.infos, self.warnings = [], []

    def info(self, text):
        self.infos.append(text)

    def warning(self, text):
        self.warnings.append(text)


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


def decays(optimizer):
    """Return the weight decay of each group."""
    return [group['weight_decay'] for group in optimizer.param_groups]


def step(optimizer):
    """Take a step."""
    for group in optimizer.param_groups:
        for parameter in group['params']:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize('batch', [1, 2, 8, 16, 32, 48, 64, 100, 128, 256])
@pytest.mark.parametrize('ranks', [1, 8])
def test_formula(batch, ranks):
    """The decay is that of the formula, with the published accumulation."""
    counts = max(round(64 / (batch * ranks)), 1)
    samples = batch * ranks * counts
    expected = np.float64(DECAY) * batch * ranks * counts / 64
    optimizer = optimizer_of()
    scale_weight_decay([optimizer], samples, Lines())
    # two roundings in another order
    np.testing.assert_allclose(decays(optimizer)[0], expected, rtol=1e-15)
    assert 0.0 == decays(optimizer)[1]


def test_once():
    """A second call with the same samples changes and says nothing."""
    optimizer, lines = optimizer_of(), Lines()
    scale_weight_decay([optimizer], 16, lines)
    scale_weight_decay([optimizer], 16, lines)
    assert [DECAY / 4, 0.0] == decays(optimizer)
    assert 1 == len(lines.infos)
    assert "group 'weight' 0.0005 -> 0.000125" in lines.infos[0]


def test_resume_does_not_scale_twice():
    """The state of a scaled optimizer is not scaled when it is loaded."""
    saved = optimizer_of()
    scale_weight_decay([saved], 16, Lines())
    resumed = optimizer_of()
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    scale_weight_decay([resumed], 16, Lines())
    assert decays(saved) == decays(resumed)


def test_resume_with_another_batch_size():
    """A resume with other samples a step has the decay of these samples."""
    saved = optimizer_of()
    scale_weight_decay([saved], 16, Lines())
    resumed, lines = optimizer_of(), Lines()
    resumed.load_state_dict(saved.state_dict())
    scale_weight_decay([resumed], 32, lines)
    assert [DECAY / 2, 0.0] == decays(resumed)
    assert '16 before' in lines.infos[0]


def test_samples_of_the_user_go_first():
    """Samples that the user gave are not replaced by those of a hook."""
    optimizer = optimizer_of(samples=128)
    scale_weight_decay([optimizer], 16, Lines())
    assert [DECAY * 2, 0.0] == decays(optimizer)


@pytest.mark.parametrize('nominal', [None, 32])
def test_nominal_batch_size(nominal):
    """Another nominal batch size is used; None scales nothing."""
    optimizer, lines = optimizer_of(nominal), Lines()
    scale_weight_decay([optimizer], 16, lines)
    assert [DECAY if nominal is None else DECAY / 2, 0.0] == decays(optimizer)
    assert (0 if nominal is None else 1) == len(lines.infos)


def test_other_optimizers_are_left_alone():
    """An optimizer that was not marked keeps its weight decay."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1, weight_decay=DECAY)
    scale_weight_decay([optimizer], 16, Lines())
    assert [DECAY] == decays(optimizer)


def test_reminder():
    """One warning at the first step, if nobody has scaled by then."""
    optimizer, lines = optimizer_of(), Lines()
    assert is_waiting(optimizer)
    remind(optimizer, lines)
    assert [] == lines.warnings
    step(optimizer)
    step(optimizer)
    assert 1 == len(lines.warnings)
    assert 'NOT scaled' in lines.warnings[0]
    assert 'batch_size=' in lines.warnings[0]


def test_no_reminder_when_scaled():
    """Nothing is said if a hook scaled before the first step."""
    optimizer, lines = optimizer_of(), Lines()
    remind(optimizer, lines)
    scale_weight_decay([optimizer], 64, lines)
    assert not is_waiting(optimizer)
    step(optimizer)
    assert [] == lines.warnings


def test_scheduler_of_weight_decay():
    """A scheduler that was built before the scaling is warned of."""
    optimizer, lines = optimizer_of(), Lines()
    optimizer.param_groups[0]['initial_weight_decay'] = DECAY
    scale_weight_decay([optimizer], 16, lines)
    assert 'scheduler of weight_decay' in lines.warnings[0]
