"""Damaged files: one clear line, or the right weights, in mmcv 1.x."""

import pytest

from tests.damage import FILES, SEEDS, damaged, judge
from tests.for_mmcv1.toy import EMA, Lines, Run, quiet, raw_of


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """A checkpoint of two epochs."""
    folder = tmp_path_factory.mktemp('written')
    run = Run(folder, EMA, evaluation=None).train()
    return (folder / 'epoch_2.pth').read_bytes(), run.load('epoch_2.pth')


@pytest.mark.parametrize('resume', [True, False], ids=['resume', 'load_from'])
@pytest.mark.parametrize('seed', SEEDS)
def test_damaged_files(seed, resume, written, tmp_path, capsys):
    """Each is refused before the model changes, or gives the weights."""
    data, good = written
    averages = good['state_dict']
    verdicts = []
    for number in range(FILES):
        broken, name = damaged(data, seed * FILES + number)
        path = tmp_path / f'{number}.pth'
        path.write_bytes(broken)
        lines = Lines()
        run = Run(tmp_path, EMA, evaluation=None, logger=quiet(lines))

        def load(run=run, path=path):
            if not resume:
                run.runner.load_checkpoint(str(path))
                return None
            run.runner.resume(str(path))
            run.runner.call_hook('before_run')
            run.runner.call_hook('before_train_epoch')
            run.runner.call_hook('before_train_iter')
            averager = hook_of(run)._life.averager
            return {k: v.clone() for k, v in averager.named_averages()}

        expected = (raw_of(good) if resume else averages, averages)

        def said(lines=lines):
            return [*lines.lines, capsys.readouterr().out]

        verdicts.append(judge(load, run.model, expected, name, said))
        path.unlink()
    print(verdicts)
    assert FILES == len(verdicts)


def hook_of(run):
    """Our hook in a run."""
    kinds = (x for x in run.runner.hooks if type(x).__name__ == 'EMAHook')
    return next(kinds)
