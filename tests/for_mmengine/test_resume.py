"""Stop, resume, fine-tune, and trade files with mmengine's own hook."""

import pytest
import torch
from mmengine.hooks import EMAHook as PeerHook
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer

from mmdet_ema import CheckpointError
from tests import oracle
from tests.for_mmengine.toy import (
    SAFELY,
    Run,
    Score,
    ToyModel,
    loader,
    same,
    state_of,
    untied,
)

EMA = dict(type='EMAHook', decay=0.9, tau=3)


def ema_equal(left, right):
    """Names that differ between two checkpoints, in weights or EMA part."""
    return same(left['state_dict'], right['state_dict']) + same(
        left['ema_state_dict'], right['ema_state_dict']
    )


def test_resume_keeps_the_scalar_history(tmp_path):
    """The message hub's histories survive, as mmengine's own files' do."""
    Run(tmp_path, EMA, max_epochs=1).train()
    resumed = Run(tmp_path, EMA, max_epochs=2, resume=True).train()
    hub = resumed.runner.message_hub
    assert isinstance(hub.log_scalars['train/loss'], HistoryBuffer)
    assert len(resumed.scalar('train/loss')) == 8
    assert len(resumed.scalar('train/ema_decay')) == 8


def peer(**options):
    """Make mmengine's own hook, the same averaging as ours."""
    return PeerHook(
        ema_type='ExponentialMovingAverage', momentum=0.1, **options
    )


def test_checkpoint_of_mmengines_hook_resumes_here(tmp_path):
    """Raw weights, averages and n of its file go to the right places."""
    model = untied(ToyModel())
    Run(tmp_path, peer(), model=model, max_epochs=1).train()
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    hook = dict(type='EMAHook', momentum=0.1)
    model = untied(ToyModel())
    run = Run(tmp_path, hook, model=model, max_epochs=2, resume=True)
    run.train()
    start, values = run.trace('head.weight')
    raw = saved['ema_state_dict']['module.head.weight']
    assert torch.equal(torch.from_numpy(start).float(), raw)
    expected = oracle.average(
        saved['state_dict']['head.weight'], values, lambda n: 0.9
    )
    resumed = run.load('epoch_2.pth')
    found = resumed['state_dict']['head.weight']
    assert oracle.relative_error(found, expected) < 1e-6  # float32 rounding
    assert resumed['ema_state_dict']['steps'] == 8


def test_our_checkpoint_resumes_in_mmengines_hook(tmp_path):
    """Its hook finds raw weights, averages and steps where it expects."""
    hook, model = dict(type='EMAHook', momentum=0.1), untied(ToyModel())
    Run(tmp_path, hook, model=model, max_epochs=1).train()
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=SAFELY)
    theirs = peer()
    model = untied(ToyModel())
    run = Run(tmp_path, theirs, model=model, max_epochs=2, resume=True)
    run.train()
    start, values = run.trace('head.weight')
    raw = saved['ema_state_dict']['module.head.weight']
    assert torch.equal(torch.from_numpy(start).float(), raw)
    expected = oracle.average(
        saved['state_dict']['head.weight'], values, lambda n: 0.9
    )
    found = theirs.ema_model.module.head.weight
    # float32 rounding
    assert oracle.relative_error(found.detach(), expected) < 1e-6
    assert theirs.ema_model.steps == 8


def test_resume_with_another_batch_size_plans_the_steps_that_follow(tmp_path):
    """What is planned is what is done, and what the last epoch will add."""
    Run(tmp_path, EMA, max_epochs=2).train()
    size = dict(train_dataloader=loader(batch=8), resume=True)
    run = Run(tmp_path, EMA, max_epochs=3, **size).train()
    logs = [path.read_text() for path in tmp_path.glob('*/*.log')]
    assert any('steps: 10 planned, 8 of them done' in log for log in logs)
    assert 10 == run.load('epoch_3.pth')['ema_state_dict']['steps']


