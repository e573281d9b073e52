"""The blocks of the English pages run; the Chinese ones are the same.

A comment before a block says what it is; without one Python is a config of
mmengine. ``program`` is executed, ``config: mmcv1`` and ``program: mmcv1`` are
for mmcv 1.x, ``not run: reason`` is left out.
"""

import os
import re
import shlex

import pytest
import torch
from torch import nn

import mmdet_ema
from mmdet_ema.cli.main import _parser
from mmdet_ema.frameworks import has_mmcv1, has_mmengine, has_package
from tests.docs.pages import ENGLISH, ROOT, blocks
from tests.needs import SAFELY

PAGES = [*ENGLISH, ROOT / 'README.md']
BLOCKS = [block for page in PAGES for block in blocks(page)]
MARKS = r'|config|program|(config|program): mmcv1|not run: .{10,}'


def _marked(*marks):
    found = [
        pytest.param(block, id=f'{block.page}:{block.line}')
        for block in BLOCKS
        if block.language == 'python' and block.mark in marks
    ]
    assert found
    return pytest.mark.parametrize('block', found)


def test_every_block_says_what_it_is():
    """Its language, and why it is not run if it is not."""
    languages = {'python', 'shell', 'text', '{eval-rst}', '{toctree}'}
    assert languages >= {block.language for block in BLOCKS}
    for block in BLOCKS:
        assert re.fullmatch(MARKS, block.mark), block


@pytest.mark.skipif(
    has_mmcv1() or not has_mmengine(), reason='a config of mmengine'
)
@_marked('', 'config')
def test_config_builds_its_hooks(block, tmp_path, monkeypatch):
    """The framework builds its hooks, and loses none of the base's."""
    from mmengine.config import Config
    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
    from mmengine.runner import Runner
    from mmengine.visualization import Visualizer

    for framework, named in (
        ('mmdet3d', r'mmdet3d::'),
        ('mmdet', r'mmdet::|NumClassCheckHook'),
    ):
        if re.search(named, block.code) and not has_package(framework):
            pytest.skip(f'{framework} is not in this stack')
    _registered('mmdet3d' if 'mmdet3d::' in block.code else 'mmdet')
    Visualizer.get_instance('pages')  # hooks of mmdet ask for one
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    _write(my_package='def my_schedule(n):\n    return 0.9\n')
    _write(my_base="default_hooks = dict(timer=dict(type='IterTimerHook'))\n")
    for number, code in enumerate(_configs(block.code)):
        path = _write(**{f'page_{number}': code})
        cfg = Config.fromfile(path)
        runner = Runner.__new__(Runner)
        runner._hooks = []
        runner.register_hooks(
            cfg.get('default_hooks'), cfg.get('custom_hooks')
        )
        built = [type(hook) for hook in runner.hooks]
        if 'EMAHook' in code and 'MMEngineEMAHook' not in code:
            assert 1 == built.count(mmdet_ema.EMAHook)
        base = re.search(r"'(\w+::[^']+)'", code)
        if base:
            assert _hooks_of(_base(base[1])) <= _hooks_of(cfg)
        constructor = cfg.get('optim_wrapper', {}).get('constructor')
        if constructor:
            assert OPTIM_WRAPPER_CONSTRUCTORS.get(constructor)


@pytest.mark.skipif(
    has_mmcv1() or not has_mmengine(), reason='a recipe of mmengine'
)
@pytest.mark.parametrize(
    'block',
    [
        pytest.param(block, id=f'{block.page}:{block.line}')
        for block in BLOCKS
        if block.page.endswith(('recipes.md', 'which_decay.md', 'off.md'))
        and block.language == 'python'
        and block.mark in ('', 'config')
        and 'default_hooks' in block.code
        and 'MMEngineEMAHook' not in block.code
    ],
)
def test_recipe_trains(block, tmp_path):
    """A small model is trained and validated with the hooks of the recipe."""
    from tests.for_mmengine.toy import Run, Score, ToyModel

    model = ToyModel()
    if 'copied' in block.code:  # a model of these names
        model.head.register_buffer('queue', torch.ones(2))
        model.head.register_buffer('mask', torch.ones(2))
    known = {}
    exec(block.code, known)
    metric = Score()
    metric.compute_metrics = lambda results: {'coco/bbox_mAP': sum(results)}
    steps = known.get('optim_wrapper', {}).get('accumulative_counts', 1)
    run = Run(
        tmp_path,
        model=model,
        hooks=known['default_hooks'],
        max_epochs=10,
        accumulative_counts=steps,
        metric=metric,
    )
    run.train()
    assert 1 == sum(isinstance(x, mmdet_ema.EMAHook) for x in run.runner.hooks)
    enabled = known['default_hooks']['ema'].get('enabled', True)
    (path, *_) = sorted(tmp_path.glob('*.pth'))
    # switched off, it is a file of the framework's own
    saved = torch.load(path, **({'weights_only': False} if SAFELY else {}))
    assert enabled == ('ema_meta' in saved)


