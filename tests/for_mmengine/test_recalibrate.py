"""``recalibrate=`` in mmengine's runner: who hears of it, who comes first."""

import pytest
from mmengine.hooks import EarlyStoppingHook, Hook

from mmdet_ema import OptionError
from tests.for_mmengine.test_both import Remembers, scores
from tests.for_mmengine.toy import Run, Score, loader, same

EMA = dict(type='EMAHook', decay=0.9, tau=3, recalibrate=2)
WITHOUT = dict(EMA, recalibrate=0)


def test_only_the_last_validation_is_reported(tmp_path):
    """The two passes before it leave no value and no model's memory."""
    runs = [
        Run(tmp_path / name, hook, model=Remembers()).train()
        for name, hook in [('with', EMA), ('without', WITHOUT)]
    ]
    left, right = map(scores, runs)
    assert len(left) == 2
    assert left[0] == right[0]
    hubs = (run.runner.message_hub.log_scalars for run in runs)
    assert {*next(hubs)} == {*next(hubs)}
    for mine, other in zip(*(run.records for run in runs)):
        assert [] == same(mine, other)


class Counts(Hook):
    """Counts validations, and fails in one of them."""

    def __init__(self, fails_at=None):
        self.count, self.fails_at = 0, fails_at

    def before_val_epoch(self, runner):
        self.count += 1

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.count == self.fails_at:
            raise KeyboardInterrupt


def test_ctrl_c_while_the_new_ones_are_evaluated(tmp_path):
    """The old ones are back in the averages, the raw weights in the model."""
    counts = Counts(fails_at=3)  # of epoch 1, before, after
    run = Run(tmp_path, EMA, counts)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    plain = Run(tmp_path / 'plain', WITHOUT).train()
    assert [] == same(run.records[-1], plain.records[-1])
    assert [] == same(run.model.state_dict(), plain.records[-1])
    averages, expected = (
        dict(x.hook._life.averager.named_averages()) for x in (run, plain)
    )
    assert [] == same(averages, expected)


def test_sets_that_are_evaluated_take_no_pass_more(tmp_path):
    """Two passes of the deployed ones, whatever else is evaluated."""
    counts = Counts()
    Run(tmp_path, dict(EMA, evaluate='both'), counts, max_epochs=1).train()
    assert counts.count == 2 + 2


def test_training_that_stops_early(tmp_path, capfd):
    """It is said that nothing was estimated."""
    stop = EarlyStoppingHook('score', rule='less', patience=0, min_delta=1e9)
    run = Run(tmp_path, EMA, stop, max_epochs=5).train()
    assert len(run.records) < 20
    said = capfd.readouterr()
    assert 'recalibrate=2 has had no effect: training ended' in (
        said.out + said.err
    )


class Stops(Hook):
    """Ctrl-C in the third iteration, once."""

    def after_train_iter(self, runner, *_, **__):
        if runner.iter == 2 and not vars(self).get('done'):
            self.done = True
            raise KeyboardInterrupt


def test_training_that_goes_on_in_this_process(tmp_path, capfd):
    """What was broken off ends after all: nothing is said to be missing."""
    run = Run(tmp_path, EMA, Stops(), max_epochs=2)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train()
    said = capfd.readouterr()
    assert 'had no effect' not in said.out + said.err
    assert 'recalibrate=2: the ' in said.out + said.err


def test_order_of_the_hooks(tmp_path):
    """A file that is written first would hold the old ones: refused."""
    run = Run(tmp_path, dict(EMA, priority='LOWEST'))
    with pytest.raises(OptionError, match="2 with priority='LOWEST'"):
        run.train()


class Loss(Score):
    """Two metrics: of the first, lower is better."""

    def compute_metrics(self, results):
        score = super().compute_metrics(results)['score']
        return dict(val_loss=-score, score=score)


@pytest.mark.parametrize(
    ('checkpoint', 'metric', 'better'),
    [
        ({}, 'val_loss', 'lower'),
        (dict(save_best='auto', rule='greater'), 'val_loss', 'higher'),
        (dict(save_best='auto'), 'val_loss', 'lower'),
        (dict(save_best=['score'], rule='less'), 'score', 'lower'),
    ],
)
def test_what_decides(tmp_path, capfd, checkpoint, metric, better):
    """The metric of the best file with its rule, or the first one."""
    hooks = dict(checkpoint=dict(type='CheckpointHook', **checkpoint))
    run = Run(tmp_path, EMA, hooks=hooks, metric=Loss(), max_epochs=1)
    run.train()
    said = capfd.readouterr()
    lines = (said.out + said.err).splitlines()
    (line,) = (x for x in lines if ' before, ' in x)
    assert f': {metric} ' in line
    assert f'({better} is better)' in line


def test_workers(tmp_path):
    """A fresh iterator of workers that persist ends no epoch too early."""
    data = dict(loader(), num_workers=1, persistent_workers=True)
    run = Run(tmp_path, EMA, train_dataloader=data, max_epochs=1).train()
    plain = Run(tmp_path / 'plain', WITHOUT, max_epochs=1).train()
    assert len(run.records) == 4
    assert [] == same(run.records[-1], plain.records[-1])
