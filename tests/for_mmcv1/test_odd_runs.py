"""Runs that are put together in unusual ways."""

import inspect
import os

import mmcv
import pytest
import torch
from mmcv.parallel import MMDataParallel
from mmcv.runner import (
    HOOKS,
    EpochBasedRunner,
    EvalHook,
    Hook,
    IterBasedRunner,
)
from mmcv.runner.builder import RUNNERS
from mmcv.runner.checkpoint import get_state_dict
from torch import nn

from mmdet_ema import OptionError
from tests.for_mmcv1.test_orders import wrong
from tests.for_mmcv1.toy import (
    EMA,
    Run,
    ToyModel,
    loader,
    quiet,
    raw_of,
    same,
    state_of,
)

ITERS = dict(type='IterBasedRunner', max_iters=8)


@pytest.mark.parametrize('evaluate', ['ema', 'both'])
def test_evaluation_between_forward_and_backward(evaluate, tmp_path):
    """Evaluating before the OptimizerHook does not disturb autograd."""
    options = dict(interval=2, by_epoch=False)
    runs = [
        Run(tmp_path / str(i), *hooks, runner=ITERS, evaluation=None)
        for i, hooks in enumerate(([], [dict(EMA, evaluate=evaluate)]))
    ]
    for run in runs:
        hook = EvalHook(
            loader(4, seed=1), test_fn=run.recorder.test, **options
        )
        run.runner.register_hook(hook, priority='VERY_HIGH')
        run.train()
    assert [] == same(runs[0].records[-1], runs[1].records[-1])


def test_validation_before_training_knows_the_batch_size(tmp_path):
    """The batch size is that of the training, whatever comes first."""
    flow = [('val', 1), ('train', 1)]
    run = Run(tmp_path, EMA, workflow=flow).train()
    message = run.load('epoch_2.pth')['meta']['hook_msgs']['EMAHook']
    assert run.train_loader.batch_size == message['ema_meta']['batch_size']


@RUNNERS.register_module(force=True)
class OwnSaving(EpochBasedRunner):
    """Saves what the wrapped model says."""

    def save_checkpoint(self, out_dir, filename_tmpl='', *args, **kwargs):
        content = dict(state_dict=self.model.state_dict(), meta=self.meta)
        torch.save(content, f'{out_dir}/own_{self.epoch + 1}.pth')


def test_runner_that_saves_the_wrapped_model(tmp_path):
    """Names with a wrapper's prefix get their averages, too."""
    model = ToyModel()
    run = Run(
        tmp_path,
        EMA,
        model=model,
        wrapped=MMDataParallel(model, device_ids=[-1]),
        runner=dict(type='OwnSaving', max_epochs=2),
    ).train()
    saved = run.load('own_2.pth')['state_dict']
    plain = {name[len('module.') :]: value for name, value in saved.items()}
    assert [] == wrong(run, plain, 8)


@RUNNERS.register_module(force=True)
class OwnFiles(EpochBasedRunner):
    """Writes files itself, as the runners for apex that came with Swin."""

    def save_checkpoint(
        self, out_dir, filename_tmpl='', create_symlink=True, **kwargs
    ):
        name = filename_tmpl or f'epoch_{self.epoch + 1}.pth'
        meta = dict(self.meta, epoch=self.epoch + 1, iter=self.iter)
        content = dict(state_dict=get_state_dict(self.model), meta=meta)
        torch.save(content, f'{out_dir}/{name}')
        if create_symlink:
            mmcv.symlink(name, f'{out_dir}/latest.pth')


@pytest.mark.parametrize('safe', [True, False])
def test_runner_that_writes_files_itself(safe, tmp_path):
    """Its link names its newest file, which has the averages."""
    hook = dict(EMA, safe_save=safe)
    run = Run(tmp_path, hook, runner=dict(type='OwnFiles', max_epochs=2))
    run.train()
    assert 'epoch_2.pth' == os.readlink(tmp_path / 'latest.pth')
    assert [] == wrong(run, run.load('latest.pth')['state_dict'], 8)


