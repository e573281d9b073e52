"""Stop and resume, fine-tune, and what is in the files."""

import numpy as np
import pytest
import torch
from mmcv.runner import RUNNERS, EpochBasedRunner, load_checkpoint

from mmdet_ema import CheckpointError
from tests.for_mmcv1.toy import (
    EMA,
    Lines,
    Run,
    ToyData,
    ToyModel,
    quiet,
    raw_of,
    same,
)

EPOCHS = dict(max_epochs=4)


def averages(checkpoint):
    return checkpoint['state_dict']


def steps_of(checkpoint):
    message = checkpoint['meta']['hook_msgs']['EMAHook']
    assert message['ema_meta']['steps'] == message['ema_meta']['num_steps']
    return message['ema_meta']['steps']


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'NORMAL', 'VERY_LOW'])
def test_iteration_runner_repeats_no_iteration(priority, tmp_path):
    """The saved iteration is trained once; mmcv alone would repeat it."""

    def run(folder, iters, *hooks):
        kind = dict(type='IterBasedRunner', max_iters=iters)
        return Run(tmp_path / folder, *hooks, runner=kind)

    hook = dict(EMA, priority=priority)
    whole = run('whole', 8, hook).train()
    for folder, hooks, steps in (('a', [], 5), ('b', [hook], 4)):
        run(folder, 4, *hooks).train()
        rest = run(folder, 8, *hooks)
        # by itself it wants a GPU
        location = {} if hooks else dict(map_location='cpu')
        path = str(tmp_path / folder / 'iter_4.pth')
        rest.runner.resume(path, **location)
        rest.train()
        assert steps == len(rest.records)
    assert [] == same(rest.records[-1], whole.records[-1])
    saved, expected = rest.load('iter_8.pth'), whole.load('iter_8.pth')
    assert [] == same(averages(saved), averages(expected))
    assert 8 == steps_of(saved) == steps_of(expected)


def test_runner_with_a_resume_of_its_own(tmp_path):
    """A runner class that overrides ``resume`` resumes exactly, too."""

    @RUNNERS.register_module(force=True)
    class OwnRunner(EpochBasedRunner):
        def resume(self, path, map_location='cpu'):
            checkpoint = self.load_checkpoint(path, map_location=map_location)
            self._epoch = checkpoint['meta']['epoch']
            self._iter = checkpoint['meta']['iter']
            self.optimizer.load_state_dict(checkpoint['optimizer'])

    def run(folder, epochs):
        kind = dict(type='OwnRunner', max_epochs=epochs)
        return Run(tmp_path / folder, EMA, runner=kind)

    whole = run('whole', 4).train()
    run('half', 2).train()
    rest = run('half', 4).train(resume=tmp_path / 'half' / 'epoch_2.pth')
    saved, expected = rest.load('epoch_4.pth'), whole.load('epoch_4.pth')
    assert [] == same(averages(saved), averages(expected))
    assert [] == same(raw_of(saved), raw_of(expected))


def test_resume_from_is_mmcvs_word(tmp_path):
    """``resume_from=`` of the hook resumes like the tool's option."""
    Run(tmp_path / 'a', EMA, runner=dict(max_epochs=2)).train()
    path = str(tmp_path / 'a' / 'epoch_2.pth')
    hook = dict(EMA, resume_from=path)
    by_hook = Run(tmp_path / 'b', hook, runner=EPOCHS).train()
    by_tool = Run(tmp_path / 'c', EMA, runner=EPOCHS).train(resume=path)
    left, right = by_hook.load('epoch_4.pth'), by_tool.load('epoch_4.pth')
    assert 16 == steps_of(left)
    assert [] == same(averages(left), averages(right))
    assert [] == same(raw_of(left), raw_of(right))


def test_resume_from_yields_to_the_tools_resume(tmp_path):
    """A run that resumed already is not thrown back by ``resume_from``."""
    Run(tmp_path, EMA, runner=dict(max_epochs=2)).train()
    hook = dict(EMA, resume_from=str(tmp_path / 'epoch_1.pth'))
    lines = Lines()
    run = Run(tmp_path, hook, runner=EPOCHS, logger=quiet(lines))
    run.train(resume=tmp_path / 'epoch_2.pth')
    assert 8 == len(run.records)
    assert [x for x in lines.lines if 'resume_from' in x and 'WARN' in x]


