"""The blocks that add the hook to configs of mmdet: what they leave alone."""

import pytest
from mmengine.config import Config
from mmengine.hooks import RuntimeInfoHook

import mmdet_ema
from mmdet_ema import OptionError
from tests import needs
from tests.for_mmengine.toy import Run

pytestmark = needs.mmdet

IMPORT = """
custom_imports = dict(imports=['mmdet_ema'], allow_failed_imports=False)
"""
FIRST = f"""{IMPORT}
default_hooks = dict(ema=dict(type='EMAHook'))
"""


def read(folder, base, block):
    """Read a config with a base and a block of code."""
    path = folder / 'config.py'
    path.write_text(f"_base_ = '{base}'\n{block}")
    return Config.fromfile(path)


def run_of(folder, cfg):
    """A run of the toy with the hooks that a config says."""
    return Run(
        folder / 'run',
        *cfg.get('custom_hooks', []),
        hooks=cfg.default_hooks,
        # all of it would be written to a file, which takes seconds
        cfg=dict(custom_hooks=cfg.get('custom_hooks')),
        default_scope='mmdet',
    )


def kinds_of(run):
    """Names of the hooks of a run, without those that the toy adds."""
    kinds = [type(hook) for hook in run.runner.hooks]
    skipped = (type(run.recorder), RuntimeInfoHook)
    return sorted(x.__name__ for x in kinds if x not in skipped)


@pytest.mark.parametrize(
    'base',
    [
        'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        'mmdet::ssd/ssd300_coco.py',
        'mmdet::soft_teacher/'
        'soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
    ],
)
def test_first_block_drops_no_hook(tmp_path, base):
    """Every hook of the base is there, and ours; ours has an option."""
    plain = read(tmp_path, base, '')
    cfg = read(tmp_path, base, FIRST)
    assert cfg.get('custom_hooks') == plain.get('custom_hooks')
    assert cfg.default_hooks == {
        **plain.default_hooks,
        'ema': dict(type='EMAHook'),
    }
    # as --cfg-options default_hooks.ema.enabled=False
    cfg.merge_from_dict({'default_hooks.ema.enabled': False})
    before = kinds_of(run_of(tmp_path / 'a', plain))
    run = run_of(tmp_path / 'b', cfg)
    assert kinds_of(run) == sorted([*before, 'EMAHook'])
    assert type(run.hook) is mmdet_ema.EMAHook
    assert run.hook.enabled is False
    run.runner.call_hook('before_run')


@pytest.mark.parametrize(
    ('base', 'place'),
    [
        ('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', 0),
        ('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', 2),
    ],
)
def test_base_with_an_ema_hook(tmp_path, base, place):
    """The first block is refused, and what the message says is right."""
    run = run_of(tmp_path / 'a', read(tmp_path, base, FIRST))
    with pytest.raises(OptionError) as error:
        run.runner.call_hook('before_run')
    message = str(error.value)
    assert '\n' not in message
    assert IMPORT.strip() in message
    advice = message.partition('write ')[2].rstrip('.')
    assert advice.startswith(f'_base_.custom_hooks[{place}].update(')
    before = kinds_of(run_of(tmp_path, read(tmp_path, base, '')))
    for name, block in (('b', IMPORT), ('c', f'{IMPORT}\n{advice}\n')):
        cfg = read(tmp_path, base, block)
        run = run_of(tmp_path / name, cfg)
        assert kinds_of(run) == before
        assert type(run.hook) is mmdet_ema.EMAHook
        assert run.hook._life.options.update_buffers is True
        expected = 'both' if name == 'c' else 'ema'
        assert run.hook._life.options.evaluate == expected
        run.runner.call_hook('before_run')


NEW_BASE = """
from mmdet.engine.hooks import PipelineSwitchHook
from mmengine.hooks import CheckpointHook, LoggerHook

default_hooks = dict(
    logger=dict(type=LoggerHook, interval=1),
    checkpoint=dict(type=CheckpointHook, interval=1),
)
custom_hooks = [
    dict(type=PipelineSwitchHook, switch_epoch=8, switch_pipeline=[])
]
"""
NEW = """
from mmengine.config import read_base

from mmdet_ema import EMAHook

with read_base():
    from .base import *

default_hooks.update(ema=dict(type=EMAHook))
"""


def test_new_style_config(tmp_path):
    """``default_hooks.update`` keeps all hooks, and needs no custom_imports.

    The base is laid out as mmdet's own in ``mmdet/configs``.
    """
    (tmp_path / 'base.py').write_text(NEW_BASE)
    (tmp_path / 'config.py').write_text(NEW)
    before = run_of(tmp_path / 'a', Config.fromfile(tmp_path / 'base.py'))
    run = run_of(tmp_path / 'b', Config.fromfile(tmp_path / 'config.py'))
    assert 'PipelineSwitchHook' in kinds_of(before)
    assert kinds_of(run) == sorted([*kinds_of(before), 'EMAHook'])
    assert type(run.hook) is mmdet_ema.EMAHook


def test_new_style_base_with_an_ema_hook(tmp_path):
    """It is refused too, with what such a file says instead."""
    base = NEW_BASE.replace('LoggerHook\n', 'EMAHook, LoggerHook\n', 1)
    base = base.replace(
        'custom_hooks = [', 'custom_hooks = [dict(type=EMAHook),'
    )
    (tmp_path / 'base.py').write_text(base)
    (tmp_path / 'config.py').write_text(NEW)
    run = run_of(tmp_path / 'a', Config.fromfile(tmp_path / 'config.py'))
    with pytest.raises(OptionError) as error:
        run.runner.call_hook('before_run')
    advice = str(error.value).partition('write ')[2].rstrip('.')
    assert advice.startswith('custom_hooks[0].update(')
    text = NEW.partition('default_hooks')[0] + advice
    (tmp_path / 'config.py').write_text(text)
    run = run_of(tmp_path / 'b', Config.fromfile(tmp_path / 'config.py'))
    assert 'PipelineSwitchHook' in kinds_of(run)
    assert run.hook._life.options.evaluate == 'both'
