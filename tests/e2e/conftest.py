"""A real detector, small, trained by mmdet's own tools in a subprocess."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs' / 'rtmdet' / 'rtmdet_digits_1xb8-10e.py'

SCENES = '--train 16 --val 8 --size 64'
SETTINGS = """
_base_ = {config!r}
model = dict(test_cfg=dict(score_thr=0.0))
train_dataloader = dict(
    batch_size=4,
    dataset=dict(data_root={data!r}, pipeline={{{{_base_.test_pipeline}}}}))
val_dataloader = dict(batch_size=4, dataset=dict(data_root={data!r}))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={val!r})
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=4, val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=1))
_base_.custom_hooks[1].update(switch_epoch=2)
"""


class Tools:
    """Runs mmdet's own tools on a small config."""

    package = 'mmdet'

    def __init__(self, folder, data):
        self.folder, self.data = folder, data

    def config(self, name, extra='', base=CONFIG):
        """Write a config; return its path."""
        path = self.folder / f'{name}.py'
        settings = dict(
            config=str(base),
            data=f'{self.data}/',
            val=f'{self.data}/annotations/val.json',
        )
        path.write_text(SETTINGS.format(**settings) + extra)
        return path

    def path(self, tool):
        """Return the path of a tool."""
        spec = importlib.util.find_spec(self.package)
        (package,) = spec.submodule_search_locations
        return Path(package) / '.mim' / 'tools' / f'{tool}.py'

    def command(self, tool, config, work_dir, *arguments):
        """Return the command line of a tool."""
        words = [sys.executable, self.path(tool), config, *arguments]
        return [str(word) for word in (*words, '--work-dir', work_dir)]

    def run(self, tool, config, work_dir, *arguments):
        """Run a tool to its end; return what it printed."""
        return self.finish(self.command(tool, config, work_dir, *arguments))

    def finish(self, words, status=0, stderr=subprocess.STDOUT, **variables):
        """Run a program to its end; return what it printed."""
        done = subprocess.run(
            list(map(str, words)),
            cwd=self.folder,
            env={**environment(), **variables},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=1800,
        )
        printed = done.stdout + (done.stderr or '')
        assert done.returncode == status, printed[-6000:]
        return printed

    def kill(self, words, work_dir, when):
        """Start a tool, and kill it when something is so; no file is last."""
        process = subprocess.Popen(
            words,
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 1200
        while not when():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (work_dir / 'epoch_4.pth').exists()

    def launch(self, *words, **variables):
        """Run ``torchrun`` on two ranks to its end; return what it printed."""
        launcher = ['-m', 'torch.distributed.run', '--standalone']
        launcher.append('--nproc_per_node=2')
        return self.finish([sys.executable, *launcher, *words], **variables)

    def cli(self, *words, status=0):
        """Run the command line; return what it printed, errors last."""
        words = [sys.executable, '-m', 'mmdet_ema', *words]
        return self.finish(words, status, stderr=subprocess.PIPE)

    def test(self, config, checkpoint, name, *options):
        """Run ``tools/test.py``; return its metrics.

        The predictions are in ``test_NAME/out.pkl``.
        """
        out = self.folder / f'test_{name}'
        words = ['--out', out / 'out.pkl']
        words += ['--cfg-options', *options] if options else []
        self.run('test', config, out, checkpoint, *words)
        (path,) = out.glob('*/*.json')
        return json.loads(path.read_text())


def maps(metrics):
    """Leave out how long a test took."""
    return {name: x for name, x in metrics.items() if 'mAP' in name}


def last_validation(folder):
    """Return the last metrics that a training has logged."""
    (path,) = folder.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if 'digits/mAP' in line][-1]


def load(path):
    """Read a checkpoint as any process could."""
    return torch.load(path, weights_only=True)


def differing(left, right):
    """Names that differ in a bit, in weights, EMA part or counters."""
    names = []
    for part in ('state_dict', 'ema_state_dict'):
        assert left[part].keys() == right[part].keys()
        names += [
            name
            for name, value in left[part].items()
            if not torch.equal(value, right[part][name])
        ]
    return names


def assert_mean(average, *files, kept):
    """An average is the mean of the raw weights of files.

    Args:
        average: The weights.
        *files: What has the raw ones.
        kept: Whether BatchNorm statistics have been estimated again.
    """
    halves = [file['ema_state_dict'] for file in files]
    for name, value in average.items():
        if kept and name.endswith(('running_mean', 'running_var')):
            continue
        # what is frozen has one value
        if value.is_floating_point() and f'module.{name}' in halves[0]:
            raws = [half[f'module.{name}'].double() for half in halves]
            # one rounding of the sum and one of each half
            torch.testing.assert_close(
                value.double(), sum(raws) / len(raws), rtol=1e-6, atol=1e-7
            )


def environment():
    """Return an environment for a tool: one thread, no spinning."""
    paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    path = os.pathsep.join(paths)
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}


@pytest.fixture(scope='session')
def tools(tmp_path_factory):
    """Tools over a small digits set."""
    folder = tmp_path_factory.mktemp('e2e')
    data = folder / 'digits'
    subprocess.run(
        [sys.executable, ROOT / 'demo' / 'digits.py', data, *SCENES.split()],
        check=True,
    )
    return Tools(folder, data)


@pytest.fixture(scope='session')
def trained(tools):
    """A finished training: its config and work folder."""
    config = tools.config('whole')
    work_dir = tools.folder / 'whole'
    log = tools.run('train', config, work_dir)
    return config, work_dir, log


@pytest.fixture(scope='session')
def tested(tools, trained):
    """MAPs of each set of weights of its last file, tested alone.

    The predictions are in ``test_NAME/out.pkl``.
    """
    config, work_dir, _ = trained
    file = work_dir / 'epoch_4.pth'
    found = {}
    for name in ('ema', 'raw', 'fast'):
        option = f'custom_hooks.0.evaluate={name}'
        found[name] = maps(tools.test(config, file, name, option))
    return found
