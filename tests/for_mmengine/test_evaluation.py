"""Which weights validation and test run on."""

import tempfile
import threading

import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.model import BaseTTAModel

from tests import needs
from tests.contract.test_evaluation import score_of as score
from tests.contract.toy import Saved
from tests.for_mmengine.toy import Run, Score, ToyModel, loader, same, state_of

FAST = dict(schedule='constant', decay=0.5)
EMA = dict(
    type='EMAHook', schedule='constant', decay=0.9, averages=dict(fast=FAST)
)


def trained(tmp_path):
    """Train once; return the checkpoint's path and its two halves."""
    Run(tmp_path, EMA, max_epochs=2).train()
    saved = Saved(tmp_path / 'epoch_2.pth')
    return tmp_path / 'epoch_2.pth', saved.averages, saved.raws


def a_tester(tmp_path, path, evaluate, **options):
    """A runner that only tests, as ``tools/test.py`` makes one."""
    return Run(
        tmp_path,
        dict(EMA, evaluate=evaluate, **options),
        load_from=str(path),
        test_dataloader=loader(4, seed=1),
        test_cfg=dict(),
        test_evaluator=Evaluator([Score()]),
    )


def test_test_runs_on_all_if_told(tmp_path):
    """``evaluate='all'`` gives each the metrics that it has alone.

    By default these are the averages.
    """
    path, average, raw = trained(tmp_path / 'a')
    testers = {
        name: a_tester(tmp_path / name, path, name)
        for name in ('ema', 'raw', 'fast')
    }
    alone = {name: run.runner.test() for name, run in testers.items()}
    for name, weights in (('ema', average), ('raw', raw)):
        # float32 sums in another order
        expected = pytest.approx({'score': score(weights)}, rel=1e-5)
        assert expected == alone[name]
    assert same(state_of(testers['raw'].model), raw) == []
    scores = [metrics['score'] for metrics in alone.values()]
    assert len({round(x, 2) for x in scores}) == 3
    found = a_tester(tmp_path / 'all', path, 'all').runner.test()
    assert found == dict(zip(('score', 'score_raw', 'score_fast'), scores))
    off = a_tester(tmp_path / 'off', path, 'both', enabled=False)
    assert off.runner.test() == alone['ema']


def test_both_before_the_average_begins(tmp_path):
    """Before ``begin_epoch`` both sets have the same metrics."""
    hook = dict(EMA, evaluate='both', begin_epoch=2)
    run = Run(tmp_path, hook, max_epochs=2).train()
    ema, raw = run.scalar('val/score'), run.scalar('val/score_raw')
    assert ema[0] == raw[0]
    assert ema[1] != raw[1]


def test_validation_alone_runs_on_the_averages(tmp_path):
    """``Runner.val()`` of a loaded checkpoint evaluates its averages."""
    path, average, _ = trained(tmp_path / 'a')
    run = Run(tmp_path / 'b', EMA, load_from=str(path))
    metrics = run.runner.val()
    assert metrics == pytest.approx({'score': score(average)}, rel=1e-5)


def test_test_after_training_in_one_process(tmp_path):
    """``train()`` then ``test()`` tests the averages, and leaves the raw."""
    run = Run(
        tmp_path,
        EMA,
        test_dataloader=loader(4, seed=1),
        test_cfg=dict(),
        test_evaluator=Evaluator([Score()]),
    ).train()
    metrics = run.runner.test()
    average = run.load('epoch_2.pth')['state_dict']
    assert metrics == pytest.approx({'score': score(average)}, rel=1e-5)
    assert same(state_of(run.model), run.records[-1]) == []


@pytest.mark.parametrize('bare', [True, False])
def test_raw_weights_of_a_file_without_ema_part_are_refused(tmp_path, bare):
    """Asked for raw weights, a file of one set gets one clear line."""
    path = tmp_path / 'epoch_1.pth'
    if bare:
        torch.save(state_of(ToyModel()), path)
    else:
        Run(tmp_path, max_epochs=1).train()
    run = a_tester(tmp_path / 'b', path, 'raw')
    with pytest.raises(ValueError, match="evaluate='raw' needs raw weights"):
        run.runner.test()


def test_file_without_ema_part_is_tested_as_it_is(tmp_path):
    """Without an EMA part there is one set of weights, and it is tested."""
    Run(tmp_path / 'a', max_epochs=1).train()
    path = tmp_path / 'a' / 'epoch_1.pth'
    weights = torch.load(path, weights_only=False)['state_dict']
    metrics = a_tester(tmp_path / 'b', path, 'ema').runner.test()
    assert metrics == pytest.approx({'score': score(weights)}, rel=1e-5)


class FolderScore(Score):
    """Keeps a temporary folder, as the panoptic metric does, and a lock."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.folder = tempfile.TemporaryDirectory()
        self.path = f'{self.folder.name}/scores.txt'

    def process(self, data_batch, data_samples):
        super().process(data_batch, data_samples)
        with open(self.path, 'w') as file:
            file.write('\n'.join(map(str, self.results)))

    def compute_metrics(self, results):
        with open(self.path) as file:
            return dict(score=sum(float(line) for line in file))

    def __del__(self):
        self.folder.cleanup()


def test_both_with_a_metric_that_cannot_be_copied(tmp_path):
    """The run's own metrics see both sets, whatever they hold."""
    hook = dict(EMA, evaluate='both')
    run = Run(tmp_path / 'a', hook, metric=FolderScore(), max_epochs=3)
    run.train()
    plain = Run(tmp_path / 'b', hook, max_epochs=3).train()
    for name in ('val/score', 'val/score_raw'):
        # the folder keeps sixteen digits of each score
        assert run.scalar(name) == pytest.approx(plain.scalar(name), rel=1e-12)


class Augmented(BaseTTAModel):
    """Test-time augmentation with a single view."""

    def merge_preds(self, data_samples_list):
        return [samples[0] for samples in data_samples_list]

    def test_step(self, data):
        return self.module.test_step(data)


@pytest.mark.parametrize('evaluate', ['ema', 'raw', 'fast', 'all'])
def test_test_time_augmentation_uses_the_chosen_weights(tmp_path, evaluate):
    """Through a TTA model each set has the metrics that it has alone."""
    path, _, _ = trained(tmp_path / 'a')
    plain = a_tester(tmp_path / 'b', path, evaluate).runner.test()
    run = a_tester(tmp_path / 'c', path, evaluate)
    run.runner.model = Augmented(run.model)
    assert run.runner.test() == plain


def test_raw_weights_that_are_missing_are_refused(tmp_path):
    """An EMA part without raw weights never passes averages off as raw."""
    path, _, _ = trained(tmp_path / 'a')
    saved = torch.load(path, weights_only=needs.SAFELY)
    saved['ema_state_dict'] = {'steps': saved['ema_state_dict']['steps']}
    torch.save(saved, path)
    run = a_tester(tmp_path / 'b', path, 'raw')
    with pytest.raises(ValueError, match='no raw weights of 14 tensors'):
        run.runner.test()