class Namesake(ToyModel):
    """Owns ``ema_scale`` beside ``scale``, as mmcv's hook would."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.ema_scale = nn.Parameter(torch.ones(2) * 2)

    def forward(self, inputs, **kwargs):
        out = super().forward(inputs, **kwargs)
        if isinstance(out, list):
            return out
        return out + (self.scale * self.ema_scale).sum() ** 2


def test_model_that_owns_an_ema_name(tmp_path):
    """A tensor of the model is not taken for a buffer of mmcv's hook."""
    hook, epochs = EMA, dict(max_epochs=4)
    whole = Run(tmp_path / 'a', hook, model=Namesake(), runner=epochs).train()
    Run(tmp_path / 'b', hook, model=Namesake()).train()
    rest = Run(tmp_path / 'b', hook, model=Namesake(), runner=epochs)
    rest.train(resume=tmp_path / 'b' / 'epoch_2.pth')
    saved, expected = rest.load('epoch_4.pth'), whole.load('epoch_4.pth')
    assert [] == same(saved['state_dict'], expected['state_dict'])
    assert [] == same(raw_of(saved), raw_of(expected))


def test_evaluation_hook_with_a_way_of_its_own(tmp_path):
    """An overridden ``after_train_epoch`` sees the averages as well."""

    class Own(EvalHook):
        def after_train_epoch(self, runner):
            self.__dict__.setdefault('seen', []).append(state_of(run.model))

    run = Run(tmp_path, EMA, evaluation=dict(kind=Own, by_epoch=True))
    run.train()
    assert [] == wrong(run, run.evaluator.seen[-1], 8)
    assert [] == same(state_of(run.model), run.records[-1])


def test_step_to_come_is_not_counted(tmp_path):
    """A file that is saved before the optimizer's turn resumes before it."""
    hooks = [dict(EMA)]

    class Early(Hook):
        def after_train_iter(self, runner):
            if runner.iter == 3:
                runner.save_checkpoint(str(tmp_path), 'early.pth')

    run = Run(tmp_path, *hooks, runner=ITERS)
    run.runner.register_hook(Early(), priority='VERY_HIGH')
    run.train()
    rest = Run(tmp_path / 'rest', *hooks, runner=ITERS)
    rest.train(resume=tmp_path / 'early.pth')
    assert 5 == len(rest.records)


def test_hook_that_is_registered_after_the_resume(tmp_path):
    """A file that mmcv has loaded by itself is sorted out at the start."""
    epochs = dict(max_epochs=4)
    whole = Run(tmp_path / 'a', EMA, runner=epochs).train()
    Run(tmp_path / 'b', EMA).train()
    rest = Run(tmp_path / 'b', runner=epochs)
    rest.runner.resume(str(tmp_path / 'b' / 'epoch_2.pth'))
    rest.runner.register_hook_from_cfg(EMA)
    rest.train()
    saved, expected = rest.load('epoch_4.pth'), whole.load('epoch_4.pth')
    raws = raw_of(saved), raw_of(expected)
    assert [] == same(*raws)


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


@pytest.mark.parametrize(
    ('kind', 'length'),
    [(EpochBasedRunner, dict(max_epochs=2)), (IterBasedRunner, ITERS)],
)
def test_methods_keep_names_and_signatures(kind, length, tmp_path):
    """What is wrapped in a run with the hook is a bound method as before."""
    runner = Run(tmp_path, EMA, runner=length).runner
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


class TeacherAndStudent(nn.Module):
    """A frozen teacher, whose outputs are evaluated, beside a student."""

    def __init__(self):
        super().__init__()
        self.student = ToyModel()
        self.teacher = ToyModel().requires_grad_(False)

    def forward(self, inputs, return_loss=True, **kwargs):
        chosen = self.student if return_loss else self.teacher
        return chosen(inputs, return_loss=return_loss, **kwargs)

    def train_step(self, data, optimizer=None, **kwargs):
        return self.student.train_step(data, optimizer, **kwargs)


@HOOKS.register_module(force=True)
class MeanTeacher(Hook):
    """Averages parameters and buffers, as such hooks do, by ``data``."""

    def after_train_iter(self, runner):
        student = runner.model.student.state_dict()
        for name, value in runner.model.teacher.state_dict().items():
            if value.is_floating_point():
                value.data.lerp_(student[name].to(value), 0.1)


def test_teacher_that_another_hook_averages(tmp_path):
    """It is evaluated and saved as it is; the student is averaged."""
    model = TeacherAndStudent()
    hook = dict(EMA, copied=['teacher.*'])
    run = Run(tmp_path, dict(type='MeanTeacher'), hook, model=model).train()
    weights = run.load('epoch_2.pth')['state_dict']
    for found in (weights, run.recorder.seen[-1][1]):
        teacher = {
            name[len('teacher.') :]: value
            for name, value in found.items()
            if name.startswith('teacher.')
        }
        assert [] == same(teacher, state_of(model.teacher))
    student = {k: x for k, x in weights.items() if k.startswith('student.')}
    assert [] == wrong(run, student, 8)
