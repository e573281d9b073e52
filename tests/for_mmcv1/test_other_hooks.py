"""Files of mmcv's own hook and of mmdet 2's two, written by running them."""

import pytest
import torch
from torch import nn

from mmdet_ema import EMAHook, OptionError
from tests import oracle
from tests.for_mmcv1.toy import Lines, Run, ToyModel, quiet, raw_of, same

pytest.importorskip('mmdet.core.hook')

# float32 rounds each of 8 updates to 6e-8 of the magnitude
TOLERANCE = 1e-6
HOOKS = {
    'MMCVEMAHook': dict(momentum=0.005),
    'MMDetExpMomentumEMAHook': dict(momentum=0.005, total_iter=20),
    'MMDetLinearMomentumEMAHook': dict(momentum=0.005),
}
RUNNERS = {
    'epochs': dict(type='EpochBasedRunner', max_epochs=2),
    'iters': dict(type='IterBasedRunner', max_iters=8),
}


class Untied(ToyModel):
    """Without what those hooks destroy."""

    def __init__(self):
        super().__init__()
        weight = self.first.weight.detach() * 0.9
        self.tied.weight = nn.Parameter(weight)


def raw_after(run, step):
    """Weights after a step, without the buffers of the hook."""
    state = run.records[step]
    return {k: v for k, v in state.items() if not k.startswith('ema_')}


def decay_of(kind):
    if 'Exp' in kind:
        return lambda n: oracle.ramp(n, 0.995, 20)
    return lambda n: 0.995


def written(folder, kind, priority='NORMAL', runner='epochs', **options):
    """Train with one of those hooks."""
    hook = dict(type=kind, priority=priority, **HOOKS[kind])
    options.setdefault('model', Untied())
    options.setdefault('evaluation', None)
    return Run(folder, hook, runner=RUNNERS[runner], **options)


def resumed(path, runner='epochs', model=None, **hook):
    """Resume from a file with our hook and save at once, untrained."""
    lines = Lines()
    steps = dict(RUNNERS[runner])
    steps['max_iters' if runner == 'iters' else 'max_epochs'] = 1
    run = Run(
        path.parent / 'ours',
        dict(type='EMAHook', update_buffers=True, momentum=0.005, **hook),
        model=model or Untied(),
        runner=steps,
        logger=quiet(lines),
    )
    run.train(resume=path)
    assert [] == run.records
    run.runner.save_checkpoint(str(path.parent), 'ours.pth')
    return run, torch.load(path.parent / 'ours.pth'), lines.lines


def wrong(run, saved, kind, steps=8):
    """Names of the averages that are not the hook's own."""
    found = []
    for key, value in saved['state_dict'].items():
        start, values = run.trace(key)
        expected = oracle.average(start, values[:steps], decay_of(kind))
        copied = kind == 'MMCVEMAHook' and 'running' in key
        if copied or 'tracked' in key:
            expected = values[-1]
        error = oracle.relative_error(value.double(), expected)
        # those hooks average the bfloat16 parameter in bfloat16
        if error > (0.02 if key == 'low' else TOLERANCE):
            found.append(f'{key} {error}')
    return found


@pytest.mark.parametrize('priority', [49, 'ABOVE_NORMAL', 'NORMAL', 'LOW'])
@pytest.mark.parametrize('runner', list(RUNNERS))
@pytest.mark.parametrize('kind', list(HOOKS))
def test_files_resume(kind, runner, priority, tmp_path):
    """Averages and raw weights go to the right places, n goes on.

    By iteration mmcv saves before a later hook's last update.
    """
    run = written(tmp_path, kind, priority, runner).train()
    name = 'epoch_2.pth' if runner == 'epochs' else 'iter_8.pth'
    # counters tell, the name of a file by iteration, or the user
    late_swap = runner == 'epochs' and priority in ('NORMAL', 'LOW')
    told = late_swap and kind == 'MMCVEMAHook'
    holds = dict(state_dict_holds='raw') if told else {}
    _, saved, lines = resumed(tmp_path / name, runner, **holds)
    assert [] == same(raw_after(run, -1), raw_of(saved))
    late = runner == 'iters' and priority in ('NORMAL', 'LOW')
    assert [] == wrong(run, saved, kind, 7 if late else 8)
    # mmcv says 7 in a file that is written at the eighth iteration
    steps = saved['meta']['hook_msgs']['EMAHook']['ema_meta']['num_steps']
    assert steps == (8 if runner == 'epochs' else 7)
    assert 1 == len([x for x in lines if 'own EMA hook' in x])


@pytest.mark.parametrize('kind', list(HOOKS))
def test_link_resumes_as_its_file_does(kind, tmp_path):
    """The name of latest.pth does not tell; that of its target does."""
    run = written(tmp_path, kind, 49, 'iters').train()
    link = tmp_path / 'latest.pth'
    assert link.is_symlink()
    _, saved, _ = resumed(link, 'iters')
    assert [] == same(raw_after(run, -1), raw_of(saved))
    assert [] == wrong(run, saved, kind)


