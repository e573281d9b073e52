"""A run without the hook is the same with the import and without it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import MMCV1
from tests.contract.toy import EMA, Saved

ROOT = Path(__file__).parents[2]


def run(folder, statement='import mmdet_ema', hooks=()):
    """Train in a process of its own; return what it printed at the end."""
    words = [str(folder), statement, json.dumps(list(hooks))]
    program = ['-m', 'tests.contract.import_program', *words]
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', *program],
        cwd=ROOT,
        env={**os.environ, 'WITHOUT_EMA': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def log_of(folder, found):
    """The log of a run, without what differs in any two runs."""
    text = found['log'].replace(str(folder), 'FOLDER')
    when = r'\d{8}_\d{6}|\d{4}/\d\d/\d\d \d\d:\d\d:\d\d'
    text = re.sub(when, 'WHEN', text)
    return re.sub(r'(time|eta): [\d:.e-]+', r'\1: T', text)


def of_weights(path):
    """The weights and optimizer of a file, flat."""
    saved = Saved(path).content
    states = saved['optimizer']['state'].items()
    inner = {f'{i}.{k}': v for i, s in states for k, v in s.items()}
    return {**saved['state_dict'], **inner}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The same run without the import and with it."""
    statements = {'without': '', 'with': 'import mmdet_ema'}
    folders = {w: tmp_path_factory.mktemp(w) for w in statements}
    return {w: (f, run(f, statements[w])) for w, f in folders.items()}


def test_same_bits(runs):
    """Weights, momentum and random numbers are equal, bit for bit."""
    left, right = (
        of_weights(folder / 'epoch_2.pth') for folder, _ in runs.values()
    )
    assert left.keys() == right.keys()
    assert len(left) > 10
    assert [k for k in left if not torch.equal(left[k], right[k])] == []
    left, right = (found['random'] for _, found in runs.values())
    assert left == right


def test_same_files(runs):
    """The same files with the same keys are written."""
    left, right = (
        {
            path.name: [list(content), list(content['meta'])]
            for path in folder.glob('*.pth')
            for content in [Saved(path).content]
        }
        for folder, _ in runs.values()
    )
    assert left == right
    assert len(left) > 1


def test_same_log(runs):
    """The log has the same lines; no line of ours."""
    left, right = (log_of(*run) for run in runs.values())
    assert left == right
    assert 'Epoch(val) [2]' in left


def test_same_attributes(runs):
    """Nothing in the framework's or torch's modules and classes changes.

    But for torch's list of what a file may hold, from torch 2.4 on.
    """
    (_, without), (_, found) = runs.values()
    allowed = 'torch._weights_only_unpickler:_marked_safe_globals_set'
    assert [key for key in found['changed'] if key != allowed] == []
    for name in ('loggers', 'root', 'own'):
        assert without[name] == found[name]


def test_what_is_registered(runs):
    """Names come to two registries; that of hooks works through us."""
    hooks, constructors, registry = runs['with'][1]['entries']
    ours = ['BiasWarmupHook', 'EMAHook']
    if MMCV1:
        names = ('ExpMomentumEMAHook', 'LinearMomentumEMAHook')
        ours += [*names, 'MEGVIIEMAHook', 'MMCVEMAHook']
    else:
        ours.append('MMEngineEMAHook')
    assert hooks == sorted(ours)
    assert constructors == ['EMAOptimizerConstructor']
    assert registry == ['_register_module' if MMCV1 else 'build_func']


MEDDLE = """
import logging
torch.optim.SGD.step = lambda self, closure=None: None
logging.root.addHandler(logging.NullHandler())
"""


def test_it_can_fail(tmp_path, runs):
    """With the hook a run has other files, lines and attributes.

    A method that a module replaces is found, and a handler.
    """
    found = run(tmp_path, f'import mmdet_ema\n{MEDDLE}', [EMA])
    _, before = runs['with']
    assert found['own'] != before['own']
    assert found['root'] != before['root']
    assert 'torch.optim:SGD.step' in found['changed']
    assert log_of(tmp_path, found) != log_of(*runs['with'])
    assert Saved(tmp_path / 'epoch_2.pth').has_part
