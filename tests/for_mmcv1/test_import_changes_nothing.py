"""A run without the hook is the same with and without the import."""

import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from mmcv.runner import EpochBasedRunner, IterBasedRunner

from mmdet_ema import OptionError
from tests.for_mmcv1.toy import EMA, Run, ToyModel, loader, quiet

ROOT = Path(__file__).parents[2]
LENGTHS = {
    EpochBasedRunner: dict(type='EpochBasedRunner', max_epochs=2),
    IterBasedRunner: dict(type='IterBasedRunner', max_iters=8),
}


@functools.lru_cache(maxsize=None)
def outcome(*modules):
    """Return what a process sees that imports the modules first."""
    program = ['-m', 'tests.for_mmcv1.import_program', *modules]
    found = subprocess.run(
        [sys.executable, '-W', 'ignore', *program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == found.returncode, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def differences(left, right, path=''):
    """Return the paths at which two outcomes differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        return [
            line
            for key in sorted({*left, *right})
            for line in differences(
                left.get(key), right.get(key), f'{path}/{key}'
            )
        ]
    return [] if left == right else [f'{path}: {left!r} is {right!r}']


def test_a_run_without_the_hook_is_the_same():
    """Bits, files, log, random numbers and the frameworks' attributes are."""
    assert [] == differences(outcome(), outcome('mmdet_ema'))


def test_the_comparison_sees_what_a_module_changes():
    """A logger made first, and a replaced method, are found."""
    lines = differences(outcome(), outcome('tests.for_mmcv1.meddling'))
    for word in ('/loggers', '/lines', '/classes/BaseRunner/call_hook'):
        assert [line for line in lines if word in line], word


def test_what_init_weights_did_is_in_the_log_of_the_run():
    """It is there under the run's own name."""
    lines = outcome('mmdet_ema')['EpochBasedRunner']['lines']
    assert [x for x in lines if 'toy - INFO - initialize Model' in x]
    assert [x for x in lines if 'head.weight - torch.Size' in x]


class OneLoader(EpochBasedRunner):
    """Has a ``run`` with a signature of its own."""

    def run(self, data_loader, *, epochs):
        flow = [('train', 1)] * epochs
        return super().run([data_loader] * epochs, flow)


@pytest.mark.parametrize('hooks', [[], [EMA]])
def test_runner_with_a_run_of_its_own(hooks, tmp_path):
    """It is called as its class says, EMA or not."""
    run = Run(tmp_path / 'a', *hooks, evaluation=None)
    own = OneLoader(
        ToyModel(), work_dir=str(tmp_path), logger=quiet(), max_epochs=2
    )
    own.optimizer = run.optimizer.__class__(own.model.parameters(), lr=0.1)
    own.optimizer.watch(own.model)
    own.register_training_hooks(
        None, dict(grad_clip=None), custom_hooks_config=list(hooks)
    )
    own.run(loader(), epochs=1)
    assert 8 == len(own.optimizer.records)
    with pytest.raises(TypeError, match='epochs'):
        own.run(loader())


@pytest.mark.parametrize('kind', [EpochBasedRunner, IterBasedRunner])
def test_methods_keep_names_and_signatures(kind, tmp_path):
    """What is wrapped in a run with the hook is a bound method as before."""
    runner = Run(tmp_path, EMA, runner=LENGTHS[kind]).runner
    for name in ('run', 'val', 'resume', 'load_checkpoint', 'call_hook'):
        method = getattr(runner, name)
        assert method.__self__ is runner
        assert method.__func__.__name__ == name
        expected = inspect.signature(getattr(kind, name).__get__(runner))
        assert expected == inspect.signature(method)


def test_run_is_called_by_keywords(tmp_path):
    """The names that mmcv gives the arguments work in a run with the hook."""
    run = Run(tmp_path, EMA)
    run.runner.run(data_loaders=[loader()], workflow=[('train', 1)])
    assert 8 == len(run.records)
    message = run.load('epoch_2.pth')['meta']['hook_msgs']['EMAHook']
    assert 4 == message['ema_meta']['batch_size']


def test_priority_is_that_of_the_registration(tmp_path):
    """The hook has none before, as mmcv wants it, and mmcv's words after."""
    run = Run(tmp_path, dict(EMA, priority='LOW'), evaluation=None)
    (hook,) = [x for x in run.runner.hooks if type(x).__name__ == 'EMAHook']
    assert 70 == hook.priority
    assert not hasattr(type(hook)(), 'priority')
    with pytest.raises(OptionError, match='decay'):
        type(hook)(decay=2)