def test_newly_frozen_layer_keeps_its_average_on_resume(tmp_path):
    """Freezing a layer on resume does not replace its average by the raw."""
    Run(tmp_path, EMA, max_epochs=1).train()
    model = ToyModel()
    model.head.requires_grad_(False)
    options = dict(model=model, max_epochs=2, resume=True)
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=SAFELY)
    parameters = [p for p in model.parameters() if p.requires_grad]
    del saved['optimizer']
    assert parameters
    torch.save(saved, tmp_path / 'epoch_1.pth')
    run = Run(tmp_path, EMA, **options).train()
    raw = saved['ema_state_dict']['module.head.weight'].double().numpy()
    expected = saved['state_dict']['head.weight'].double().numpy()
    for n in range(5, 9):
        d = oracle.ramp(n, 0.9, 3)
        expected = d * expected + (1 - d) * raw
    found = run.load('epoch_2.pth')['state_dict']['head.weight']
    assert oracle.relative_error(found, expected) < 1e-6  # float32 rounding


def test_resume_of_frozen_weights_shares_them_in_the_file(tmp_path):
    """A frozen tensor is stored once, under both of its names."""
    run = Run(tmp_path, EMA, max_epochs=1).train()
    saved = run.load('epoch_1.pth')
    left = saved['state_dict']['frozen.weight']
    right = saved['ema_state_dict']['module.frozen.weight']
    assert left.data_ptr() == right.data_ptr()
    assert same({'x': left}, {'x': state_of(run.model)['frozen.weight']}) == []


class SanityCheck(Hook):
    """Validates once before training starts."""

    priority = 'VERY_HIGH'

    def before_train(self, runner):
        runner.val_loop.run()


def test_validation_before_a_resumed_training_keeps_the_average(tmp_path):
    """A sanity check of the loaded weights does not use the average up."""
    whole = Run(tmp_path / 'whole', EMA, max_epochs=4).train()
    Run(tmp_path / 'part', EMA, max_epochs=2).train()
    resumed = Run(
        tmp_path / 'part', EMA, SanityCheck(), max_epochs=4, resume=True
    ).train()
    left, right = (r.load('epoch_4.pth') for r in (whole, resumed))
    assert ema_equal(left, right) == []


def test_training_twice_in_one_process_goes_on(tmp_path):
    """A second ``train()`` of one runner keeps average and n."""
    run = Run(tmp_path, EMA, max_epochs=2).train()
    run.runner.train_loop._max_epochs = 4
    run.runner.train_loop._max_iters = 16
    start = run.recorder.start
    run.train()
    saved = run.load('epoch_4.pth')
    assert saved['ema_state_dict']['steps'] == 16
    values = [r['head.weight'].double().numpy() for r in run.records]
    expected = oracle.average(
        start['head.weight'], values, lambda n: oracle.ramp(n, 0.9, 3)
    )
    found = saved['state_dict']['head.weight']
    assert oracle.relative_error(found, expected) < 1e-6  # float32 rounding


def test_fine_tuning_from_a_foreign_ema_part(tmp_path):
    """``load_from`` needs ``state_dict`` alone; a strange part is left out."""
    weights = state_of(ToyModel())
    torch.save(
        dict(state_dict=weights, ema_state_dict={'x': torch.ones(1)}),
        tmp_path / 'foreign.pth',
    )
    options = dict(max_epochs=1, load_from=str(tmp_path / 'foreign.pth'))
    run = Run(tmp_path / 'run', EMA, **options).train()
    assert same(run.recorder.start, weights) == []
    assert 'the EMA part is left out' in run.log


