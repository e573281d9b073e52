"""Finding a framework's tools, and editing configs."""

import argparse
import copy
import sys

import pytest
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage

from mmdet_ema.cli import commands
from mmdet_ema.cli.commands import (
    add_ema,
    choose_weights,
    find_tool,
    scope_of,
)
from mmdet_ema.errors import OptionError
from tests import needs


@pytest.mark.parametrize('folder', ['mmcloned/.mim/tools', 'tools'])
def test_tools_of_a_clone_are_found(tmp_path, monkeypatch, folder):
    """They are beside the package, or in it; not beside those of pip."""
    for root in (tmp_path / 'clone', tmp_path / 'site-packages'):
        (root / 'mmcloned').mkdir(parents=True)
        (root / 'mmcloned' / '__init__.py').touch()
        (root / folder).mkdir(parents=True)
        (root / folder / 'train.py').touch()
    monkeypatch.syspath_prepend(tmp_path / 'clone')
    expected = tmp_path / 'clone' / folder / 'train.py'
    assert find_tool('mmcloned', 'train') == expected
    if folder == 'tools':
        monkeypatch.syspath_prepend(tmp_path / 'site-packages')
        with pytest.raises(OptionError, match='without its tools'):
            find_tool('mmcloned', 'train')


def test_framework_without_tools_is_refused(tmp_path, monkeypatch):
    """What is missing is named, with what to do and the path looked at."""
    with pytest.raises(ValueError, match='mmtoolless, which is not installed'):
        find_tool('mmtoolless', 'train')
    (tmp_path / 'mmtoolless').mkdir()
    (tmp_path / 'mmtoolless' / '__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match='without its tools') as error:
        find_tool('mmtoolless', 'test')
    assert str(tmp_path / 'mmtoolless' / '.mim') in str(error.value)


@needs.mmdet
def test_tool_of_an_installed_framework_is_found():
    """Mmdet's released package has its tools inside."""
    assert find_tool('mmdet', 'train').name == 'train.py'


def test_hook_is_added_once():
    """A config without a hook gets one; one that has it keeps its own.

    ``default_hooks.ema=None`` is no hook.
    """
    off = dict(ema=None)
    cfg = dict(default_hooks=off, custom_hooks=[dict(type='Other')])
    cfg = Config(cfg)
    assert add_ema(cfg, dict(decay=0.9)) == ''
    assert add_ema(cfg, {}) == ''
    assert cfg.custom_hooks == [
        dict(type='Other'),
        dict(type='EMAHook', decay=0.9),
    ]


@pytest.mark.parametrize(
    'hooks', [{}, dict(default_hooks=dict(ema=None)), dict(custom_hooks=[])]
)
def test_hook_is_added_where_mmengine_merges(hooks):
    """Without custom hooks it is ``default_hooks.ema``, for --cfg-options."""
    cfg = Config(hooks)
    add_ema(cfg, dict(decay=0.9))
    assert cfg.default_hooks.ema == dict(type='EMAHook', decay=0.9)
    assert not cfg.get('custom_hooks')


@pytest.mark.parametrize('before', [None, dict(imports='a'), dict(imports=[])])
def test_package_is_imported_beside_others(before):
    """Imports that are there stay there."""
    cfg = Config({} if before is None else dict(custom_imports=before))
    add_ema(cfg, {})
    names = ['a'] if before and before['imports'] else []
    assert cfg.custom_imports['imports'] == [*names, 'mmdet_ema']
    assert cfg.custom_imports['allow_failed_imports'] is False


@pytest.mark.parametrize('kind', ['EMAHook', 'mmdet.EMAHook'])
def test_weights_are_chosen_on_the_hook_of_the_config(kind):
    """The option goes to the hook that is there; nothing is resumed."""
    cfg = Config(dict(custom_hooks=[dict(type=kind)], resume=True))
    choose_weights(cfg, 'raw')
    assert cfg.custom_hooks == [dict(type=kind, evaluate='raw')]
    assert cfg.resume is False


@pytest.mark.parametrize('own', ['EMAHook', 'ExpMomentumEMAHook'])
def test_hook_in_default_hooks_is_a_hook(own):
    """No second one is added, and ``--weights`` is for the one there."""
    hooks = dict(timer=dict(type='IterTimerHook'), ema=dict(type=own))
    cfg = Config(dict(default_hooks=hooks))
    add_ema(cfg, {})
    choose_weights(cfg, 'raw')
    assert cfg.get('custom_hooks') is None
    assert cfg.default_hooks == dict(
        timer=dict(type='IterTimerHook'), ema=dict(type=own, evaluate='raw')
    )


RTMDET = dict(
    type='EMAHook',
    ema_type='ExpMomentumEMA',
    momentum=0.0002,
    update_buffers=True,
    priority=49,
)
MMENGINE = dict(type='EMAHook', momentum=0.0002)
ANNEALED = dict(type='mmdet.EMAHook', ema_type='MomentumAnnealingEMA')
SWA = dict(type='EMAHook', ema_type='StochasticWeightAverage')
NESTED = dict(
    type='EMAHook', schedule=dict(type='exponential', decay=0.99, tau=9)
)


@pytest.mark.parametrize(
    ('hook', 'given', 'expected', 'told'),
    [
        (
            dict(type='EMAHook', decay=0.99, evaluate='raw'),
            dict(decay=0.9, evaluate='both', device='cpu', overlap=True),
            dict(decay=0.9, evaluate='both', device='cpu', overlap=True),
            '--decay 0.9 --evaluate both --device cpu --overlap instead of '
            "decay=0.99, evaluate='raw' of the config",
        ),
        (
            RTMDET,
            dict(decay=0.9),
            dict(decay=0.9, tau=2000, update_buffers=True, priority=49),
            '--decay 0.9 instead of momentum=0.0002 of the config',
        ),
        (
            {**RTMDET, 'gamma': 500},
            dict(tau=9.0),
            dict(decay=0.9998, tau=9.0, update_buffers=True, priority=49),
            "--tau 9.0 instead of ema_type='ExpMomentumEMA', gamma=500 of "
            'the config',
        ),
        (
            {**RTMDET, 'gamma': 500},
            dict(decay=0.9),
            dict(decay=0.9, tau=500, update_buffers=True, priority=49),
            '--decay 0.9 instead of momentum=0.0002 of the config',
        ),
        (
            MMENGINE,
            dict(decay=0.9),
            dict(decay=0.9, schedule='constant', update_buffers=False),
            '--decay 0.9 instead of momentum=0.0002 of the config',
        ),
        (
            MMENGINE,
            dict(tau=9.0),
            dict(decay=0.9998, tau=9.0, update_buffers=False),
            '--tau 9.0 for the EMA hook of the config',
        ),
        (
            ANNEALED,
            dict(decay=0.9),
            dict(
                type='mmdet.EMAHook',
                decay=0.9,
                schedule=dict(type='annealing', gamma=100),
                update_buffers=False,
            ),
            '--decay 0.9 for the EMA hook of the config',
        ),
        (
            SWA,
            dict(schedule='inverse'),
            dict(schedule='inverse', update_buffers=False),
            "--schedule inverse instead of ema_type='StochasticWeightAverage'"
            ' of the config',
        ),
        (
            NESTED,
            dict(decay=0.9),
            dict(schedule=dict(type='exponential', decay=0.9, tau=9)),
            '--decay 0.9 instead of decay=0.99 of the config',
        ),
        (
            NESTED,
            dict(decay=0.9, schedule='constant'),
            dict(decay=0.9, schedule='constant'),
            "--decay 0.9 --schedule constant instead of schedule={'type': "
            "'exponential', 'decay': 0.99, 'tau': 9} of the config",
        ),
        (
            MMENGINE,
            dict(evaluate='raw'),
            dict(momentum=0.0002, evaluate='raw'),
            '--evaluate raw for the EMA hook of the config',
        ),
        (
            {**MMENGINE, 'evaluate_on_ema': True, 'evaluate_on_origin': True},
            dict(evaluate='raw'),
            dict(momentum=0.0002, evaluate='raw'),
            '--evaluate raw instead of evaluate_on_ema=True, '
            'evaluate_on_origin=True of the config',
        ),
        (
            RTMDET,
            dict(enabled=False),
            {**RTMDET, 'enabled': False},
            '--no-ema for the EMA hook of the config',
        ),
    ],
)
def test_options_replace_those_of_the_config(hook, given, expected, told):
    """What followed from OpenMMLab's words is kept; one line says it all."""
    for cfg in (dict(custom_hooks=[hook]), dict(default_hooks=dict(a=hook))):
        cfg = Config(copy.deepcopy(cfg))
        assert add_ema(cfg, given) == told
        (found,) = cfg.get('custom_hooks') or cfg.default_hooks.values()
        assert found == {'type': 'EMAHook', **expected}


def test_options_replace_those_of_a_new_style_config(tmp_path):
    """There the hook is a class."""
    path = tmp_path / 'config.py'
    path.write_text(
        'from mmengine.hooks import EMAHook, IterTimerHook\n'
        'default_hooks = dict(timer=dict(type=IterTimerHook))\n'
        'default_hooks.update(ema=dict(type=EMAHook, momentum=0.1))\n'
    )
    cfg = Config.fromfile(path)
    told = '--decay 0.8 instead of momentum=0.1 of the config'
    assert add_ema(cfg, dict(decay=0.8)) == told
    found = cfg.default_hooks.ema
    assert found.type.__name__ == 'EMAHook'
    assert 'momentum' not in found
    assert 0.8 == found.decay


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (dict(decay=2.0), r'decay=2\.0 is out of range'),
        (dict(tau=-1.0), r'tau=-1\.0 is out of range'),
        (dict(schedule='ramp'), "schedule='ramp' is not known"),
        (dict(evaluate='rwa'), "evaluate='rwa' is not known.*'raw'"),
        (dict(device='gpu'), "device='gpu' cannot be used"),
    ],
)
@pytest.mark.parametrize('hooks', [[], [dict(type='EMAHook')], [RTMDET]])
def test_wrong_values_are_refused(hooks, given, message):
    """By the check of the option itself, whatever the config has."""
    cfg = Config(dict(custom_hooks=copy.deepcopy(hooks)))
    with pytest.raises(OptionError, match=message):
        add_ema(cfg, given)


