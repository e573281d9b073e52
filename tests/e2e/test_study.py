"""The study in short: a run of 60 steps, all that is done with it."""

import json

import pytest
import torch

from mmdet_ema.checkpoint import windows
from mmdet_ema.checkpoint.combination import read_files
from mmdet_ema.checkpoint.runs import Run
from study import evaluate, runs, tables

pytestmark = pytest.mark.e2e
SHORT = runs.SETTINGS['short']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The folder of the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, 'ROOT', tmp_path_factory.mktemp('study'))
        runs.write_data(SHORT)
        runs.train(SHORT, 0)
        evaluate.evaluate(SHORT, 0)
        yield SHORT.folder(0)


def distance(left, right):
    """Root of the sum of squares over the parameters."""
    names = [x for x in left if x.endswith(('.weight', '.bias'))]
    return (
        sum(float((left[x] - right[x]).square().sum()) for x in names) ** 0.5
    )


def test_numbers(folder):
    """The training's own validation gave what the study has for it."""
    found = json.loads((folder / 'results.json').read_text())['plain']
    (log,) = folder.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (logged,) = [x[runs.METRIC] for x in lines if runs.METRIC in x]
    assert logged == found['validation'][runs.name_of(runs.MAIN)]
    sets = {'raw', 'default', 'swa', evaluate.TUNED, *tables.TRACKED}
    assert sets == found['validation'].keys() == found['held out'].keys()


def test_what_files_give(folder):
    """Averages that the run tracked are made of files that lack them."""
    tracked = torch.load(folder / 'tracked.pth', weights_only=True)
    run = Run(read_files(windows.files_of(str(folder))))
    assert {'raw', 'ema', 'posthoc'} == run.files[-1].sets.keys()
    raw = run.files[-1].sets['raw'].tensors
    for share in (0.1, 0.3):
        length = share * SHORT.steps
        (made,), _ = windows.make_windows(run, [length])
        wanted = tracked[runs.name_of(share)]
        away = distance(made.combination.state_dict(), wanted)
        # a tenth of the way from the raw weights: the error of the profile
        # is below a tenth, too
        assert away < 0.1 * distance(raw, wanted)


def test_tables(folder):
    """Both languages have the same numbers, a row for each set of weights."""
    found = [json.loads((folder / 'results.json').read_text())]
    english, chinese = (
        tables.sets_table(found, tables.WORDS[x]) for x in ('en', 'zh_cn')
    )
    lines = english.splitlines()
    assert 2 + 4 + len(runs.SHARES) == len(lines)
    assert 1 == len({line.count('|') for line in lines})
    for left, right in zip(lines[2:], chinese.splitlines()[2:]):
        assert left.split('|')[2:] == right.split('|')[2:]
    tune = tables.tune_table(SHORT, found, tables.WORDS['en'])
    assert 4 == len(tune.splitlines())