def test_names_with_a_wrappers_prefix_resume(tmp_path):
    """``module.`` before the names of ``state_dict`` is no part of them."""
    whole = Run(tmp_path / 'whole', EMA, max_epochs=2).train()
    Run(tmp_path / 'part', EMA, max_epochs=1).train()
    path = tmp_path / 'part' / 'epoch_1.pth'
    saved = torch.load(path, weights_only=SAFELY)
    named = {f'module.{k}': v for k, v in saved['state_dict'].items()}
    torch.save(dict(saved, state_dict=named), path)
    resumed = Run(tmp_path / 'part', EMA, max_epochs=2, resume=True).train()
    left, right = (r.load('epoch_2.pth') for r in (whole, resumed))
    assert ema_equal(left, right) == []


def test_resume_before_the_first_step_is_exact(tmp_path):
    """With n = 0, in the middle of an accumulation, buffers go on too."""
    by_iter = dict(type='CheckpointHook', by_epoch=False, interval=1)
    run = Run(
        tmp_path,
        EMA,
        accumulative_counts=3,
        hooks=dict(checkpoint=by_iter),
        train_cfg=dict(by_epoch=False, max_iters=4, val_interval=9),
    ).train()
    first = run.load('iter_1.pth')
    assert first['ema_state_dict']['steps'] == 0
    resumed = Run(
        tmp_path / 'again',
        EMA,
        accumulative_counts=3,
        hooks=dict(checkpoint=by_iter),
        train_cfg=dict(by_epoch=False, max_iters=4, val_interval=9),
        resume=True,
        load_from=str(tmp_path / 'iter_1.pth'),
    ).train()
    left = run.load('iter_2.pth')['state_dict']['norm.running_mean']
    right = resumed.load('iter_2.pth')['state_dict']['norm.running_mean']
    assert torch.equal(left, right)


class LoadAgain(Hook):
    """Goes back to a file in the third epoch."""

    def before_train_epoch(self, runner):
        if runner.epoch == 2:
            runner.load_checkpoint(f'{runner.work_dir}/epoch_1.pth')


def test_file_loaded_in_a_resumed_training_brings_its_average(tmp_path):
    """Raw weights and average go back together."""
    Run(tmp_path, EMA, max_epochs=1).train()
    run = Run(tmp_path, LoadAgain(), EMA, max_epochs=3, resume=True).train()
    assert run.load('epoch_3.pth')['ema_state_dict']['steps'] == 8


class GoBack(Hook):
    """Resumes a file in the third epoch, once."""

    left = 1

    def before_train_epoch(self, runner):
        if runner.epoch == 2 and self.left:
            self.left = 0
            runner.resume(f'{runner.work_dir}/epoch_1.pth')


@pytest.mark.parametrize('when', ['before', 'after another', 'in the middle'])
@pytest.mark.parametrize('evaluates', [False, True])
def test_resume_by_hand_is_exact(tmp_path, when, evaluates):
    """``runner.resume`` goes on as a run that was told to resume."""
    whole = Run(tmp_path / 'whole', EMA, max_epochs=3).train()
    hooks = [GoBack()] if when == 'in the middle' else []
    run = Run(tmp_path / 'by hand', *hooks, EMA, max_epochs=3)
    if when == 'after another':
        run.train()
    if not hooks:
        run.runner.resume(str(tmp_path / 'whole' / 'epoch_1.pth'))
        # else the weights would be initialised anew when training starts
        run.model.init_weights = lambda: None
        if evaluates:
            run.runner.val()
    run.train()
    left, right = (r.load('epoch_3.pth') for r in (whole, run))
    assert ema_equal(left, right) == []


@pytest.mark.parametrize('first', ['val', 'load_or_resume'])
def test_what_comes_before_a_resumed_training_changes_nothing(tmp_path, first):
    """The file is resumed before anything trains, and not read again."""
    whole = Run(tmp_path / 'whole', EMA, max_epochs=3).train()
    file = str(tmp_path / 'whole' / 'epoch_1.pth')
    options = dict(max_epochs=3, resume=True, load_from=file)
    run = Run(tmp_path / 'rest', EMA, **options)
    getattr(run.runner, first)()
    assert (first == 'val') is ('evaluating the averages (n=4)' in run.log)
    # else the weights would be initialised anew when training starts
    run.model.init_weights = lambda: None
    run.train()
    left, right = (r.load('epoch_3.pth') for r in (whole, run))
    assert ema_equal(left, right) == []


