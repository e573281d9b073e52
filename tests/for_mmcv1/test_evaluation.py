"""What evaluations see, and that the raw weights come back."""

import pytest

from mmdet_ema import OptionError
from tests import oracle
from tests.for_mmcv1.test_orders import RUNNERS, plain_records, wrong
from tests.for_mmcv1.toy import (
    EMA,
    Run,
    same,
    state_of,
)

BEST = dict(rule='greater')


def test_training_goes_on_after_an_exception(tmp_path):
    """A run that is started again goes on from the raw weights."""
    plain = Run(tmp_path / 'plain', runner=dict(max_epochs=2)).train()
    run = Run(tmp_path, EMA)
    test, run.evaluator.test_fn = run.evaluator.test_fn, None
    with pytest.raises(TypeError):
        run.train()
    run.evaluator.test_fn = test
    run.runner._epoch = 1
    run.train()
    assert [] == same(plain.records[-1], run.records[-1])


@pytest.mark.parametrize('runner', list(RUNNERS))
@pytest.mark.parametrize('evaluate', ['ema', 'raw', 'both'])
def test_val_in_the_workflow_sees_the_averages(runner, evaluate, tmp_path):
    """The val flow runs on the averages and changes nothing."""
    times = 1 if runner == 'epochs' else 4
    workflow = [('train', times), ('val', times)]
    options = dict(runner=RUNNERS[runner], workflow=workflow, evaluation=None)
    plain = Run(tmp_path / 'plain', **options).train()
    run = Run(tmp_path, dict(EMA, evaluate=evaluate), **options).train()
    assert [] == same(plain.records[-1], run.records[-1])
    assert [4, 8, 12, 16] == [step for step, _ in run.recorder.vals]
    for step, seen in run.recorder.vals:
        if evaluate == 'raw':
            assert [] == same(seen, run.records[step - 1])
        else:
            assert [] == wrong(run, seen, step)


def test_val_before_train_sees_the_initial_weights(tmp_path):
    """A workflow that begins with val has nothing but the first weights."""
    workflow = [('val', 1), ('train', 1)]
    run = Run(tmp_path, EMA, workflow=workflow).train()
    assert [] == same(run.recorder.vals[0][1], run.recorder.start)
    assert [] == wrong(run, run.recorder.vals[1][1], 4)


def test_failing_val_leaves_the_raw_weights(tmp_path):
    """An exception in the val flow restores, too."""
    run = Run(tmp_path, EMA, workflow=[('train', 1), ('val', 1)])
    run.model.val_step = lambda *args, **kwargs: 'no dict'
    with pytest.raises(TypeError, match='must return a dict'):
        run.train()
    assert [] == same(state_of(run.model), run.records[-1])


def test_best_by_raw_needs_both(tmp_path):
    """Without ``evaluate='both'`` there is no such metric, and a line."""
    evaluation = dict(save_best='score_raw', **BEST)
    with pytest.raises(OptionError, match=r"score_raw.*evaluate='both'"):
        Run(tmp_path, EMA, evaluation=evaluation).train()


def test_best_by_an_unknown_raw_metric_is_named(tmp_path):
    """A metric that the data set does not have is named, with those it has."""
    evaluation = dict(save_best='AP_raw', **BEST)
    hook = dict(EMA, evaluate='both')
    run = Run(tmp_path, hook, evaluation=evaluation)
    with pytest.raises(OptionError, match=r'AP_raw.*score_raw'):
        run.train()
    assert [] == same(state_of(run.model), run.records[-1])


@pytest.mark.parametrize('start', [None, 0, 2, 3])
def test_start_and_interval(start, tmp_path):
    """``start`` and ``interval`` of the evaluation are followed as ever."""
    evaluation = dict(start=start, interval=2)
    options = dict(runner=dict(max_epochs=4))
    plain = Run(tmp_path, evaluation=dict(evaluation), **options).train()
    run = Run(tmp_path, EMA, evaluation=dict(evaluation), **options).train()
    steps = [step for step, _ in run.recorder.seen]
    assert [step for step, _ in plain.recorder.seen] == steps
    assert 1 <= len(steps)
    assert [] == [
        s for s, seen in run.recorder.seen if s and wrong(run, seen, s)
    ]


def test_evaluation_before_the_first_epoch_of_a_resumed_run(tmp_path):
    """With ``start`` behind it, a resumed run evaluates the averages first."""
    first = Run(tmp_path, EMA, runner=dict(max_epochs=2)).train()
    rest = Run(
        tmp_path,
        EMA,
        runner=dict(max_epochs=3),
        evaluation=dict(start=1, interval=1),
    ).train(resume=tmp_path / 'epoch_2.pth')
    step, seen = rest.recorder.seen[0]
    assert 0 == step
    assert [] == wrong(first, seen, 8)


def test_dynamic_intervals_of_mmdet(tmp_path):
    """The ``EvalHook`` of mmdet 2, with dynamic intervals, sees averages."""
    core = pytest.importorskip('mmdet.core')
    seen = []

    run = Run(
        tmp_path,
        EMA,
        runner=dict(max_epochs=4),
        evaluation=dict(
            kind=core.EvalHook, interval=2, dynamic_intervals=[(3, 1)]
        ),
    )
    forward = run.model.forward

    def watched(inputs, return_loss=True, **kwargs):
        if not return_loss:
            seen.append((len(run.records), state_of(run.model)))
        return forward(inputs, return_loss)

    run.model.forward = watched
    run.train()
    assert [8, 12, 16] == [step for step, _ in seen]
    assert [] == [step for step, state in seen if wrong(run, state, step)]


def test_plain_records_are_those_of_the_oracle(tmp_path):
    """The comparison itself sees a difference where there is one."""
    records = plain_records('epochs', True)
    run = Run(tmp_path, EMA, runner=RUNNERS['epochs']).train()
    assert wrong(run, records[-1], 16)
    start, values = run.trace('head.weight')
    average = oracle.average(start, values, lambda n: 0.5)
    assert oracle.relative_error(average, values[-1]) > 1e-3
