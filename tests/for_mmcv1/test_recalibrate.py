"""``recalibrate=`` in mmcv's runners: passes that nothing is told of."""

import pytest
from mmcv.parallel import MMDataParallel
from mmcv.runner import LoggerHook

from mmdet_ema import OptionError
from tests.for_mmcv1.toy import EMA, Run, ToyModel, same

RECALIBRATE = dict(EMA, recalibrate=2)


class Logged(LoggerHook):
    """Keeps what is logged of evaluations."""

    def __init__(self):
        super().__init__(interval=10**6)
        self.lines = []

    def log(self, runner):
        if self.get_mode(runner) == 'val':
            self.lines.append(dict(runner.log_buffer.output))


def test_two_passes_that_nobody_hears_of(tmp_path):
    """The last evaluation alone is logged; the training does not notice."""
    runs = []
    for hook in (RECALIBRATE, EMA):
        model, logged = ToyModel(), Logged()
        wrapped = MMDataParallel(model, device_ids=[-1])
        run = Run(tmp_path, hook, model=model, wrapped=wrapped)
        run.runner.register_hook(logged, priority='VERY_LOW')
        run.train()
        runs.append((run, logged.lines))
    (run, lines), (plain, expected) = runs
    assert [2 + 1 + 1, 2] == [len(r.recorder.seen) for r, _ in runs]
    assert len(lines) == len(expected) == 2
    assert lines[0] == expected[0]
    for left, right in zip(run.records, plain.records):
        assert [] == same(left, right)


def test_runner_that_counts_iterations(tmp_path):
    """It says what is needed, before a step."""
    runner = dict(type='IterBasedRunner', max_iters=4)
    run = Run(tmp_path, RECALIBRATE, runner=runner)
    with pytest.raises(OptionError, match='recalibrate=2 needs a runner of'):
        run.train()
    assert run.records == []
