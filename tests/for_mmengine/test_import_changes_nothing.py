"""A run without the hook is the same with the import and without it."""

import json
import re
import subprocess
import sys

import pytest
import torch

# runs alone in a process: nothing of this package but what it is told
PROGRAM = """
import json, sys
import torch
import mmengine.hooks, mmengine.model, mmengine.optim, mmengine.runner
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner import Runner
from torch import nn


def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition('.')[0] in ('mmengine', 'torch') and module:
            for key, value in list(vars(module).items()):
                found[f'{name}:{key}'] = id(value)
                if isinstance(value, type):
                    for part, inner in list(vars(value).items()):
                        found[f'{name}:{key}.{part}'] = id(inner)
    return found


def registered():
    return [
        {key: id(value) for key, value in registry._module_dict.items()}
        for registry in (HOOKS, OPTIM_WRAPPER_CONSTRUCTORS)
    ]


folder, imports = sys.argv[1], sys.argv[2] == 'with'
torch.manual_seed(0)
before, names, registry = attributes(), registered(), dict(vars(HOOKS))
if imports:
    import mmdet_ema
after = attributes()
changed = [key for key in before if after.get(key) != before[key]]
entries = [
    sorted(key for key in new if old.get(key) != new[key])
    for old, new in zip(names, registered())
]
registry = [k for k, v in vars(HOOKS).items() if registry.get(k) is not v]
loggers = list(MMLogger._instance_dict)


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))

    def forward(self, inputs, mode='tensor'):
        out = self.body(inputs)
        return dict(loss=out.square().mean()) if mode == 'loss' else [out]


class Score(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(float(data_samples[0].sum()))

    def compute_metrics(self, results):
        return dict(score=sum(results))


def loader():
    data = [dict(inputs=torch.randn(4)) for _ in range(16)]
    return torch.utils.data.DataLoader(data, 4, shuffle=True)


model = Toy()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
runner = Runner(
    model=model,
    work_dir=folder,
    train_dataloader=loader(),
    train_cfg=dict(by_epoch=True, max_epochs=2),
    optim_wrapper=OptimWrapper(optimizer),
    param_scheduler=dict(type='LinearLR', start_factor=0.1, end=8),
    val_dataloader=loader(),
    val_cfg=dict(),
    val_evaluator=Evaluator([Score()]),
    default_hooks=dict(
        logger=dict(type='LoggerHook', interval=1),
        checkpoint=dict(type='CheckpointHook', save_best='score',
                        rule='greater'),
    ),
    custom_hooks=json.loads(sys.argv[3]),
    randomness=dict(seed=0),
    experiment_name='mmengine',
)
runner.train()
own = [f'{type(x).__name__}.{key}' for x in (runner, runner.train_loop,
       runner.val_loop, model, optimizer) for key in vars(x)]
print(json.dumps(dict(changed=changed, entries=entries, loggers=loggers,
                      own=own, registry=registry)))
"""


def run(folder, imports, hooks=()):
    """Train in a process of its own; return what it printed at the end."""
    words = [str(folder), imports, json.dumps(list(hooks))]
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', PROGRAM, *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def log_of(folder):
    """The lines of a run's log, without what differs in any two runs."""
    (path,) = folder.glob('*/*.log')
    text = path.read_text().replace(str(folder), 'FOLDER')
    text = re.sub(r'\d{8}_\d{6}', 'WHEN', text)
    text = re.sub(r'\d{4}/\d\d/\d\d \d\d:\d\d:\d\d', 'WHEN', text)
    text = re.sub(r'(time|eta): [\d:.]+', r'\1: T', text)
    return text.splitlines()


def of_weights(path):
    """The weights and optimizer of a file, flat."""
    saved = torch.load(path, weights_only=False)
    states = saved['optimizer']['state'].items()
    inner = {f'{i}.{k}': v for i, s in states for k, v in s.items()}
    return {**saved['state_dict'], **inner}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The same run without the import and with it."""
    folders = {w: tmp_path_factory.mktemp(w) for w in ('without', 'with')}
    return {w: (folder, run(folder, w)) for w, folder in folders.items()}


def test_same_bits(runs):
    """Weights and momentum are equal, bit for bit."""
    left, right = (
        of_weights(folder / 'epoch_2.pth') for folder, _ in runs.values()
    )
    assert left.keys() == right.keys()
    assert len(left) > 10
    assert [k for k in left if not torch.equal(left[k], right[k])] == []


def test_same_files(runs):
    """The same files with the same keys are written."""
    left, right = (folder for folder, _ in runs.values())
    assert [p.name for p in sorted(left.glob('*.pth'))] == [
        p.name for p in sorted(right.glob('*.pth'))
    ]
    keys = [
        list(torch.load(f / 'epoch_2.pth', weights_only=False))
        for f in (left, right)
    ]
    assert keys[0] == keys[1]


def test_same_log(runs):
    """The log has the same lines, with the same names; no line of ours."""
    left, right = (log_of(folder) for folder, _ in runs.values())
    assert left == right
    assert any('Epoch(val) [2]' in line for line in left)


def test_same_attributes(runs):
    """Nothing in the framework's or torch's modules and classes changes.

    But for torch's list of what a file may hold, from torch 2.4 on.
    """
    _, found = runs['with']
    allowed = 'torch._weights_only_unpickler:_marked_safe_globals_set'
    assert [key for key in found['changed'] if key != allowed] == []
    assert found['loggers'] == []
    assert found['own'] == runs['without'][1]['own']


def test_what_is_registered(runs):
    """Names come to two registries; that of hooks builds through us."""
    _, found = runs['with']
    hooks, constructors = found['entries']
    assert hooks == ['BiasWarmupHook', 'EMAHook', 'MMEngineEMAHook']
    assert len(constructors) == 1
    assert found['registry'] == ['build_func']


def test_it_can_fail(tmp_path, runs):
    """With the hook a run has other files, lines and attributes."""
    found = run(tmp_path, 'with', [dict(type='EMAHook', decay=0.9)])
    assert found['own'] != runs['with'][1]['own']
    assert log_of(tmp_path) != log_of(runs['with'][0])
    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    assert 'ema_state_dict' in saved
