"""``recalibrate=``: statistics estimated again at the end, if they are better.

The toy's first layer is linear, so that NumPy can say what BatchNorm sees.
"""

import re

import pytest
import torch

from mmdet_ema import OptionError
from tests.conftest import MMCV1
from tests.contract.toy import (
    EMA,
    STATISTICS,
    Run,
    Spoil,
    assert_estimated,
    ramp,
    same,
    toy,
)

SPOILT = dict(EMA, recalibrate=3)


def said(run):
    """What the log says of the two scores, and of the choice."""
    line = re.search(
        r'EMA: recalibrate=3: the (new|old) ones (?:are kept|stay): score '
        r'(\S+) before, (\S+) after \((higher|lower) is better\)',
        run.log,
    )
    chosen, before, after, better = line.groups()
    return chosen, float(before), float(after), better


def runs(tmp_path, rule, iters=None, ema=SPOILT, **options):
    """A run that recalibrates, and the same without."""
    plain = {k: x for k, x in ema.items() if k != 'recalibrate'}
    return [
        Run(
            tmp_path / name,
            hook,
            Spoil(),
            best='score',
            rule=rule,
            iters=iters,
            **options,
        ).train()
        for name, hook in [('recalibrated', ema), ('plain', plain)]
    ]


@pytest.mark.parametrize('iters', [None] if MMCV1 else [None, 8])
@pytest.mark.parametrize('rule', ['greater', 'less'])
def test_the_better_ones_are_kept(tmp_path, rule, iters):
    """Both are evaluated and logged; what is deployed are the better ones."""
    run, plain = runs(tmp_path, rule, iters)
    chosen, before, after, better = said(run)
    # the toy's score is higher with the right ones
    assert (chosen, better) == {
        'greater': ('new', 'higher'),
        'less': ('old', 'lower'),
    }[rule]
    assert before < after
    assert 'EMA: metric after before - before EMA: score' in run.log
    assert 'recalibrate: at the end, BatchNorm statistics from 3' in run.log
    saved, old = run.load(), plain.load()
    changed = same(saved.averages, old.averages)
    assert changed == (STATISTICS if chosen == 'new' else [])
    if chosen == 'new':
        assert_estimated(saved.averages, toy.ToyData(16, 0).inputs[:12])
        # so is the file with the best score
        best = run.load(prefix='best_score_')
        assert [] == same(best.averages, saved.averages)
        _, seen = run.seen[-1]
        assert_estimated(seen, toy.ToyData(16, 0).inputs[:12])
    # the training does not notice
    assert [] == same(saved.raws, old.raws)
    assert saved.steps == old.steps
    for left, right in zip(run.records, plain.records):
        assert [] == same(left, right)


def test_deployed_ones_of_several_averages(tmp_path):
    """Only the averages that a file deploys are estimated again."""
    more = dict(fast=dict(decay=0.5, tau=2))
    ema = dict(SPOILT, averages=more, deploy='fast', evaluate=['ema', 'raw'])
    run, plain = runs(tmp_path, 'greater', ema=ema)
    saved, old = run.load(), plain.load()
    assert [*STATISTICS] == same(saved.averages, old.averages)
    assert_estimated(saved.averages, toy.ToyData(16, 0).inputs[:12])
    main, before = (
        x.part['ema_averages']['ema']['state_dict'] for x in (saved, old)
    )
    assert [] == same(dict(main), dict(before))


def test_frozen_statistics_stay(tmp_path):
    """BatchNorm in evaluation mode is left alone, and that is said."""

    class Frozen(toy.ToyModel):
        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    run = Run(tmp_path, SPOILT, model=Frozen()).train()
    assert (
        'WARNING EMA: recalibrate=3 has no effect: no BatchNorm layer is in '
        'training mode' in run.log
    )
    start = run.start['norm.running_mean']
    assert torch.equal(start, run.load().averages['norm.running_mean'])


def test_no_validation(tmp_path):
    """Nothing tells which are better: that is said, and nothing done."""
    options = dict(val_dataloader=None, val_cfg=None, val_evaluator=None)
    if MMCV1:
        options = dict(evaluation=None)
    run = Run(tmp_path, SPOILT, **options).train()
    warning = 'WARNING EMA: recalibrate=3 has no effect: this run has no '
    assert f'{warning}validation' in run.log
    assert {} == run.wrong(run.load(), ramp)


def test_wrong_values_are_refused(tmp_path):
    """It is a number of batches."""
    with pytest.raises(OptionError, match='recalibrate=-1 is out of range'):
        Run(tmp_path, dict(EMA, recalibrate=-1))


def test_file_resumes(tmp_path):
    """A longer run goes on from the new statistics, and has its own end."""
    runs(tmp_path, 'greater')
    path = tmp_path / 'recalibrated' / 'epoch_2.pth'
    run = Run(
        tmp_path / 'recalibrated', SPOILT, Spoil(), epochs=3, resume=path
    ).train()
    assert said(run)[0] == 'new'
    assert run.load().steps == 12
