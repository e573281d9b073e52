"""Stop and resume, fine-tune, and what is refused."""

import ast
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmdet_ema import CheckpointError, OptionError
from tests import needs, oracle
from tests.conftest import MMCV1
from tests.contract.toy import EMA, Hook, Run, ToyModel, ramp, same


def stopped(folder, hook, *, epochs=2, **options):
    """Train and stop; return the file of the last epoch."""
    Run(folder, hook, epochs=epochs, **options).train()
    return folder / f'epoch_{epochs}.pth'


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'NORMAL', 'VERY_LOW'])
@pytest.mark.parametrize('interval', [1, 3])
def test_resumed_run_equals_the_uninterrupted_one(
    tmp_path, interval, priority
):
    """Raw weights, averages and n are those of one run, bit for bit."""
    hook = dict(EMA, interval=interval, priority=priority)
    whole = Run(tmp_path / 'whole', hook, epochs=4).train()
    file = stopped(tmp_path / 'part', hook)
    rest = Run(tmp_path / 'part', hook, epochs=4, resume=file).train()
    assert 8 == len(rest.records)
    left, right = whole.load(4), rest.load(4)
    assert 16 == left.steps
    assert left.meta == right.meta
    assert [] == same(left.averages, right.averages)
    assert [] == same(left.raws, right.raws)


def test_without_an_ema_part_the_average_starts_from_the_weights(tmp_path):
    """A file of a run without EMA resumes; n starts at 0, and it is said."""
    Run(tmp_path, epochs=1).train()
    run = Run(tmp_path, EMA, resume=tmp_path / 'epoch_1.pth').train()
    saved = run.load()
    assert 4 == saved.steps
    assert {} == run.wrong(saved, ramp, ['head.weight', 'norm.running_var'])
    assert 'WARN' in run.log
    assert 'no EMA part' in run.log


def test_strict_resume_without_ema_part_is_refused(tmp_path):
    """With ``strict_load`` it is an error that says what to do."""
    Run(tmp_path, epochs=1).train()
    hook = dict(EMA, strict_load=True)
    run = Run(tmp_path, hook, resume=tmp_path / 'epoch_1.pth')
    run.refuse(CheckpointError, 'strict_load=False')


def test_strict_resume_of_a_complete_file(tmp_path):
    """Buffers that are not persistent are no unknown names."""

    def model():
        found = ToyModel()
        found.register_buffer('grid', torch.ones(3), persistent=False)
        return found

    hook = dict(EMA, strict_load=True)
    file = stopped(tmp_path, hook, model=model())
    run = Run(tmp_path, hook, model=model(), epochs=4, resume=file).train()
    assert 16 == run.load(4).steps


def test_resume_into_another_model_is_refused(tmp_path):
    """A shape that differs is named, with both shapes and what to do."""
    file = stopped(tmp_path, EMA)
    run = Run(tmp_path, EMA, model=ToyModel(5), epochs=4, resume=file)
    text = run.refuse(CheckpointError, r'head\.weight')
    for word in ('(2, 4)', '(5, 4)', 'load_from without resume'):
        assert word in text


@pytest.mark.parametrize('classes', [2, 5])
def test_fine_tuning_starts_from_the_averages(tmp_path, classes):
    """``load_from`` loads them; n starts at 0, whatever the classes are."""
    file = stopped(tmp_path / 'a', EMA)
    model = ToyModel(classes)
    run = Run(tmp_path / 'b', EMA, epochs=1, load=file, model=model).train()
    loaded = Run(tmp_path / 'a').load().averages
    assert torch.equal(run.start['first.weight'], loaded['first.weight'])
    assert (classes, 4) == run.start['head.weight'].shape
    saved = run.load(1)
    assert 4 == saved.steps
    assert {} == run.wrong(saved, ramp)


def test_changes_since_the_checkpoint_are_reported(tmp_path):
    """A changed schedule and batch size are named in one line."""
    file = stopped(tmp_path, EMA)
    hook = dict(EMA, decay=0.8)
    run = Run(tmp_path, hook, epochs=3, resume=file, batch=2).train()
    assert 1 == run.log.count('changed since the checkpoint')
    before = 'exponential(decay=0.9, tau=3.0)'
    assert f'schedule {before} -> exponential(decay=0.8' in run.log
    assert 'batch_size 4 -> 2' in run.log


@pytest.mark.parametrize('scale', [False, True])
def test_decay_of_another_batch_size(tmp_path, scale):
    """With half the samples a step, decay ** 0.5 keeps the window."""
    ema = dict(type='EMAHook', schedule='constant', decay=0.9)
    file = stopped(tmp_path, ema, epochs=1)
    hook = dict(ema, scale_decay=scale)
    run = Run(tmp_path, hook, batch=2, resume=file).train()
    assert 'a step takes 2 samples, not 4 as in the checkpoint' in run.log
    kept = 'decay ** 0.5 (0.9 -> 0.948683) keeps the averaging window'
    assert kept in run.log
    assert ('scale_decay=True uses it' in run.log) is not scale
    decay = np.sqrt(0.9) if scale else 0.9
    for first, last in ((1, 2), (2, 3)):  # the third run is of that size too
        if last == 3:
            file = tmp_path / 'epoch_2.pth'
            run = Run(tmp_path, hook, epochs=3, batch=2, resume=file).train()
        start = run.load(first).averages['head.weight']
        _, values = run.trace('head.weight')
        expected = oracle.average(start, values, lambda n: decay)
        found = run.load(last).averages['head.weight']
        error = oracle.relative_error(found, expected)
        assert error < 1e-6  # float32 rounding


