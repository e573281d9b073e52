"""Damaged files: one clear line, or the right weights."""

import pytest

from tests.contract.toy import EMA, Run, state_of
from tests.damage import FILES, SEEDS, damaged, judge


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """A file of two epochs, and what is in it."""
    folder = tmp_path_factory.mktemp('written')
    run = Run(folder, EMA).train()
    return (folder / 'epoch_2.pth').read_bytes(), run.load()


@pytest.fixture(scope='module')
def run(written, tmp_path_factory):
    """A run that reads many files, and the weights that it began with."""
    run = Run(tmp_path_factory.mktemp('run'), EMA)
    return run, state_of(run.model)


@pytest.mark.parametrize('resume', [True, False], ids=['resume', 'load_from'])
@pytest.mark.parametrize('seed', SEEDS)
def test_damaged_files(seed, resume, written, run, tmp_path, capsys):
    """Each is refused before the model changes, or gives the weights."""
    data, good = written
    run, start = run
    weights = good.raws if resume else good.averages
    for number in range(FILES):
        broken, name = damaged(data, seed * FILES + number)
        path = tmp_path / f'{number}.pth'
        path.write_bytes(broken)
        run.model.load_state_dict(start)
        judge(
            lambda path=path: run.read(path, resume),
            run.model,
            (weights, good.averages),
            name,
            lambda: run.log + capsys.readouterr().out,
        )
