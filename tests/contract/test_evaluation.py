"""What evaluations see, and that the raw weights come back."""

import random
import re

import numpy as np
import pytest
import torch

from tests.conftest import MMCV1
from tests.contract.toy import (
    EMA,
    Hook,
    Run,
    ToyModel,
    ramp,
    same,
    state_of,
    toy,
)
from tests.toy import outputs

ALL = ['ema', 'raw', 'both']


class Generator(Hook):
    """Keeps torch's random state after every iteration."""

    def after_train_iter(self, runner, *args, **kwargs):
        self.state = torch.get_rng_state()


class Merging(torch.nn.Linear):
    """Adds a trained weight to a frozen one in evaluation mode, as LoRA."""

    def __init__(self, note):
        super().__init__(4, 4)
        self.requires_grad_(False)
        self.note = note
        self.low_rank = torch.nn.Parameter(torch.full((4, 4), 0.1))
        self.is_merged, self.start = False, None

    def train(self, mode=True):
        super().train(mode)
        if mode is self.is_merged:
            self.weight.data += self.low_rank.data * (-1 if mode else 1)
            self.is_merged = not mode
        return self

    def forward(self, x):
        out = super().forward(x)
        if self.training:
            if self.start is None:
                self.start = self.weight.data.clone()
            return out + x @ self.low_rank.T
        merged = self.start + self.low_rank.data
        self.note(float((self.weight - merged).abs().max()))
        return out


@pytest.mark.parametrize('evaluate', ALL)
def test_weights_that_are_merged_in_evaluation_mode(tmp_path, evaluate):
    """Those of a set are merged for it, and taken back for training."""
    model, errors = ToyModel(), []
    model.frozen = Merging(errors.append)
    ema = dict(EMA, evaluate=evaluate)
    run = Run(tmp_path, ema, model=model, epochs=4).train()
    model.train()
    left = model.frozen.weight.data - model.frozen.start
    assert float(left.abs().max()) < 1e-6
    assert 4 * (1 + (evaluate == 'both')) <= len(errors)
    assert max(errors) < 1e-6
    assert {} == run.wrong(run.load(), ramp, ['frozen.low_rank', 'low'])


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ('evaluate', 'at'),
    [('ema', 1), ('raw', 1), *(('all', at) for at in (1, 2, 3))],
)
def test_raw_weights_come_back(error, evaluate, at, tmp_path):
    """Whatever ends an evaluation, the model holds the raw weights.

    A pass that would not have been the last leaves random numbers, too.
    """
    left = at

    def fail():
        nonlocal left
        torch.rand(1)
        left -= 1
        if not left:
            raise error('in the evaluation')

    averages = dict(fast=dict(decay=0.5))
    ema = dict(EMA, averages=averages, evaluate=evaluate)
    generator = Generator()
    run = Run(tmp_path, ema, generator, on_evaluation=fail)
    with pytest.raises(error, match='in the evaluation'):
        run.train()
    assert 4 == len(run.records)
    assert [] == same(state_of(run.model), run.records[-1])
    if evaluate == 'all' and at < 3:
        assert torch.equal(generator.state, torch.get_rng_state())


def wrong(run, seen, steps):
    """Names of the tensors that are not the average after some steps."""
    return run.toy.wrong(seen, ramp, range(steps))


@pytest.mark.parametrize(
    ('evaluate', 'said'),
    [
        ('ema', ['the averages (n=4)', 'the averages (n=8)']),
        ('raw', ['the raw weights', 'the raw weights']),
        (
            'both',
            [
                *('the raw weights', 'the averages (n=4)'),
                *('the raw weights', 'the averages (n=8)'),
            ],
        ),
    ],
)
def test_numbers_say_whose_they_are(evaluate, said, tmp_path):
    """A line before each pass; a table after those of several sets."""
    log = Run(tmp_path, dict(EMA, evaluate=evaluate)).train().log
    assert said == re.findall(r'EMA: evaluating (.*?) INFO', log)
    times = 2 if evaluate == 'both' else 0
    assert times == log.count('EMA: metric')
    assert times <= len(re.findall(r'EMA: \S+ +\S+ +\S+ +[+-]\d', log))


