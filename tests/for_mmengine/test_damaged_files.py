"""Damaged files: one clear line, or the right weights, in mmengine."""

import logging

import pytest
import torch
from mmengine.logging import MMLogger

from tests.damage import FILES, SEEDS, damaged, judge
from tests.for_mmengine.toy import Run, state_of

EMA = dict(type='EMAHook', decay=0.9, tau=2)


class Said(logging.Handler):
    """Keeps what was logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """A checkpoint of two epochs."""
    folder = tmp_path_factory.mktemp('written')
    Run(folder, EMA, max_epochs=2).train()
    path = folder / 'epoch_2.pth'
    return path.read_bytes(), torch.load(path, weights_only=False)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run that loads many files, one after the other."""
    run = Run(tmp_path_factory.mktemp('run'), EMA, max_epochs=2)
    run.start = state_of(run.model)
    assert run.runner.train_loop  # it is made when it is asked for
    run.said = Said()
    return run


def load(run, path, resume):
    """Load a file as ``Runner.train`` does, before it trains."""
    runner = run.runner
    runner._has_loaded, runner._load_from = False, str(path)
    runner._resume = resume
    runner.call_hook('before_run')
    runner.load_or_resume()
    runner.call_hook('before_train')
    if not resume:
        return None
    averager = run.hook._life.averager
    return {k: v.clone() for k, v in averager.named_averages()}


@pytest.mark.parametrize('resume', [True, False], ids=['resume', 'load_from'])
@pytest.mark.parametrize('seed', SEEDS)
def test_damaged_files(seed, resume, written, run, tmp_path, capsys):
    """Each is refused before the model changes, or gives the weights."""
    data, good = written
    averages = good['state_dict']
    raws = {k[7:]: v for k, v in good['ema_state_dict'].items() if '.' in k}
    logger = MMLogger.get_current_instance()
    logger.addHandler(run.said)
    verdicts = []
    for number in range(FILES):
        broken, name = damaged(data, seed * FILES + number)
        path = tmp_path / f'{number}.pth'
        path.write_bytes(broken)
        run.model.load_state_dict(run.start)
        run.said.lines.clear()
        expected = (raws if resume else averages, averages)
        verdicts.append(
            judge(
                lambda path=path: load(run, path, resume),
                run.model,
                expected,
                name,
                lambda: [*run.said.lines, capsys.readouterr().out],
            )
        )
        path.unlink()
    logger.removeHandler(run.said)
    print(verdicts)
    assert len(verdicts) == FILES
