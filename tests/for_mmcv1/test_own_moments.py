"""Hooks that evaluate at moments of their own see the averages."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from mmcv.runner import EvalHook, Hook
from mmcv.runner.hooks import SyncBuffersHook

from mmdet_ema import OptionError
from tests.for_mmcv1.test_orders import wrong
from tests.for_mmcv1.toy import (
    EMA,
    Lines,
    Run,
    loader,
    model_of,
    quiet,
    raw_of,
    same,
    state_of,
)

RUNNERS = dict(
    epochs=dict(type='EpochBasedRunner', max_epochs=3),
    iters=dict(type='IterBasedRunner', max_iters=12),
)


class OwnCondition(EvalHook):
    """Decides by itself, at the end of an epoch and in the middle of one."""

    def after_train_epoch(self, runner):
        if self.is_last_epoch(runner):
            self.test_fn(runner.model, self.dataloader)

    def after_train_iter(self, runner):
        if runner.iter in (1, 6):
            self.test_fn(runner.model, self.dataloader)


class AtTheEnd(EvalHook):
    """Evaluates once all is trained."""

    def after_run(self, runner):
        self.test_fn(runner.model, self.dataloader)


class SecondSet(EvalHook):
    """Scores a second data set after the usual one."""

    def after_train_epoch(self, runner):
        super().after_train_epoch(runner)
        if self.by_epoch:
            self.test_fn(runner.model, loader(8, seed=2))

    def after_train_iter(self, runner):
        super().after_train_iter(runner)
        if not self.by_epoch and self._should_evaluate(runner):
            self.test_fn(runner.model, loader(8, seed=2))


class InVal(EvalHook):
    """Evaluates when the val flow begins and ends."""

    def before_val_epoch(self, runner):
        self._do_evaluate(runner)

    after_val_iter = after_val_epoch = before_val_epoch


class BeforeTraining(EvalHook):
    """Evaluates before an epoch and an iteration; saves its best file."""

    def before_train_epoch(self, runner):
        self._do_evaluate(runner)

    def before_train_iter(self, runner):
        if runner.iter % 4 == 0:
            self._do_evaluate(runner)


class Registers(Hook):
    """Registers an evaluation hook in the middle of the run."""

    def __init__(self, hook):
        self.hook = hook

    def before_train_iter(self, runner):
        if runner.iter == 2:
            runner.register_hook(self.hook, priority='LOW')


KINDS = dict(
    own_condition=OwnCondition,
    at_the_end=AtTheEnd,
    second_set=SecondSet,
    in_val=InVal,
    before_training=BeforeTraining,
    late=EvalHook,
)
# steps after which each evaluates, by epoch and by iteration
MOMENTS = dict(
    own_condition=([2, 7, 12], [2, 7]),
    at_the_end=([4, 8, 12, 12], [4, 8, 12, 12]),
    second_set=([4, 4, 8, 8, 12, 12], [4, 4, 8, 8, 12, 12]),
    in_val=([4] * 7 + [8] * 7 + [12] * 7, [4] * 3 + [8] * 3 + [12] * 3),
    before_training=([0, 0, 4, 4, 4, 8, 8, 8, 12], [0, 4, 4, 8, 8, 12]),
    late=([4, 8, 12], [4, 8, 12]),
)


def run_of(kind, runner, folder, *hooks, **options):
    """Put together a run with one of the kinds."""
    by_epoch = runner == 'epochs'
    flow = [('train', 1 if by_epoch else 4)]
    if kind == 'in_val':
        flow.append(('val', 1 if by_epoch else 2))
    evaluation = dict(kind=KINDS[kind], interval=1 if by_epoch else 4)
    run = Run(
        folder,
        *hooks,
        runner=RUNNERS[runner],
        workflow=flow,
        evaluation=None if kind == 'late' else evaluation,
        **options,
    )
    if kind == 'late':
        late = EvalHook(
            loader(4, seed=1),
            test_fn=run.recorder.test,
            by_epoch=by_epoch,
            interval=evaluation['interval'],
        )
        run.runner.register_hook(Registers(late))
    return run


@functools.lru_cache(maxsize=None)
def plain_records(kind, runner):
    """Weights after every step of such a run without an EMA hook."""
    with tempfile.TemporaryDirectory() as folder:
        return run_of(kind, runner, Path(folder)).train().records


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'VERY_LOW'])
@pytest.mark.parametrize('runner', list(RUNNERS))
@pytest.mark.parametrize('kind', list(KINDS))
def test_evaluations_see_the_averages(kind, runner, priority, tmp_path):
    """Every evaluation is of the averages, training as without our hook."""
    run = run_of(kind, runner, tmp_path, dict(EMA, priority=priority)).train()
    expected = MOMENTS[kind][runner == 'iters']
    assert expected == [step for step, _ in run.recorder.seen]
    assert [] == [s for s, seen in run.recorder.seen if wrong(run, seen, s)]
    records = plain_records(kind, runner)
    assert [] == [s for s, x in enumerate(run.records) if same(x, records[s])]
    assert [] == same(state_of(run.model), run.records[-1])
    name = 'epoch_3.pth' if runner == 'epochs' else 'iter_12.pth'
    saved = run.load(name)
    assert [] == wrong(run, saved['state_dict'], 12)
    assert [] == same(raw_of(saved), run.records[-1])


@pytest.mark.parametrize('evaluate', ['raw', 'both'])
@pytest.mark.parametrize(
    ('kind', 'runner'),
    [
        ('own_condition', 'iters'),
        ('second_set', 'iters'),
        ('in_val', 'epochs'),
        ('before_training', 'epochs'),
    ],
)
def test_other_choices_of_weights(kind, runner, evaluate, tmp_path):
    """``'raw'`` holds for them, too; ``'both'`` ends with the averages."""
    hook = dict(EMA, evaluate=evaluate)
    run = run_of(kind, runner, tmp_path, hook).train()
    assert run.recorder.seen
    raw = [
        not step or not same(seen, run.records[step - 1])
        for step, seen in run.recorder.seen
    ]
    if evaluate == 'raw':
        assert all(raw)
    else:
        averages = [s for (_, s), r in zip(run.recorder.seen, raw) if not r]
        steps = [s for (s, _), r in zip(run.recorder.seen, raw) if not r]
        assert [] == [s for s, x in zip(steps, averages) if wrong(run, x, s)]
        assert {*steps} == {s for s, _ in run.recorder.seen if s}
    assert [] == same(state_of(run.model), run.records[-1])


@pytest.mark.parametrize('runner', list(RUNNERS))
@pytest.mark.parametrize('kind', list(KINDS))
def test_raw_weights_come_back(kind, runner, tmp_path):
    """Whatever ends an evaluation, the model holds the raw weights."""
    error = KeyboardInterrupt if runner == 'epochs' else RuntimeError
    run = run_of(kind, runner, tmp_path, EMA)
    keep = run.recorder.test

    def fail(model, data_loader):
        found = keep(model, data_loader)
        if len(run.records) >= 2:
            raise error('in the evaluation')
        return found

    for hook in [*run.runner.hooks, getattr(run, 'evaluator', None)]:
        hook = getattr(hook, 'hook', hook)
        if isinstance(hook, EvalHook):
            hook.test_fn = fail
    with pytest.raises(error, match='in the evaluation'):
        run.train()
    assert [] == same(state_of(run.model), run.records[-1])


class Plain(Hook):
    """Looks at the model, as hooks that draw, export or score do."""

    def __init__(self, *moments):
        self.seen = []
        for moment in moments:
            setattr(self, moment, self.look)

    def look(self, runner):
        self.seen.append((runner.iter, state_of(model_of(runner))))


@pytest.mark.parametrize('place', ['VERY_HIGH', 'VERY_LOW'])
@pytest.mark.parametrize('priority', ['VERY_HIGH', 'VERY_LOW'])
def test_any_hook_sees_averages_between_epochs(priority, place, tmp_path):
    """A hook of any class does, before ours or after it."""
    run = Run(tmp_path, dict(EMA, priority=priority), evaluation=None)
    over = Plain('after_train_epoch', 'after_run')
    training = Plain('before_train_epoch', 'before_train_iter')
    for hook in (over, training):
        run.runner.register_hook(hook, priority=place)
    run.train()
    assert [4, 8, 8] == [step for step, _ in over.seen]
    assert [] == [step for step, seen in over.seen if wrong(run, seen, step)]
    raws = [run.recorder.start, *run.records]
    assert [0, 0, 1, 2, 3, 4, 4, 5, 6, 7] == [s for s, _ in training.seen]
    assert [] == [s for s, seen in training.seen if same(seen, raws[s])]


def test_iterations_end_with_the_averages(tmp_path):
    """After the last iteration every hook sees the averages."""
    hook = Plain('after_run')
    run = Run(tmp_path, EMA, runner=RUNNERS['iters'], evaluation=None)
    run.runner.register_hook(hook, priority='VERY_HIGH')
    run.train()
    assert [] == wrong(run, hook.seen[0][1], 12)
    assert [] == same(state_of(run.model), run.records[-1])


class ScoreEval(Hook):
    """Evaluates by iteration without being derived from mmcv's hook."""

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner):
        if self.every_n_iters(runner, 3):
            self.seen.append((runner.iter + 1, state_of(runner.model)))


