"""Every EMA config of mmdet 3.3, with the import as its only change.

``docs/en/appendix/what_was_run.md`` says what is built, trained and tested.
"""

import gc
import importlib.util
import json
import os
import shutil
from pathlib import Path

import mmdet.models  # noqa: F401  registers what the configs name
import numpy as np
import pytest
import torch
from mmdet.models.trackers import byte_tracker, ocsort_tracker, sort_tracker
from mmdet.utils import register_all_modules
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner

import mmdet_ema
from mmdet_ema.averaging.tensors import Role, select
from tests import oracle
from tests.e2e import ema_configs_lap as lap
from tests.e2e import ema_configs_list as configs
from tests.e2e.conftest import ROOT
from tests.e2e.ema_configs_small import annotate, small, untouched

pytestmark = pytest.mark.e2e
HAS_LAP = importlib.util.find_spec('lap') is not None
HAS_MMPRETRAIN = importlib.util.find_spec('mmpretrain') is not None
CONVNEXT = 'rtmdet/rtmdet_l_convnext_b_4xb32-100e_coco.py'


@pytest.fixture(scope='module', autouse=True)
def _registered():
    """Leave the scope that a tool would have, then as it was."""
    register_all_modules(init_default_scope=False)


@pytest.fixture(scope='module')
def data(tools):
    """A copy of the digits set with masks and as a video."""
    folder = tools.folder / 'digits_with_masks'
    shutil.copytree(tools.data, folder)
    annotate(folder)
    return folder


@pytest.fixture
def trackers(monkeypatch):
    """Let trackers be built where what they ask for is not installed."""
    if not HAS_LAP:
        monkeypatch.setattr(byte_tracker, 'lap', lap)
        monkeypatch.setattr(ocsort_tracker, 'lap', lap)
    if getattr(sort_tracker, 'motmetrics', ...) is None:
        # OC-SORT's tracker inherits the question for it, and never uses it
        monkeypatch.setattr(sort_tracker, 'motmetrics', object())


# The walk


def test_list_is_that_of_the_installed_package():
    """The configs below are all that use the hook and can be loaded."""
    found, unreadable = [], {}
    for path in configs.installed():
        if not configs.mentions_ema(path):
            continue
        name = str(path.relative_to(configs.root()))
        try:
            hooks = configs.load(path).get('custom_hooks') or []
        except (FileNotFoundError, ModuleNotFoundError) as error:
            unreadable[name] = type(error)
            continue
        found += [name] if any('EMA' in str(h['type']) for h in hooks) else []
    assert sorted(configs.NAMES) == found
    assert len(found) == 29
    assert unreadable == {
        name: error
        for name, error in configs.UNREADABLE.items()
        if not (HAS_MMPRETRAIN and error is ModuleNotFoundError)
    }


def build(config, folder, monkeypatch):
    """Build a runner, which builds the model and every hook."""
    # collecting the versions of compilers takes two seconds a runner
    monkeypatch.setattr(Runner, '_log_env', lambda *_: None)
    config.work_dir = str(folder)
    config.log_level = 'ERROR'
    return Runner.from_cfg(config)


def unique_tensors(model):
    """How many float and other tensors are saved, each memory once."""
    floats, others = set(), set()
    for tensor in model.state_dict().values():
        kind = floats if tensor.is_floating_point() else others
        kind.add(tensor.data_ptr())
    return len(floats), len(others)


@pytest.fixture
def _zeros(monkeypatch):
    """Draw no random weights: 100 million a model take seconds."""

    def fill(tensor, *_, **__):
        tensor.data.zero_()
        return tensor

    for name in ('kaiming_uniform_', 'kaiming_normal_', 'trunc_normal_'):
        monkeypatch.setattr(torch.nn.init, name, fill)


@pytest.mark.parametrize('name', configs.NAMES)
@pytest.mark.usefixtures('trackers', '_zeros')
def test_hooks_and_model_build(tmp_path, monkeypatch, name):
    """All hooks of the untouched config build, the EMA hook as ours."""
    config = untouched(name, tmp_path)
    if name == CONVNEXT and not HAS_MMPRETRAIN:
        with pytest.raises(KeyError, match=r'mmpretrain\.ConvNeXt'):
            build(config, tmp_path, monkeypatch)
        other = name.replace('_convnext_b_4xb32-100e', '_8xb32-300e')
        config.model = untouched(other, tmp_path).model
    runner = build(config, tmp_path, monkeypatch)
    hooks = {type(hook).__name__: hook for hook in runner.hooks}
    assert {h['type'] for h in config.custom_hooks} <= hooks.keys()
    (hook,) = (h for n, h in hooks.items() if 'EMA' in n)
    assert type(hook) is mmdet_ema.EMAHook
    assert hook.priority == 49
    options = hook._life.options
    assert options.update_buffers is True
    assert options.interval == 1
    schedule = options.choice.make(1)
    assert schedule.name == 'ExpMomentumEMA'
    momentum = 0.0002 if name.startswith('rtmdet') else 0.0001
    assert schedule.options == dict(momentum=momentum, gamma=2000.0)
    entries = select(runner.model, options.update_buffers)
    roles = [entry.role for entry in entries]
    counted = roles.count(Role.AVERAGED), roles.count(Role.COPIED)
    assert counted == unique_tensors(runner.model)
    assert Role.SHARED not in roles
    del runner, entries
    gc.collect()