def test_off_and_on_again(tmp_path):
    """``enabled=False`` trains on as if there had never been an average.

    The raw weights are put back, bit for bit, and the file that is written
    has no EMA part; with ``enabled=True`` again an average starts from them.
    """
    whole = Run(tmp_path / 'whole', epochs=6).train()
    file = stopped(tmp_path / 'part', EMA)
    folder, off = tmp_path / 'part', dict(EMA, enabled=False)
    run = Run(folder, off, epochs=4, resume=file).train()
    assert [] == same(run.start, Run(folder).load(2).raws)
    assert [] == same(run.records[-1], whole.records[15])
    saved = run.load(4)
    assert not saved.has_part
    assert [] == same(saved.averages, whole.load(4).averages)
    assert 'enabled=False: training goes on from the raw weights' in run.log
    assert 'steps averaged' not in run.log

    run = Run(folder, EMA, epochs=6, resume=folder / 'epoch_4.pth').train()
    assert [] == same(run.start, whole.records[15])
    saved = run.load(6)
    assert [] == same(saved.raws, whole.load(6).averages)
    assert 8 == saved.steps
    assert {} == run.wrong(saved, ramp)
    said = 'has no EMA part; the average starts from its weights'
    assert said in run.log


def test_file_is_read_where_the_package_is_not(tmp_path):
    """Any process reads the file, with nothing of ours imported."""
    Run(tmp_path, EMA).train()
    part = "['meta']['hook_msgs']['EMAHook']" if MMCV1 else ''
    options = ', weights_only=True' if needs.SAFELY else ''
    code = (
        'import sys, torch\n'
        f'file = torch.load(sys.argv[1]{options}){part}\n'
        'loaded = {name.split(".")[0] for name in sys.modules}\n'
        'print(int(file["ema_state_dict"]["steps"]))\n'
        'print(loaded & {"mmdet_ema", "mmcv", "mmdet", "mmengine"})'
    )
    found = subprocess.run(
        [sys.executable, '-c', code, tmp_path / 'epoch_2.pth'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert '8\nset()\n' == found.stdout


@pytest.mark.parametrize('resume', [False, True])
@pytest.mark.parametrize('hooks', [[EMA], []])
def test_off_from_a_file(tmp_path, hooks, resume):
    """Off, no average is promised, and none is asked for in the file."""
    saved = Run(tmp_path / 'a', *hooks, epochs=1).train().load(1)
    off = dict(EMA, enabled=False, strict_load=True, evaluate='both')
    words = {'resume' if resume else 'load': saved.path}
    run = Run(tmp_path / 'b', off, **words).train()
    assert 'without an average' in run.log
    assert 'average starts' not in run.log
    expected = saved.raws if resume and hooks else saved.averages
    key = 'head.weight'
    assert torch.equal(run.start[key], expected[key])


class Spoil(Hook):
    """Makes a weight NaN from an iteration on."""

    def before_train_iter(self, runner, *args, **kwargs):
        if runner.iter >= 6:
            runner.model.head.weight.data[0] = float('nan')


def test_resume_from_weights_that_are_nan(tmp_path):
    """Averages of a stopped run are those of the run that went on."""
    whole = Run(tmp_path / 'whole', Spoil(), EMA, epochs=3).train()
    Run(tmp_path / 'part', Spoil(), EMA).train()
    file = tmp_path / 'part' / 'epoch_2.pth'
    rest = Run(tmp_path / 'part', Spoil(), EMA, epochs=3, resume=file).train()
    left, right = whole.load(3), rest.load(3)
    assert [] == same(left.averages, right.averages)
    assert all(
        torch.isfinite(x.double()).all() for x in left.averages.values()
    )
    assert 6 == left.steps == right.steps
    assert 'are copied, not averaged' not in rest.log


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(begin_epoch=3), 'begin_epoch=3 is past the end: 2 epochs'),
        (dict(begin_iter=9), 'begin_iter=9 is past the end: 8 iterations'),
    ],
)
def test_begin_past_the_end_is_refused(tmp_path, options, message):
    """An average that would never begin stops the run at the start."""
    Run(tmp_path, dict(EMA, **options)).refuse(OptionError, message)


def test_two_ema_hooks_are_refused_naming_both(tmp_path):
    """Ours twice, or the framework's own beside ours."""
    theirs = dict(type='MMCVEMAHook' if MMCV1 else 'MMEngineEMAHook')
    for second in (EMA, theirs):
        run = Run(tmp_path, EMA, second)
        text = run.refuse(OptionError, '2 EMA hooks: .* and ')
        assert 'mmdet_ema.for_mm' in text


class SwitchHook(Hook):
    """Stands for one that changes the data of the last epochs."""


@pytest.mark.parametrize(
    ('line', 'hooks', 'told'),
    [
        ('num_last_epochs = 15', [], True),
        ("train_pipeline_stage2 = ['flip']", [], True),
        ('num_last_epochs = 15', [SwitchHook()], False),
        ('num_last_epochs = 0', [], False),
        ('max_epochs = 15', [], False),
    ],
)
def test_last_epochs_that_no_hook_switches_to(tmp_path, line, hooks, told):
    """A list of hooks that replaced the one of the base is found."""
    name, value = line.split(' = ')
    options = dict(cfg={name: ast.literal_eval(value)})
    if MMCV1:
        options = dict(meta=dict(config=f'model = dict()\n{line}\n'))
    run = Run(tmp_path, EMA, *hooks, epochs=1, **options).train()
    found = f'EMA: the config has {name} but no hook that switches to it'
    assert told == (found in run.log)
    assert told == ('was custom_hooks of the base replaced?' in run.log)