def test_hook_that_is_named_after_evaluation(tmp_path):
    """A plain hook with ``Eval`` in its name is an evaluation hook."""
    hook = ScoreEval()
    run = Run(tmp_path, EMA, hook, runner=RUNNERS['iters'], evaluation=None)
    run.train()
    assert [3, 6, 9, 12] == [step for step, _ in hook.seen]
    assert [] == [step for step, seen in hook.seen if wrong(run, seen, step)]


def test_hooks_that_synchronize_ranks_have_the_raw_weights(
    tmp_path, monkeypatch
):
    """What training goes on from is synchronized, not the averages."""
    seen = []

    def reduce(buffers):
        seen.append([b.clone() for b in buffers])

    for module in ('sync_buffer', 'checkpoint'):
        name = f'mmcv.runner.hooks.{module}.allreduce_params'
        monkeypatch.setattr(name, reduce)
    run = Run(
        tmp_path,
        dict(EMA, priority='VERY_HIGH'),
        SyncBuffersHook(),
        checkpoint=dict(interval=1, sync_buffer=True),
    ).train()
    raws = [
        [run.records[step - 1][name] for name, _ in run.model.named_buffers()]
        for step in (4, 8)
    ]
    expected = [raw for raw in raws for _ in range(2)]
    assert len(expected) == len(seen)
    for left, right in zip(expected, seen):
        assert all(torch.equal(*pair) for pair in zip(left, right))


