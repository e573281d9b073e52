"""Train without an EMA hook and print all that an import could change.

Usage: python -m tests.for_mmcv1.import_program [MODULE]
where MODULE is imported first.
"""

import hashlib
import importlib
import inspect
import json
import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path

for _module in sys.argv[1:]:
    importlib.import_module(_module)

import mmcv.fileio  # noqa: E402
import mmcv.runner  # noqa: E402
import mmcv.utils  # noqa: E402
import torch  # noqa: E402
from mmcv.runner import (  # noqa: E402
    BaseModule,
    EvalHook,
    Hook,
    build_runner,
)
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402


class Data(Dataset):
    def __init__(self, size):
        generator = torch.Generator().manual_seed(size)
        self.inputs = torch.randn(size, 4, generator=generator)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return dict(inputs=self.inputs[index])

    def evaluate(self, results, logger=None, **kwargs):
        return dict(score=float(sum(results)))


class Model(BaseModule):
    def __init__(self):
        super().__init__(dict(type='Kaiming', layer='Linear'))
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, inputs, return_loss=True, **kwargs):
        out = self.head(self.body(inputs))
        return (out**2).mean() if return_loss else out.sum(1).tolist()

    def train_step(self, data, optimizer=None, **kwargs):
        loss = self(**data)
        count = len(data['inputs'])
        return dict(loss=loss, log_vars=dict(a=float(loss)), num_samples=count)

    val_step = train_step


class Scheduler(Hook):
    """A schedule of torch's that is made in the middle of the run."""

    def before_train_epoch(self, runner):
        optimizer = runner.optimizer
        self.own = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def after_train_epoch(self, runner):
        self.own.step()


def train(folder, kind):
    """Train as mmdet 2 does; return the runner."""
    torch.manual_seed(0)
    logger = mmcv.utils.get_logger('toy', log_file=f'{folder}/{kind}.log')
    model = Model()
    model.init_weights()
    length = dict(EpochBasedRunner='max_epochs', IterBasedRunner='max_iters')
    runner = build_runner(
        {'type': kind, length[kind]: 2},
        default_args=dict(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            work_dir=folder,
            logger=logger,
            meta={},
        ),
    )
    by_epoch = kind == 'EpochBasedRunner'
    runner.timestamp = kind
    runner.register_training_hooks(
        dict(policy='step', step=[1]),
        dict(grad_clip=None),
        dict(interval=1, by_epoch=by_epoch),
        dict(
            interval=1,
            hooks=[dict(type='TextLoggerHook', by_epoch=by_epoch)],
        ),
        custom_hooks_config=[Scheduler()],
    )
    evaluation = EvalHook(
        DataLoader(Data(6), batch_size=2),
        by_epoch=by_epoch,
        save_best='score',
        rule='greater',
        test_fn=lambda model, loader: [
            score for data in loader for score in model(**data, return_loss=0)
        ],
    )
    runner.register_hook(evaluation, priority='LOW')
    data = DataLoader(Data(16), batch_size=4)
    flow = [('train', 1), ('val', 1)]
    runner.run(data_loaders=[data, data], workflow=flow)
    return runner


def described(owner):
    """Describe the attributes of an object, so that replaced ones show."""
    found = {}
    for name, value in sorted(vars(owner).items()):
        if callable(value) or isinstance(value, (classmethod, staticmethod)):
            value = getattr(value, '__func__', value)
            where = getattr(inspect.unwrap(value), '__module__', '')
            code = getattr(value, '__code__', None)
            file = os.path.basename(code.co_filename) if code else ''
            found[name] = (
                f'{where} {getattr(value, "__qualname__", "")} {file}'
            )
        else:
            found[name] = type(value).__name__
    return found


def classes():
    """Return mmcv's and torch's classes and modules that hooks deal with."""
    found = [mmcv.runner, mmcv.runner.checkpoint, mmcv.fileio, torch]
    found += [mmcv.runner.hooks, mmcv.utils.logging, time, torch.optim]
    for module in (mmcv.runner, mmcv.runner.hooks, mmcv.fileio, torch.optim):
        found += [x for x in vars(module).values() if inspect.isclass(x)]
    found += [torch.nn.Module, torch.Tensor, mmcv.utils.Registry]
    return {
        getattr(x, '__qualname__', x.__name__): described(x) for x in found
    }


def digest(value):
    """Return a hash of a state, exact to the bit."""
    parts = [f'{k} {v.numpy().tobytes()}' for k, v in sorted(value.items())]
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()


def lines_of(folder):
    """Return the lines of all log files but for times and this folder."""
    found = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(('.log', '.json')):
            text = Path(folder, name).read_text()
            text = text.replace(os.path.abspath(folder), 'FOLDER')
            text = re.sub(r'\d{4}-\d\d-\d\d [\d:,]+', 'NOW', text)
            text = re.sub(r'(time"?: |eta: )[\d.:e-]+', r'\1-', text)
            found += [f'{name}: {line}' for line in text.splitlines()]
    return found


def main():
    """Print what there is to compare, as JSON."""
    time.sleep, sleep = lambda seconds: None, time.sleep
    found = {}
    for kind in ('EpochBasedRunner', 'IterBasedRunner'):
        with tempfile.TemporaryDirectory() as folder:
            runner = train(folder, kind)
            files = [x for x in os.listdir(folder) if x.endswith('.pth')]
            saved = torch.load(f'{folder}/{max(files)}')
            found[kind] = dict(
                weights=digest(runner.model.state_dict()),
                saved=digest(saved['state_dict']),
                keys=sorted(saved['meta']),
                files=sorted(files),
                lines=lines_of(folder),
                runner=sorted(vars(runner)),
                hooks=[sorted(vars(hook)) for hook in runner.hooks],
                optimizer=sorted(vars(runner.optimizer)),
                random=digest(dict(state=torch.get_rng_state())),
            )
    time.sleep = sleep
    found['loggers'] = list(mmcv.utils.logging.logger_initialized)
    found['root'] = [type(x).__name__ for x in logging.root.handlers]
    found['classes'] = classes()
    print(json.dumps(found))


if __name__ == '__main__':
    main()