# mmdet's own tools


def tool(tools, kind, config, work_dir, *arguments):
    """Run a tool of mmdet; return what it printed."""
    path = [str(ROOT)]
    if not HAS_LAP:
        folder = tools.folder / 'stand_in'
        folder.mkdir(exist_ok=True)
        shutil.copy(lap.__file__, folder / 'lap.py')
        path.append(str(folder))
    words = tools.command(kind, config, work_dir, *arguments)
    return tools.finish(words, PYTHONPATH=os.pathsep.join(path))


SWITCHES = {
    'PipelineSwitchHook': ['Switch pipeline now!'],
    'YOLOXModeSwitchHook': [
        'No mosaic and mixup aug now!',
        'Add additional L1 loss now!',
    ],
}


def check_switched(log, config):
    """The config's other hook did its work, once."""
    (lines,) = (
        SWITCHES[h.type] for h in config.custom_hooks if h.type in SWITCHES
    )
    assert [log.count(line) for line in lines] == [1] * len(lines)


def check_file(path, steps):
    """The checkpoint holds averages and raw weights, and they differ."""
    saved = torch.load(path, weights_only=True)
    assert saved['ema_state_dict']['steps'] == steps
    assert saved['ema_meta']['roles']['state_dict'] == 'average'
    raw = saved['ema_state_dict']
    differing = [
        name
        for name, value in saved['state_dict'].items()
        if not torch.equal(value, raw[f'module.{name}'])
    ]
    assert len(differing) > 0.9 * len(
        [v for v in saved['state_dict'].values() if v.is_floating_point()]
    )


@pytest.mark.parametrize(
    'name',
    [
        'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
        'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
        'yolox/yolox_tiny_8xb8-300e_coco.py',
        f'bytetrack/bytetrack_yolox_x_8xb4-amp-80e_{configs.MOT17}.py',
    ],
)
def test_trained_and_tested_by_the_tools(tools, data, tmp_path, name):
    """``tools/train.py``, its checkpoint, and ``tools/test.py``."""
    config = small(name, data, tmp_path)
    path, work_dir = tmp_path / 'small.py', tmp_path / 'train'
    log = tool(tools, 'train', path, work_dir)
    momentum = 0.0002 if name.startswith('rtmdet') else 0.0001
    words = f'EMA: ExpMomentumEMA(momentum={momentum}, gamma=2000.0)'
    assert words in log
    check_switched(log, config)
    # ByteTrack's training set is three sets
    steps = 2 * 4 * (3 if 'bytetrack' in name else 1)
    check_file(work_dir / 'epoch_2.pth', steps)
    number = len(config.custom_hooks)
    (index,) = (
        i for i in range(number) if config.custom_hooks[i].type == 'EMAHook'
    )
    out = tmp_path / 'test'
    tool(
        tools,
        'test',
        path,
        out,
        work_dir / 'epoch_2.pth',
        '--cfg-options',
        f'custom_hooks.{index}.evaluate=both',
    )
    (file,) = out.glob('*/*.json')
    metrics = json.loads(file.read_text())
    kinds = ['bbox', 'segm'] if 'ins' in Path(name).stem else ['bbox']
    for kind in kinds:
        found = [k for k in metrics if f'{kind}_mAP' in k]
        assert sum(k.endswith('_mAP') for k in found) == 1
        assert sum(k.endswith('_mAP_raw') for k in found) == 1


@pytest.mark.parametrize(
    'name',
    [
        'rtmdet/rtmdet_x_p6_4xb8-300e_coco.py',
        'rtmdet/rtmdet_l_swin_b_p6_4xb16-100e_coco.py',
        'yolox/yolox_nano_8xb8-300e_coco.py',
        'yolox/yolox_s_8xb8-300e_coco.py',
        f'ocsort/ocsort_yolox_x_8xb4-amp-80e_{configs.MOT17}.py',
        f'strongsort/yolox_x_8xb4-80e_{configs.MOT17}.py',
    ],
)
@pytest.mark.usefixtures('trackers')
def test_trained_and_tested_in_one_process(data, tmp_path, monkeypatch, name):
    """What the tools do, for the variants that differ in more than size."""
    config = small(name, data, tmp_path)
    runner = build(config, tmp_path, monkeypatch)
    lines = []
    monkeypatch.setattr(runner.logger, 'info', lambda t, *_: lines.append(t))
    runner.train()
    assert runner.iter >= 8
    check_switched('\n'.join(map(str, lines)), config)
    check_file(tmp_path / 'epoch_2.pth', runner.iter)
    metrics = runner.test()
    assert any(key.endswith('bbox_mAP') for key in metrics)