class Halves(Hook):
    """Changes a parameter at a moment of its choice."""

    def __init__(self, moment):
        setattr(self, moment, self.halve)

    def halve(self, runner):
        with torch.no_grad():
            model_of(runner).head.bias.mul_(0.5)


@pytest.mark.parametrize('moment', ['before_train_epoch', 'after_train_epoch'])
def test_hook_that_changes_weights_between_epochs(moment, tmp_path):
    """One line says that a change of the averages is lost, and what to do."""
    lines = Lines()
    run = Run(tmp_path, EMA, logger=quiet(lines), evaluation=None)
    run.runner.register_hook(Halves(moment))
    run.train()
    found = [x for x in lines.lines if 'changed parameters while' in x]
    assert len(found) == (2 if moment == 'after_train_epoch' else 0)
    assert all('before_train_epoch' in line for line in found)
    plain = Run(tmp_path / 'plain', evaluation=None)
    if moment == 'before_train_epoch':
        plain.runner.register_hook(Halves(moment))
    plain.train()
    assert [] == same(plain.records[-1], run.records[-1])


class Halved(EvalHook):
    """Scores two halves of a model under names of their own."""

    def after_train_epoch(self, runner):
        self._do_evaluate(runner, ('teacher', 'student'))

    def _do_evaluate(self, runner, halves):
        for half in halves:
            results = self.test_fn(runner.model, self.dataloader)
            score = self.evaluate(runner, results, prefix=half)
        if self.save_best and score:
            self._save_ckpt(runner, score)

    def evaluate(self, runner, results, *, prefix):
        found = self.dataloader.dataset.evaluate(results)
        for name, value in found.items():
            runner.log_buffer.output[f'{prefix}.{name}'] = value
        runner.log_buffer.ready = True
        return found['score'] if self.save_best else None


@pytest.mark.parametrize('best', ['student.score', 'student.score_raw'])
def test_best_file_by_a_metric_of_one_half(best, tmp_path):
    """An ``evaluate`` with arguments of its own chooses it."""
    evaluation = dict(kind=Halved, save_best=best, rule='greater')
    run = Run(tmp_path, dict(EMA, evaluate='both'), evaluation=evaluation)
    run.train()
    name = best.replace('/', '_')
    (path,) = tmp_path.glob(f'best_{name}_epoch_*.pth')
    steps = 4 * int(path.stem[-1])
    saved = run.load(path.name)
    assert [] == wrong(run, saved['state_dict'], steps)
    assert [] == same(raw_of(saved), run.records[steps - 1])


def test_best_by_raw_at_moments_of_its_own(tmp_path):
    """Where the raw weights are not evaluated there is no best file."""

    class Once(EvalHook):
        def after_train_epoch(self, runner):
            results = self.test_fn(runner.model, self.dataloader)
            assert self.evaluate(runner, results) is None

    evaluation = dict(kind=Once, save_best='score_raw', rule='greater')
    run = Run(tmp_path, dict(EMA, evaluate='both'), evaluation=evaluation)
    run.train()
    assert [] == [s for s, x in run.recorder.seen if wrong(run, x, s)]
    assert [] == list(tmp_path.glob('best_*'))


def test_best_by_raw_is_refused_when_registered_late(tmp_path):
    """A wrong ``save_best`` is named where the hook is registered."""
    run = Run(tmp_path, EMA, evaluation=None)
    late = EvalHook(loader(), save_best='score_raw', rule='greater')
    run.runner.register_hook(Registers(late))
    with pytest.raises(OptionError, match=r'score_raw'):
        run.train()
    assert [] == same(state_of(run.model), run.records[-1])
