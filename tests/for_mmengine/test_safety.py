"""The raw weights come back, and files keep their roles, whatever happens."""

import contextlib

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook

from tests import needs, oracle
from tests.for_mmengine.toy import Run, Score, ToyModel, loader, same, state_of

EMA = dict(type='EMAHook', schedule='constant', decay=0.9)


class Failing(Score):
    """Raises in the middle of an evaluation, with the averages applied."""

    def process(self, data_batch, data_samples):
        raise RuntimeError('metric failed')


class SaveInValidation(Hook):
    """Writes a checkpoint while the averages are in the model."""

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.save_checkpoint(str(runner.work_dir), 'middle.pth')


def test_checkpoint_written_in_validation_has_the_right_roles(tmp_path):
    """A file written in the middle equals the one of the epoch's end."""
    run = Run(tmp_path, EMA, SaveInValidation(), max_epochs=1).train()
    middle, end = run.load('middle.pth'), run.load('epoch_1.pth')
    assert same(middle['state_dict'], end['state_dict']) == []
    assert same(middle['ema_state_dict'], end['ema_state_dict']) == []
    assert same(state_of(run.model), run.records[-1]) == []


class BrokenTest(Hook):
    """Runs a test that fails in the middle of training, and goes on."""

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter == 1:
            with contextlib.suppress(RuntimeError):
                runner.test_loop.run()
            runner.model.train()  # the loop has put it into eval mode


def test_training_never_goes_on_with_averages(tmp_path):
    """A test loop made late, that fails, leaves nothing in the model."""
    run = Run(
        tmp_path / 'a',
        EMA,
        BrokenTest(),
        test_dataloader=loader(4, seed=1),
        test_cfg=dict(),
        test_evaluator=Evaluator([Failing()]),
    ).train()
    plain = Run(tmp_path / 'b', EMA).train()
    found = [same(a, b) for a, b in zip(run.records, plain.records)]
    assert found == [[]] * 8
    left, right = (r.load('epoch_2.pth') for r in (run, plain))
    assert same(left['state_dict'], right['state_dict']) == []


class EvaluateNow(Hook):
    """Validates right after a step, before hooks of low priority."""

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter == 2:
            runner.val_loop.run()


@pytest.mark.parametrize('priority', ['NORMAL', 'LOWEST'])
def test_validation_inside_an_iteration_sees_its_step(tmp_path, priority):
    """The average takes the step in before it is shown or saved."""
    best = dict(type='CheckpointHook', save_best='score', rule='greater')
    run = Run(
        tmp_path,
        EvaluateNow(),
        dict(EMA, priority=priority),
        hooks=dict(checkpoint=best),
        max_epochs=1,
    ).train()
    start, values = run.trace('head.weight')
    average = oracle.average(start, values[:3], lambda n: 0.9)
    files = [
        torch.load(p, weights_only=needs.SAFELY)
        for p in tmp_path.glob('best_score_*.pth')
    ]
    steps = {int(f['ema_state_dict']['steps']): f for f in files}
    if 3 in steps:
        found = steps[3]['state_dict']['head.weight']
        assert oracle.relative_error(found, average) < 1e-6
    assert run.load('epoch_1.pth')['ema_state_dict']['steps'] == 4


class Barred(ToyModel):
    """Has a trainable parameter with minus infinity in it."""

    def init_weights(self):
        super().init_weights()
        self.low.data[0] = -np.inf

    def forward(self, inputs, mode='tensor'):
        self.low.data[0], held = 1.0, self.low.data[0].clone()
        found = super().forward(inputs, mode)
        self.low.data[0] = held
        return found


def test_parameter_with_infinity_from_the_start_is_copied(tmp_path):
    """It is named at the start, and skips no step."""
    run = Run(tmp_path, EMA, model=Barred(), max_epochs=1).train()
    assert run.load('epoch_1.pth')['ema_state_dict']['steps'] == 4
    assert 'low (1 parameters) held NaN or Inf before training' in run.log