def test_rule_of_ones_own_is_not_replaced():
    """An averaging class has no decay that could be."""

    class Mine(ExponentialMovingAverage):
        pass

    cfg = Config(dict(custom_hooks=[dict(type='EMAHook', ema_type=Mine)]))
    add_ema(cfg, dict(evaluate='raw'))
    assert cfg.custom_hooks[0].evaluate == 'raw'
    with pytest.raises(OptionError, match=r'--decay 0\.9: .*of its own'):
        add_ema(cfg, dict(decay=0.9))


@pytest.fixture
def frameworks(tmp_path, monkeypatch):
    """Two frameworks of mmcv 1.x, of which the second knows more models."""
    models = {'mmflat': ['Flat'], 'mmdeep': ['Flat', 'Deep']}
    for name, known in models.items():
        folder = tmp_path / name / 'models'
        folder.mkdir(parents=True)
        (folder.parent / '__init__.py').touch()
        (folder / '__init__.py').write_text('from . import builder')
        (folder / 'builder.py').write_text(f'MODELS = {known}')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(commands, 'SCOPES', tuple(models))
    monkeypatch.setattr(commands, 'has_mmcv1', lambda: True)


def test_framework_is_the_one_that_knows_the_model(frameworks):
    """Where a config does not say, its model does; else it is named."""
    for kind, scope in (('Flat', 'mmflat'), ('Deep', 'mmdeep')):
        cfg = Config(dict(model=dict(type=kind)))
        assert scope_of(cfg, 'config.py') == scope
    cfg = Config(dict(model=dict(type='Deeper')))
    with pytest.raises(OptionError, match="'Deeper' is not known to mmflat"):
        scope_of(cfg, 'config.py')