def a_tester(tmp_path, evaluate, resume=True):
    """A runner as ``tools/test.py`` makes one of a config that was dumped.

    That of a run that was resumed says ``resume=True``.
    """
    return Run(
        tmp_path / 'b',
        dict(EMA, evaluate=evaluate),
        resume=resume,
        load_from=str(tmp_path / 'a' / 'epoch_1.pth'),
        test_dataloader=loader(4, seed=1),
        test_cfg=dict(),
        test_evaluator=Score(),
    )


@pytest.mark.parametrize('evaluate', ['ema', 'raw', 'both'])
def test_dumped_config_of_a_resumed_run_tests_the_same(tmp_path, evaluate):
    """Whether the framework resumes the file or loads it."""
    Run(tmp_path / 'a', EMA, max_epochs=1).train()
    found, expected = (
        a_tester(tmp_path, evaluate, resume).runner.test()
        for resume in (True, False)
    )
    assert found == expected


@pytest.mark.parametrize('kind', ['val', 'test'])
def test_dumped_config_of_a_resumed_run_refuses_as_any(tmp_path, kind):
    """A file without the weights that are asked for."""
    Run(tmp_path / 'a', max_epochs=1).train()
    run = a_tester(tmp_path, 'both')
    with pytest.raises(CheckpointError, match='holds one set of weights'):
        getattr(run.runner, kind)()


def test_average_shown_by_hand_does_not_leak_into_training(tmp_path):
    """Loading a file by hand, under 'both', then training starts anew."""
    Run(tmp_path / 'a', EMA, max_epochs=2).train()
    hook = dict(EMA, evaluate='both')
    run = Run(tmp_path / 'b', hook, max_epochs=1)
    run.runner.load_checkpoint(str(tmp_path / 'a' / 'epoch_2.pth'))
    run.train()
    assert run.load('epoch_1.pth')['ema_state_dict']['steps'] == 4


@pytest.mark.parametrize(
    'value', ['text', torch.ones(2, 4, dtype=torch.long)], ids=['str', 'int']
)
def test_damaged_raw_weights_are_refused(tmp_path, value):
    """A raw weight that is no float tensor is named."""
    Run(tmp_path, EMA, max_epochs=1).train()
    path = tmp_path / 'epoch_1.pth'
    saved = torch.load(path, weights_only=SAFELY)
    saved['ema_state_dict']['module.head.weight'] = value
    torch.save(saved, path)
    run = Run(tmp_path, EMA, max_epochs=2, resume=True)
    with pytest.raises(ValueError, match=r'head\.weight is'):
        run.train()


def test_implausible_counters_do_not_hang_the_run(tmp_path):
    """A counter of 2**40 steps is one product, not 10**12 of them."""
    Run(tmp_path, EMA, max_epochs=1).train()
    path = tmp_path / 'epoch_1.pth'
    saved = torch.load(path, weights_only=SAFELY)
    saved['ema_state_dict']['steps'] = torch.tensor(2**40)
    torch.save(saved, path)
    run = Run(tmp_path, EMA, max_epochs=2, resume=True).train()
    assert run.load('epoch_2.pth')['ema_state_dict']['steps'] == 2**40 + 4


def test_file_of_the_older_framework_is_refused(tmp_path):
    """A file of mmcv 1.x cannot resume; one line says what can be done."""
    meta = dict(epoch=1, iter=4, hook_msgs=dict(EMAHook={}))
    weights = ToyModel().state_dict()
    torch.save(dict(meta=meta, state_dict=weights), tmp_path / 'old.pth')
    run = Run(tmp_path, EMA, load_from=str(tmp_path / 'old.pth'), resume=True)
    with pytest.raises(ValueError, match=r'written by mmcv 1\.x'):
        run.train()
