"""Finding a framework's tools, and editing configs."""

import pytest
from mmengine.config import Config

from mmdet_ema.cli import commands
from mmdet_ema.cli.commands import (
    add_ema,
    choose_weights,
    find_tool,
    scope_of,
)
from mmdet_ema.errors import OptionError
from tests import needs


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
    add_ema(cfg, dict(decay=0.9))
    add_ema(cfg, {})
    assert cfg.custom_hooks == [
        dict(type='Other'),
        dict(type='EMAHook', decay=0.9),
    ]


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
    """The option goes to the hook that is there."""
    cfg = Config(dict(custom_hooks=[dict(type=kind)]))
    choose_weights(cfg, 'raw')
    assert cfg.custom_hooks == [dict(type=kind, evaluate='raw')]


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
    with pytest.raises(OptionError, match=r'--decay 0\.9: the config'):
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
    with pytest.raises(OptionError, match='an EMA hook of its own'):
        add_ema(cfg, dict(decay=0.9))