@pytest.mark.skipif(MMCV1, reason='its loggers have a test of their own')
def test_distance_has_digits(tmp_path):
    """A line of the log does not round a small distance to 0.0000."""
    run = Run(tmp_path, dict(type='EMAHook', schedule='constant', decay=1e-4))
    found = re.findall(r'ema_distance: (\S+)', run.train().log)
    assert len(found) > 1
    assert all(0 < float(x) < 5e-5 for x in found)


@pytest.mark.parametrize('evaluate', ALL)
def test_evaluations_see_what_they_are_told_to(evaluate, tmp_path):
    """Under 'both' the raw weights, then the averages; files are the same."""
    run = Run(tmp_path, dict(EMA, evaluate=evaluate)).train()
    times = 2 if evaluate == 'both' else 1
    assert [4] * times + [8] * times == [steps for steps, _ in run.seen]
    raw = dict(ema=[False], raw=[True], both=[True, False])[evaluate]
    for (steps, seen), is_raw in zip(run.seen, raw * 2):
        if is_raw:
            assert [] == same(seen, run.records[steps - 1])
        else:
            assert {} == wrong(run, seen, steps)
    saved = run.load()
    assert {} == run.wrong(saved, ramp)
    assert [] == same(saved.raws, run.records[-1])


@torch.no_grad()
def score_of(weights):
    """Score of some weights, computed without a runner."""
    model = ToyModel()
    model.load_state_dict(weights)
    inputs = torch.from_numpy(toy.ToyData(4, seed=1).inputs)
    return float(outputs(model.eval(), inputs).double().sum())


@pytest.mark.parametrize('best', ['score_raw', 'raw/score', 'score'])
def test_best_file_by_either_metric(best, tmp_path):
    """``save_best='..._raw'`` chooses by the raw weights' metric.

    So does ``raw/...`` of older configs; the file has the name of today.
    """
    ema = dict(EMA, evaluate='both')
    run = Run(tmp_path, ema, epochs=4, best=best).train()
    scores = [score_of(seen) for _, seen in run.seen[best == 'score' :: 2]]
    chosen, runner = 1 + int(np.argmax(scores)), run.toy.runner
    found = (
        runner.meta['hook_msgs']['best_score']
        if MMCV1
        else runner.message_hub.get_info('best_score')
    )
    # float32 sums in another order
    assert found == pytest.approx(max(scores), rel=1e-5)
    name = 'score' if best == 'score' else 'score_raw'
    assert run.log.count('waits for score_raw') == (best == 'raw/score')
    saved = run.load(chosen, f'best_{name}_')
    steps = 4 * chosen
    assert {} == run.wrong(saved, ramp, chosen=range(steps))
    assert [] == same(saved.raws, run.records[steps - 1])


class Draws(ToyModel):
    """Draws random numbers in an evaluation, and in training."""

    def forward(self, inputs, *args, **kwargs):
        inputs = inputs + 0.1 * torch.randn_like(inputs)
        shift = random.random() + np.random.rand()
        return super().forward(inputs * shift, *args, **kwargs)


@pytest.mark.parametrize('evaluate', ALL)
def test_randomness_is_that_of_a_run_without_ema(evaluate, tmp_path):
    """A second pass draws no numbers that training would have drawn."""
    runs = []
    for hooks in ([], [dict(EMA, evaluate=evaluate)]):
        run = Run(tmp_path / str(len(hooks)), *hooks, model=Draws())
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        runs.append(run.train())
    left, right = (run.records for run in runs)
    assert [[]] * 8 == [same(*pair) for pair in zip(left, right)]