def test_mmengines_own_hook_is_a_hook():
    """No second one is added, and it is not given options of ours."""
    own = dict(type='MMEngineEMAHook', momentum=0.1)
    cfg = Config(dict(custom_hooks=[own]))
    add_ema(cfg, {})
    choose_weights(cfg, 'ema')
    assert cfg.custom_hooks == [own]
    with pytest.raises(OptionError, match='tests the averages alone'):
        choose_weights(cfg, 'raw')
    with pytest.raises(OptionError, match='none of our options'):
        add_ema(cfg, dict(decay=0.9))


@pytest.mark.parametrize('launcher', ['pytorch', 'slurm', 'mpi'])
def test_launcher_goes_to_the_tool(tmp_path, monkeypatch, capsys, launcher):
    """One rank of several says what was edited, whoever numbers them."""
    pytest.importorskip('mmdet')
    number = dict(pytorch='RANK', slurm='SLURM_PROCID')
    seen = []
    monkeypatch.setattr(
        commands.runpy, 'run_path', lambda *a, **k: seen.append(sys.argv[1:])
    )
    config = tmp_path / 'a.py'
    config.write_text(
        "default_scope = 'mmdet'\n"
        "default_hooks = dict(ema=dict(type='EMAHook', decay=0.9))\n"
    )
    words = ['--launcher', launcher, '--resume']
    options = argparse.Namespace(
        config=str(config), hook=dict(decay=0.8), rest=words
    )
    for rank in '01':
        name = number.get(launcher, 'OMPI_COMM_WORLD_RANK')
        monkeypatch.setenv(name, rank)
        commands.train(options)
    assert [[str(config), *words]] * 2 == seen
    assert 1 == capsys.readouterr().out.count('instead of decay=0.9')
