"""Buffers and named tensors in a run of mmengine's own Runner."""

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from mmdet_ema import EMAHook
from mmdet_ema.averaging import OptionError
from tests import oracle
from tests.for_mmengine.toy import Run, ToyModel, same

NAN = float('nan')


def log_of(work_dir):
    """The run's log, its lines joined."""
    path = max(work_dir.glob('*/*.log'))
    return ' '.join(path.read_text().split())


def test_named_tensors_are_copied(tmp_path):
    """``copied`` names tensors that stay out of the average, in one option."""
    hook = dict(
        type='EMAHook', schedule='constant', decay=0.9, copied=['norm.run*']
    )
    run = Run(tmp_path, hook).train()
    saved = run.load('epoch_2.pth')['state_dict']
    for key in ('norm.running_mean', 'norm.running_var'):
        assert torch.equal(run.records[-1][key], saved[key])
    expected = oracle.average(*run.trace('head.weight'), lambda n: 0.9)
    assert oracle.relative_error(saved['head.weight'], expected) < 1e-6


def test_pattern_that_matches_nothing_is_warned_of_once(tmp_path, recwarn):
    """The log names it; Python's own warnings do not repeat it."""
    Run(tmp_path, dict(type='EMAHook', copied=('head.*', 'neck.*'))).train()
    log = log_of(tmp_path)
    assert 1 == log.count("copied=['neck.*']: no parameter or buffer")
    assert 'head.*' not in log
    assert not [w for w in recwarn if 'copied=' in str(w.message)]


@pytest.mark.parametrize('value', ['head.*', None, [1], ['']])
def test_bad_patterns(value):
    """What is no list of names is refused before anything is built."""
    with pytest.raises(OptionError, match=r'copied=.* use a list of names'):
        EMAHook(copied=value)


class Spoil(Hook):
    """Makes one tensor NaN from an iteration on."""

    def __init__(self, name, iteration):
        self.name, self.iteration = name, iteration

    def before_train_iter(self, runner, *args, **kwargs):
        if runner.iter >= self.iteration:
            runner.model.state_dict()[self.name][0] = NAN


def test_statistics_with_nan_are_named(tmp_path):
    """No step is skipped; the average stays, and the log says which."""
    hook = dict(type='EMAHook', schedule='constant', decay=0.9)
    spoil = Spoil('norm.running_mean', 3)
    run = Run(tmp_path, spoil, hook).train()
    saved = run.load('epoch_2.pth')
    assert 8 == saved['ema_state_dict']['steps']
    start, values = run.trace('norm.running_mean')
    expected = oracle.average(start, values[:3], lambda n: 0.9)
    found = saved['state_dict']['norm.running_mean']
    assert oracle.relative_error(found, expected) < 1e-6
    log = log_of(tmp_path)
    assert 1 == log.count('the buffer norm.running_mean holds NaN or Inf')
    assert "copied=['norm.running_mean'] copies it" in log


def test_steps_that_are_skipped_on_and_on(tmp_path):
    """At the tenth the log says what to do."""
    hook = dict(type='EMAHook', decay=0.9)
    Run(tmp_path, Spoil('first.weight', 2), hook, max_epochs=4).train()
    log = log_of(tmp_path)
    assert 2 == log.count('left NaN or Inf in low;')
    assert 1 == log.count('resume from a file from before it')
    assert "copied=['low']" in log


def test_resume_from_weights_that_are_nan(tmp_path):
    """Averages of a stopped run are those of the run that went on."""

    def train(name, epochs, **options):
        hook = dict(type='EMAHook', decay=0.9, tau=2)
        hooks = Spoil('head.weight', 6), hook
        return Run(tmp_path / name, *hooks, max_epochs=epochs, **options)

    whole = train('whole', 3).train().load('epoch_3.pth')
    train('parts', 2).train()
    parts = train('parts', 3, resume=True).train().load('epoch_3.pth')
    left, right = whole['state_dict'], parts['state_dict']
    assert [] == same(left, right)
    assert all(np.isfinite(value.double()).all() for value in left.values())
    assert 6 == parts['ema_state_dict']['steps']
    assert 'are copied, not averaged' not in log_of(tmp_path / 'parts')


class Hidden(ToyModel):
    """Has masks of the kinds that people keep in buffers."""

    def __init__(self):
        super().__init__()
        mask = torch.full((3, 3), torch.finfo(torch.float32).min)
        self.register_buffer('lowest', mask.triu(1))
        mask = torch.full((3, 3), -float('inf'))
        self.register_buffer('infinite', mask.triu(1))
        self.spectral = nn.utils.parametrizations.spectral_norm(
            nn.Linear(4, 4)
        )

    def forward(self, inputs, mode='tensor'):
        return super().forward(self.spectral(inputs), mode)


@pytest.mark.parametrize('update_buffers', [True, False])
def test_masks_and_unit_vectors(tmp_path, update_buffers):
    """The file holds them as the model does, and no step is skipped."""
    hook = dict(type='EMAHook', decay=0.9, update_buffers=update_buffers)
    run = Run(tmp_path, hook, model=Hidden()).train()
    saved = run.load('epoch_2.pth')
    assert 8 == saved['ema_state_dict']['steps']
    vectors = [
        name for name in saved['state_dict'] if name[-3:] in ('._u', '._v')
    ]
    for name in ('lowest', 'infinite', *vectors):
        assert torch.equal(run.records[-1][name], saved['state_dict'][name])
    assert 2 == len(vectors)
    assert '8 steps averaged, 0 skipped' in log_of(tmp_path)
    assert 'holds NaN' not in log_of(tmp_path)
