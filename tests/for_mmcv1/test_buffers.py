"""Buffers and named tensors in runs of mmcv."""

import pytest
import torch
from mmcv.runner import Hook

from mmdet_ema import EMAHook
from mmdet_ema.averaging import OptionError
from tests import oracle
from tests.for_mmcv1.toy import Lines, Run, quiet

NAN = float('nan')


def test_named_tensors_are_copied(tmp_path):
    """``copied`` names tensors that stay out of the average."""
    lines = Lines()
    hook = dict(
        type='EMAHook',
        schedule='constant',
        decay=0.9,
        copied=['norm.run*', 'neck.*'],
    )
    run = Run(tmp_path, hook, logger=quiet(lines)).train()
    saved = run.load('epoch_2.pth')['state_dict']
    for key in ('norm.running_mean', 'norm.running_var'):
        assert torch.equal(run.records[-1][key], saved[key])
    expected = oracle.average(*run.trace('head.weight'), lambda n: 0.9)
    # float32 rounding
    assert oracle.relative_error(saved['head.weight'], expected) < 1e-6
    found = [line for line in lines.lines if 'copied=' in line]
    assert 1 == len(found)
    assert "copied=['neck.*']: no parameter or buffer" in found[0]


@pytest.mark.parametrize('value', ['head.*', [1], ['']])
def test_bad_patterns(value):
    """What is no list of names is refused before anything is built."""
    with pytest.raises(OptionError, match=r'copied=.* use a list of names'):
        EMAHook(copied=value)


class Spoil(Hook):
    """Makes one tensor NaN from an iteration on."""

    def __init__(self, name, iteration):
        self.name, self.iteration = name, iteration

    def before_train_iter(self, runner):
        if runner.iter >= self.iteration:
            runner.model.state_dict()[self.name][0] = NAN


def test_statistics_with_nan_are_named(tmp_path):
    """No step is skipped; the average stays, and the log says which."""
    lines = Lines()
    hook = dict(type='EMAHook', schedule='constant', decay=0.9)
    spoil = Spoil('norm.running_mean', 3)
    run = Run(tmp_path, spoil, hook, logger=quiet(lines)).train()
    saved = run.load('epoch_2.pth')['state_dict']['norm.running_mean']
    start, values = run.trace('norm.running_mean')
    expected = oracle.average(start, values[:3], lambda n: 0.9)
    assert oracle.relative_error(saved, expected) < 1e-6
    found = [x for x in lines.lines if 'norm.running_mean holds NaN' in x]
    assert 1 == len(found)
    assert not [x for x in lines.lines if 'not averaged' in x]
