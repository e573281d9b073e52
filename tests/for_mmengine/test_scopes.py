"""Frameworks with a registry of their own, and an ``EMAHook`` in it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook as MMEngineEMAHook
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS, Registry
from mmengine.runner import Runner
from torch.utils.data import Dataset

import mmdet_ema
from tests import needs, oracle
from tests.for_mmengine.toy import Run, state_of

# a framework such as mmpretrain: registered when its scope is first used
FRAMEWORK = """
from mmengine.hooks import EMAHook as MMEngineEMAHook
from mmengine.registry import HOOKS as ROOT
from mmengine.registry import Registry

HOOKS = Registry('hook', parent=ROOT, locations=['toyframe.hooks'])
"""
HOOK = """
from mmengine.hooks import EMAHook as MMEngineEMAHook
from toyframe.registry import HOOKS


@HOOKS.register_module()
class EMAHook(MMEngineEMAHook):
    pass


@HOOKS.register_module()
class OtherHook(MMEngineEMAHook):
    pass
"""
PROGRAM = """
import sys
for name in sys.argv[1].split(','):
    __import__(name)
import toyframe.registry
from mmengine.registry import HOOKS, DefaultScope

ours = []
with DefaultScope.overwrite_default_scope('toyframe'):
    for registry in (HOOKS, toyframe.registry.HOOKS):
        ours.append(registry.build(dict(type='EMAHook')))
        ours.append(registry.build(dict(type='mmengine.EMAHook')))
for registry in (HOOKS, toyframe.registry.HOOKS):
    for name in ('toyframe.EMAHook', 'toyframe.hooks.EMAHook'):
        ours.append(registry.build(dict(type=name, evaluate_on_ema=True)))
    ours.append(registry.build(dict(type='EMAHook', _scope_='toyframe')))
    import toyframe.hooks
    kind = toyframe.hooks.EMAHook
    ours.append(registry.build(dict(type=kind, momentum=0.1)))
import mmdet_ema
assert {type(x) for x in ours} == {mmdet_ema.EMAHook}, ours

kind = toyframe.hooks.OtherHook
assert type(HOOKS.build(dict(type='toyframe.OtherHook'))) is kind
assert type(HOOKS.build(dict(type=kind))) is kind
"""


@pytest.mark.parametrize(
    'order', ['mmdet_ema,toyframe.hooks', 'toyframe.hooks,mmdet_ema']
)
def test_child_registry_with_an_ema_hook_of_its_own(tmp_path, order):
    """Its scope builds ours by name and class, whichever came first."""
    package = tmp_path / 'toyframe'
    package.mkdir()
    (package / '__init__.py').touch()
    (package / 'registry.py').write_text(FRAMEWORK)
    (package / 'hooks.py').write_text(HOOK)
    program = f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n{PROGRAM}'
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', program, order],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 'builds its own hook' in done.stderr
    assert done.stdout == ''


def test_subclasses_under_other_names_are_left_alone():
    """What is no ``EMAHook`` by name is built as its framework says."""

    class OwnEMAHook(MMEngineEMAHook):
        pass

    assert type(HOOKS.build(dict(type=OwnEMAHook))) is OwnEMAHook


def test_registry_with_a_build_function_of_its_own():
    """A child that builds in its own way keeps doing so."""
    calls = []

    def build(cfg, registry):
        calls.append(cfg)

    child = Registry('hook', build, parent=HOOKS, scope='ownway')
    child.build(dict(type='EMAHook'))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ('options', 'shown'),
    [
        (dict(evaluate_on_ema=True), ['']),
        (dict(evaluate_on_origin=True), ['', '_raw']),
        (dict(evaluate_on_ema=True, evaluate_on_origin=True), ['', '_raw']),
        (dict(evaluate_on_ema=False, evaluate_on_origin=True), ['']),
        (dict(evaluate_on_ema=False), ['']),
    ],
    ids=str,
)
def test_words_of_mmpretrain(tmp_path, options, shown):
    """They choose what is evaluated, and mean what its hook does."""
    run = Run(tmp_path / 'a', dict(type='EMAHook', momentum=0.5, **options))
    scalars = run.train().runner.message_hub.log_scalars
    names = {f'val/score{end}' for end in shown}
    assert names == {x for x in scalars if 'score' in x}
    raw = shown == [''] and options.get('evaluate_on_ema') is False
    other = dict(type='EMAHook', momentum=0.5)
    other['evaluate'] = 'raw' if raw else 'ema'
    expected = Run(tmp_path / 'b', other).train().scalar('val/score')
    assert list(run.scalar('val/score')) == list(expected)


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmseg', 'mmpose'])
def test_scopes_of_openmmlab(tmp_path, scope):
    """A runner in the scope of each builds ours, and it averages."""
    pytest.importorskip(scope)
    run = Run(tmp_path, dict(type='EMAHook'), default_scope=scope).train()
    assert type(run.hook) is mmdet_ema.EMAHook
    weights = run.load('epoch_2.pth')['state_dict']
    assert {} == run.wrong(weights, oracle.ramp)


@DATASETS.register_module()
class Images(Dataset):
    """Gray images whose brightness is their class."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        from mmpretrain.structures import DataSample

        draw, label = np.random.RandomState(index), index % 2
        image = draw.randint(0, 128, (1, 32, 32)) + 120 * label
        sample = DataSample().set_gt_label(label)
        return dict(inputs=torch.from_numpy(image), data_samples=sample)