# Side by side with mmdet's own class


class Beside(Hook):
    """Updates mmdet's own ``ExpMomentumEMA`` after every step."""

    priority = 'VERY_LOW'

    def __init__(self, options, resumed):
        self.options, self.resumed, self.trace = options, resumed, []

    def before_train(self, runner):
        self.peer = MODELS.build(
            dict(
                type='mmdet.ExpMomentumEMA', model=runner.model, **self.options
            )
        )
        if self.resumed:
            self.peer.module.load_state_dict(self.resumed['state_dict'])
            self.peer.steps.fill_(self.resumed['ema_state_dict']['steps'])
        # what an average starts from
        self.start = self.copy(self.peer.module)

    def after_train_iter(self, runner, *_, **__):
        self.peer.update_parameters(runner.model)
        self.trace.append(self.copy(runner.model))

    @staticmethod
    def copy(model):
        return {k: v.detach().clone() for k, v in model.state_dict().items()}


def train_beside(config, folder, monkeypatch, file=None):
    """Train; return our checkpoint and what went on beside."""
    resumed = torch.load(file, weights_only=True) if file else None
    if file:
        config.update(resume=True, load_from=str(file))
    runner = build(config, folder, monkeypatch)
    beside = Beside(dict(momentum=0.0002, update_buffers=True), resumed)
    runner.register_hook(beside)
    runner.train()
    return beside, folder / f'epoch_{config.train_cfg.max_epochs}.pth'


def tied_names(model):
    """Names whose memory has other names too."""
    memory = {}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        memory.setdefault(tensor.data_ptr(), []).append(name)
    return {n for names in memory.values() if len(names) > 1 for n in names}


def relative_error(found, expected):
    return oracle.relative_error(found, np.asarray(expected, np.float64))


def check_numbers(beside, file, done):
    """Ours equal the peer's, and the formula where the head is tied."""
    saved = torch.load(file, weights_only=True)
    steps = done + len(beside.trace)
    assert saved['ema_state_dict']['steps'] == beside.peer.steps == steps

    def decay(n):
        """The ramp of mmdet; its first update is a copy."""
        return oracle.ramp(n + done, 0.9998, 2000) if n + done > 1 else 0.0

    expected = beside.peer.module.state_dict()
    tied = tied_names(beside.peer.module)
    apart, untied = [], 0
    for name, value in saved['state_dict'].items():
        raw = beside.trace[-1][name]
        if not value.is_floating_point():
            # the peer leaves counters as they were at its start (a defect)
            assert torch.equal(value, raw), name
            continue
        values = [state[name].double().numpy() for state in beside.trace]
        start = beside.start[name].double().numpy()
        formula = oracle.average(start, values, decay)
        error = relative_error(value, formula)
        assert error < 1e-6, name  # float32 rounding, a dozen updates
        if name in tied:
            apart.append(relative_error(expected[name], formula))
            continue
        untied += 1
        error = relative_error(value, expected[name])
        assert error < 1e-6, name  # the same
    return apart, untied


def test_official_rtmdet_equals_mmdets_own_class(data, tmp_path, monkeypatch):
    """The averages are mmdet's, but where its head ties tensors.

    There mmdet averages three times a step, and ours equal the formula. From
    the first step, and resumed at step 3,000, where the average is slow.
    """
    name = 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
    (tmp_path / 'a').mkdir()
    (tmp_path / 'b').mkdir()
    config = small(name, data, tmp_path / 'a')
    official = dict(
        type='EMAHook',
        ema_type='ExpMomentumEMA',
        momentum=0.0002,
        update_buffers=True,
        priority=49,
    )
    # mmengine adds the scope of what is inherited as mmdet::...
    assert config.custom_hooks[0] == dict(official, _scope_='mmdet')
    beside, file = train_beside(config, tmp_path / 'a', monkeypatch)
    apart, untied = check_numbers(beside, file, 0)
    # 4 convolutions under 3 names each
    assert len(apart) == 12
    assert untied > 300
    late = torch.load(file, weights_only=True)
    late['ema_state_dict']['steps'] = torch.tensor(3000)
    del late['ema_meta']  # a file as mmengine's hook writes it
    torch.save(late, tmp_path / 'late.pth')
    config = small(name, data, tmp_path / 'b', epochs=4)
    beside, file = train_beside(
        config, tmp_path / 'b', monkeypatch, tmp_path / 'late.pth'
    )
    apart, untied = check_numbers(beside, file, 3000)
    assert min(apart) > 1e-4  # three updates a step are another average
