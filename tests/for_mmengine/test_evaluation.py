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


def test_test_runs_on_the_averages(tmp_path):
    """By default the averages of a checkpoint are tested."""
    path, average, raw = trained(tmp_path / 'a')
    metrics = a_tester(tmp_path / 'b', path, 'ema').runner.test()
    # float32 sums in another order
    assert metrics == pytest.approx({'score': score(average)}, rel=1e-5)
    assert score(average) != pytest.approx(score(raw), rel=1e-3)


def test_test_runs_on_the_raw_weights_if_told(tmp_path):
    """``evaluate='raw'`` tests the raw half of the same file."""
    path, _, raw = trained(tmp_path / 'a')
    run = a_tester(tmp_path / 'b', path, 'raw')
    metrics = run.runner.test()
    assert metrics == pytest.approx({'score': score(raw)}, rel=1e-5)
    assert same(state_of(run.model), raw) == []


def test_test_runs_on_all_if_told(tmp_path):
    """``evaluate='all'`` gives each the metrics that it has alone."""
    path, _, _ = trained(tmp_path / 'a')
    names = ('ema', 'raw', 'fast')
    alone = {
        name: a_tester(tmp_path / name, path, name).runner.test()
        for name in names
    }
    scores = [alone[name]['score'] for name in names]
    assert len(set(scores)) == 3
    found = a_tester(tmp_path / 'all', path, 'all').runner.test()
    assert found == dict(zip(('score', 'score_raw', 'score_fast'), scores))
    off = a_tester(tmp_path / 'off', path, 'both', enabled=False)
    assert off.runner.test() == alone['ema']


def test_validation_of_both_while_training(tmp_path):
    """In training too, each set has the metrics that it has alone."""
    run = Run(tmp_path / 'a', dict(EMA, evaluate='both'), max_epochs=3).train()
    alone = {
        name: Run(
            tmp_path / name, dict(EMA, evaluate=name), max_epochs=3
        ).train()
        for name in ('ema', 'raw')
    }
    for name, end in (('ema', ''), ('raw', '_raw')):
        expected = alone[name].scalar('val/score').tolist()
        assert run.scalar(f'val/score{end}').tolist() == expected
    assert same(state_of(run.model), state_of(alone['raw'].model)) == []


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


def test_raw_weights_of_a_file_without_ema_part_are_refused(tmp_path):
    """Asked for raw weights, a plain file gets one clear line."""
    Run(tmp_path / 'a', max_epochs=1).train()
    run = a_tester(tmp_path / 'b', tmp_path / 'a' / 'epoch_1.pth', 'raw')
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
    """Keeps a temporary folder, as the panoptic metric does."""

    def __init__(self):
        super().__init__()
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


def test_both_with_a_metric_that_owns_a_folder(tmp_path):
    """Each set of weights has a folder of its own, at every validation."""
    hook = dict(EMA, evaluate='both')
    run = Run(tmp_path / 'a', hook, metric=FolderScore(), max_epochs=3)
    run.train()
    plain = Run(tmp_path / 'b', hook, max_epochs=3).train()
    for name in ('val/score', 'val/score_raw'):
        # the folder keeps sixteen digits of each score
        assert run.scalar(name) == pytest.approx(plain.scalar(name), rel=1e-12)


def test_both_with_a_metric_that_cannot_be_copied(tmp_path):
    """The run's own metrics see both sets, whatever they hold."""
    metric = Score()
    metric.lock = threading.Lock()
    hook = dict(EMA, evaluate='both')
    run = Run(tmp_path / 'a', hook, metric=metric).train()
    plain = Run(tmp_path / 'b', hook).train()
    for name in ('val/score', 'val/score_raw'):
        assert run.scalar(name).tolist() == plain.scalar(name).tolist()


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


def test_raw_weights_of_a_bare_state_dict_are_refused(tmp_path):
    """A file that is a state_dict holds one set of weights."""
    torch.save(state_of(ToyModel()), tmp_path / 'bare.pth')
    run = a_tester(tmp_path / 'b', tmp_path / 'bare.pth', 'raw')
    with pytest.raises(ValueError, match="evaluate='raw' needs raw weights"):
        run.runner.test()


def test_raw_weights_that_are_missing_are_refused(tmp_path):
    """An EMA part without raw weights never passes averages off as raw."""
    path, _, _ = trained(tmp_path / 'a')
    saved = torch.load(path, weights_only=needs.SAFELY)
    saved['ema_state_dict'] = {'steps': saved['ema_state_dict']['steps']}
    torch.save(saved, path)
    run = a_tester(tmp_path / 'b', path, 'raw')
    with pytest.raises(ValueError, match='no raw weights of 14 tensors'):
        run.runner.test()