def test_plain_keys_load_into_the_model_without_a_word(tmp_path):
    """``tools/test.py`` finds no missing and no unexpected key."""
    run = Run(tmp_path, EMA).train()
    lines = Lines()
    model = ToyModel()
    path = str(tmp_path / 'epoch_2.pth')
    load_checkpoint(model, path, strict=True, logger=quiet(lines))
    assert [] == [x for x in lines.lines if 'load checkpoint' not in x]
    weights = averages(run.load('epoch_2.pth'))
    assert torch.equal(model.head.weight, weights['head.weight'])
    assert weights['low'].dtype == torch.float32


def test_nothing_of_ours_stays_in_the_runner(tmp_path):
    """No tensors stay in ``runner.meta``, no hook on the model."""
    run = Run(tmp_path, EMA, meta=None, evaluation=None).train()
    assert run.runner.meta == {} or run.runner.meta is None
    # what it has to say is in the file all the same
    assert 8 == steps_of(run.load('epoch_2.pth'))
    assert not run.model._state_dict_hooks
    Run(tmp_path, EMA, runner=EPOCHS).train(resume=tmp_path / 'latest.pth')
    run = Run(tmp_path, EMA, runner=EPOCHS)
    run.runner.resume(str(tmp_path / 'epoch_2.pth'))
    assert 'EMAHook' not in run.runner.meta['hook_msgs']


def test_iterations_that_go_on_without_an_average(tmp_path):
    """``enabled=False`` takes the raw weights and leaves nothing of ours."""
    first, second = (
        dict(type='IterBasedRunner', max_iters=n) for n in (8, 16)
    )
    log = dict(interval=1, hooks=[dict(type='TextLoggerHook')])
    whole = Run(tmp_path / 'whole', runner=second).train()
    Run(tmp_path / 'half', EMA, runner=first).train()
    lines = Lines()
    off = dict(EMA, enabled=False)
    rest = Run(
        tmp_path / 'half', off, runner=second, log=log, logger=quiet(lines)
    )
    rest.train(resume=tmp_path / 'half' / 'iter_8.pth')
    assert [] == same(whole.records[-1], rest.records[-1])
    assert [x for x in lines.lines if 'enabled=False' in x]
    saved, expected = rest.load('iter_16.pth'), whole.load('iter_16.pth')
    assert [] == same(saved['state_dict'], expected['state_dict'])
    assert 'EMAHook' not in saved['meta'].get('hook_msgs', {})


def test_missing_file_is_named(tmp_path):
    """A line names a file that is not there."""
    with pytest.raises(CheckpointError, match=r'no file .*nowhere\.pth'):
        Run(tmp_path, EMA).train(resume=tmp_path / 'nowhere.pth')
    hook = dict(EMA, resume_from='nowhere.pth')
    with pytest.raises(CheckpointError, match=r'no file .*nowhere\.pth'):
        Run(tmp_path, hook).train()


@pytest.mark.parametrize('best', [1, 2], ids=['known', 'newer'])
@pytest.mark.parametrize('runner', ['EpochBasedRunner', 'IterBasedRunner'])
def test_best_score_is_a_scalar_of_numpy(runner, best, tmp_path, monkeypatch):
    """The best file stays the best one, as for mmseg's mIoU.

    That of the last evaluation was written after the file that is resumed.
    """
    scores = iter([0.9, 0.5, 0.1] if best == 1 else [0.5, 0.9, 0.1])

    def evaluate(self, results, **kwargs):
        return dict(mAP=np.float64(next(scores)))

    monkeypatch.setattr(ToyData, 'evaluate', evaluate)
    by_epoch = runner == 'EpochBasedRunner'
    every = dict(interval=1 if by_epoch else 4, by_epoch=by_epoch)
    length, unit = ('max_epochs', 1) if by_epoch else ('max_iters', 4)

    def run(units):
        return Run(
            tmp_path,
            EMA,
            runner={'type': runner, length: units * unit},
            checkpoint=dict(every),
            evaluation=dict(every, save_best='mAP'),
        )

    run(2).train()
    name = 'epoch' if by_epoch else 'iter'
    rest = run(3).train(resume=tmp_path / f'{name}_{2 * unit}.pth')
    assert 0.9 == rest.runner.meta['hook_msgs']['best_score']
    found = [path.name for path in tmp_path.glob('best_*')]
    assert [f'best_mAP_{name}_{best * unit}.pth'] == found
