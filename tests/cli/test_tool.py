"""Finding a framework's tools, and editing configs."""

import pytest
from mmengine.config import Config

from mmdet_ema.cli.edited_config import add_ema, choose_weights
from mmdet_ema.cli.tool import find_tool
from mmdet_ema.core.errors import OptionError


def test_missing_framework_is_refused():
    """A scope that is not installed is named, with what to do."""
    with pytest.raises(ValueError, match='mmnothing, which is not installed'):
        find_tool('mmnothing', 'train')


def test_framework_without_tools_is_refused(tmp_path, monkeypatch):
    """A package without its tools is named, with the path looked at."""
    (tmp_path / 'mmtoolless').mkdir()
    (tmp_path / 'mmtoolless' / '__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match='without its tools') as error:
        find_tool('mmtoolless', 'test')
    assert str(tmp_path / 'mmtoolless' / '.mim') in str(error.value)


def test_tool_of_an_installed_framework_is_found():
    """Mmdet's released package has its tools inside."""
    assert find_tool('mmdet', 'train').name == 'train.py'


def test_hook_is_added_once():
    """A config without a hook gets one; one that has it keeps its own."""
    cfg = Config(dict(custom_hooks=[dict(type='Other')]))
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