@pytest.mark.skipif(not has_mmcv1(), reason='a config of mmcv 1.x')
@_marked('config: mmcv1')
def test_config_of_mmcv1_builds_its_hooks(block, tmp_path, monkeypatch):
    """The framework reads it, and its registry builds our hook."""
    from mmcv import Config
    from mmcv.runner import HOOKS

    if 'NumClassCheckHook' in block.code:
        pytest.importorskip('mmdet.datasets')
    monkeypatch.chdir(tmp_path)
    _write(**{'hv_pointpillars_secfpn_6x8_160e_kitti-3d-car': ''})
    cfg = Config.fromfile(_write(page=block.code))
    hooks = [dict(hook) for hook in cfg.get('custom_hooks', [])]
    for hook in hooks:
        hook.pop('priority', None)  # as a runner does
    built = [HOOKS.build(hook) for hook in hooks]
    assert 1 == sum(isinstance(x, mmdet_ema.EMAHook) for x in built)


@pytest.mark.skipif(
    has_mmcv1() or not has_mmengine(), reason='files of mmengine'
)
@pytest.mark.skipif(not SAFELY, reason='torch 1.13 refuses floats in files')
@_marked('program')
def test_program_runs(block, tmp_path, monkeypatch):
    """In a folder with checkpoints, after the blocks before it on its page."""
    from tests.for_mmengine.toy import Run

    hook = dict(type='EMAHook', decay=0.9, tau=2)
    Run(tmp_path, hook, max_epochs=12).train()
    monkeypatch.chdir(tmp_path)
    _execute_up_to(block)


@pytest.mark.skipif(not has_mmcv1(), reason='files of mmcv 1.x')
@_marked('program: mmcv1')
def test_program_of_mmcv1_runs(block, tmp_path, monkeypatch):
    """In a folder with a checkpoint that a run of mmcv 1.x wrote."""
    from tests.for_mmcv1.toy import EMA, Run

    Run(tmp_path, EMA, runner=dict(max_epochs=1)).train()
    (tmp_path / 'epoch_1.pth').rename(tmp_path / 'epoch_12.pth')
    monkeypatch.chdir(tmp_path)
    _execute_up_to(block)


def test_commands_of_the_pages_are_commands():
    """``mmdet-ema`` knows each command that a page runs."""
    lines = [
        line
        for block in BLOCKS
        if block.language == 'shell'
        for line in block.code.splitlines()
        if re.search(r'mmdet[-_]ema [a-z]+', line)
    ]
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line, comments=True)
        start = 1 + min(
            words.index(x) for x in ('mmdet-ema', 'mmdet_ema') if x in words
        )
        _parser().parse_known_args(words[start:])


class Model(nn.Module):
    """What a page calls ``model``: it returns its loss."""

    def __init__(self):
        super().__init__()
        self.head = nn.ModuleDict(dict(norm=nn.BatchNorm1d(3)))

    def forward(self, inputs):
        return self.head['norm'](inputs).sin().sum()


def _execute_up_to(block):
    model = Model()
    known = dict(
        model=model,
        loader=[torch.randn(4, 3) for _ in range(3)],
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        evaluate=lambda model: model.eval(),
    )
    for before in BLOCKS:
        same_page = (before.page, before.mark) == (block.page, block.mark)
        if same_page and before.line <= block.line:
            exec(compile(before.code, f'{block.page}', 'exec'), known)


def _configs(code):
    """Return the configs of a block; lines of hooks alone are one each."""
    if re.search(r'^\w+ = ', code, re.M) or 'import' in code:
        return [code]
    hooks = re.split(r'\n(?=dict\()', code)
    return [f'custom_hooks = [\n{hook}\n]\n' for hook in hooks]


def _write(**files):
    for name, code in files.items():
        path = os.path.abspath(f'{name}.py')
        with open(path, 'w') as file:
            file.write(code)
    return path


def _registered(scope):
    from mmengine.registry import DefaultScope, init_default_scope

    if has_package(scope):
        init_default_scope(scope)
        __import__(f'{scope}.utils').utils.register_all_modules(False)
    else:
        DefaultScope.get_instance('none', scope_name='mmengine')


def _base(name):
    from mmengine.config import Config

    return Config.fromfile(_write(base=f"_base_ = '{name}'\n"))


def _hooks_of(cfg):
    return {hook['type'] for hook in cfg.get('custom_hooks', [])}