class States(Hook):
    """Keeps the weights at the start and after each iteration."""

    priority = 'VERY_LOW'

    def before_train(self, runner):
        self.found = [state_of(runner.model)]

    def after_train_iter(self, runner, *args, **kwargs):
        self.found.append(state_of(runner.model))


def test_classifier_of_mmpretrain(tmp_path):
    """A LeNet is trained with the options of mmpretrain's hook.

    The first update copies; the momentum weighs the new weights; both sets
    of weights are validated.
    """
    pytest.importorskip('mmpretrain')
    from mmpretrain.engine.hooks import EMAHook

    for kind in ('mmpretrain.EMAHook', EMAHook):
        assert type(HOOKS.build(dict(type=kind))) is mmdet_ema.EMAHook
    ema = dict(type='EMAHook', momentum=4e-3)
    ema.update(evaluate_on_ema=True, evaluate_on_origin=True)
    loader = dict(
        dataset=dict(type='Images'),
        batch_size=4,
        sampler=dict(type='DefaultSampler', shuffle=False),
        num_workers=0,
    )
    runner = Runner.from_cfg(
        Config(
            dict(
                model=dict(
                    type='ImageClassifier',
                    data_preprocessor=dict(mean=[128.0], std=[64.0]),
                    backbone=dict(type='LeNet5', num_classes=2),
                    head=dict(
                        type='ClsHead', loss=dict(type='CrossEntropyLoss')
                    ),
                ),
                work_dir=str(tmp_path),
                train_dataloader=loader,
                train_cfg=dict(by_epoch=True, max_epochs=3),
                optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05)),
                val_dataloader=loader,
                val_cfg=dict(),
                val_evaluator=dict(type='Accuracy', topk=1),
                custom_hooks=[ema],
                default_scope='mmpretrain',
                randomness=dict(seed=0),
                experiment_name='classifier',
            )
        )
    )
    states = States()
    runner.register_hook(states)
    runner.train()
    saved = torch.load(tmp_path / 'epoch_3.pth', weights_only=needs.SAFELY)
    assert saved['ema_state_dict']['steps'] == 12
    for key, average in saved['state_dict'].items():
        start, *values = (x[key].double().numpy() for x in states.found)
        expected = oracle.average(
            start, values, lambda n: 0.0 if n == 1 else 1 - 4e-3
        )
        # float32 rounds each of 12 updates to 6e-8
        assert oracle.relative_error(average, expected) < 1e-6
        raw = saved['ema_state_dict'][f'module.{key}']
        assert torch.equal(raw, states.found[-1][key])
        assert not torch.equal(raw, average)
    images = [Images()[i] for i in range(16)]
    inputs = torch.stack([x['inputs'] for x in images]).float()
    labels = torch.tensor([i % 2 for i in range(16)])
    runner.model.eval()
    raws = runner.model.state_dict()
    for end, weights in (('_raw', raws), ('', saved['state_dict'])):
        runner.model.load_state_dict(weights)
        with torch.no_grad():
            scores = runner.model((inputs - 128) / 64, mode='tensor')
        right = (scores.argmax(1) == labels).float().mean() * 100
        found = runner.message_hub.get_scalar(f'val/accuracy/top1{end}')
        assert found.current() == pytest.approx(float(right))