@pytest.mark.parametrize('by_epoch', [True, False])
@pytest.mark.parametrize('priority', [49, 'NORMAL', 'VERY_LOW'])
def test_files_that_an_evaluation_wrote_resume(priority, by_epoch, tmp_path):
    """``EvalHook`` saves later than ``CheckpointHook``, maybe swapped."""
    evaluation = dict(save_best='score', rule='greater', interval=1)
    run = written(
        tmp_path,
        'MMCVEMAHook',
        priority,
        evaluation=evaluation,
        checkpoint=dict(interval=1, by_epoch=by_epoch),
    ).train()
    best = next(tmp_path.glob('best_*.pth'))
    steps = 4 * int(best.stem[-1])
    holds = 'raw' if priority == 'VERY_LOW' else 'ema'
    saved = resumed(best, state_dict_holds=holds)[1]
    assert [] == same(raw_after(run, steps - 1), raw_of(saved))


def test_what_the_plain_keys_hold_can_be_said(tmp_path):
    """A file between two epochs' swaps has the raw weights plain."""
    checkpoint = dict(interval=3, by_epoch=False, save_last=False)
    run = written(tmp_path, 'MMCVEMAHook', 49, checkpoint=checkpoint).train()
    saved = resumed(tmp_path / 'epoch_2.pth', state_dict_holds='raw')[1]
    assert [] == same(raw_after(run, 5), raw_of(saved))


@pytest.mark.parametrize('holds', ['average', '', 3, True])
def test_wrong_word_for_the_plain_keys(holds):
    """It is refused with what is allowed."""
    with pytest.raises(OptionError, match=r"state_dict_holds=.*'ema'.*'raw'"):
        EMAHook(state_dict_holds=holds)


def test_file_that_does_not_tell_is_taken_as_swapped(tmp_path):
    """A file of an epoch has the averages plain; a warning says the word."""
    run = written(tmp_path, 'MMCVEMAHook', 49).train()
    _, saved, lines = resumed(tmp_path / 'epoch_2.pth')
    assert [] == same(raw_after(run, -1), raw_of(saved))
    warned = [x for x in lines if 'WARNING' in x and 'does not tell' in x]
    assert 1 == len(warned)
    assert "state_dict_holds='raw'" in warned[0]


@pytest.mark.parametrize('priority', [49, 'NORMAL'])
def test_counters_tell_more_than_a_word(priority, tmp_path):
    """The hooks of mmdet swap BatchNorm's counters and never count in them."""
    kind = 'MMDetLinearMomentumEMAHook'
    run = written(tmp_path, kind, priority).train()
    wrong = 'ema' if priority == 'NORMAL' else 'raw'
    path = tmp_path / 'epoch_2.pth'
    _, saved, lines = resumed(path, state_dict_holds=wrong)
    assert [] == same(raw_after(run, -1), raw_of(saved))
    assert [x for x in lines if 'num_batches_tracked is' in x]


class Collided(Untied):
    """Two names that become one in mmcv's buffers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Module()
        self.a.b_c = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.a_b = nn.Module()
        self.a_b.c = nn.Parameter(torch.tensor([3.0, 4.0]))

    def forward(self, inputs, return_loss=True, **kwargs):
        more = (self.a.b_c * inputs[:, :2]).sum() + (self.a_b.c**2).sum()
        out = super().forward(inputs, return_loss)
        return out + more if return_loss else out


@pytest.mark.parametrize('priority', [49, 'NORMAL'])
def test_names_that_collide_are_named(priority, tmp_path):
    """Their average starts from the raw weights, which are all found."""
    run = written(
        tmp_path,
        'MMCVEMAHook',
        priority,
        model=Collided(),
        runner='epochs',
    )
    run.runner._max_epochs = 1
    run.train()
    holds = 'ema' if priority == 49 else 'raw'
    path = tmp_path / 'epoch_1.pth'
    model = Collided()
    _, saved, lines = resumed(path, model=model, state_dict_holds=holds)
    assert [] == same(raw_after(run, -1), raw_of(saved))
    names = ['a.b_c', 'a_b.c']
    weights = saved['state_dict']
    assert all(torch.equal(weights[n], run.records[-1][n]) for n in names)
    assert [x for x in lines if 'a.b_c, a_b.c' in x and 'WARNING' in x]


@pytest.mark.parametrize('kind', ['MMCVEMAHook', 'MMDetExpMomentumEMAHook'])
@pytest.mark.parametrize('priority', [49, 'NORMAL'])
def test_tied_weights_of_a_first_epoch_resume(kind, priority, tmp_path):
    """Both names get the raw weights that the first swap took out."""
    run = written(tmp_path, kind, priority, model=ToyModel())
    run.runner._max_epochs = 1
    run.train()
    holds = 'ema' if priority == 49 else 'raw'
    path = tmp_path / 'epoch_1.pth'
    _, saved, _ = resumed(path, model=ToyModel(), state_dict_holds=holds)
    assert [] == same(raw_after(run, -1), raw_of(saved))
    weights = saved['state_dict']
    assert torch.equal(weights['first.weight'], weights['tied.weight'])
    assert not torch.equal(
        weights['first.weight'], raw_of(saved)['first.weight']
    )


def test_fine_tuning_takes_the_averages(tmp_path):
    """``load_from`` starts from the averages and leaves no ``ema_*`` key."""
    run = written(tmp_path, 'MMCVEMAHook', 49).train()
    lines = Lines()
    tuned = Run(
        tmp_path / 'tuned',
        dict(type='EMAHook'),
        model=Untied(),
        logger=quiet(lines),
    )
    tuned.runner.load_checkpoint(str(tmp_path / 'epoch_2.pth'))
    state = dict(state_dict=tuned.model.state_dict())
    assert [] == wrong(run, state, 'MMCVEMAHook')
    assert [] == [x for x in lines.lines if 'unexpected' in x]
