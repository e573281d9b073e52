"""Train without an EMA hook and print all that an import could change.

Usage: python -m tests.contract.import_program FOLDER STATEMENT HOOKS
where STATEMENT is run first, and HOOKS are the run's, in JSON. Nothing of
the package is imported but by the statement.
"""

import json
import logging
import random
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.conftest import MMCV1

if MMCV1:
    from mmcv.runner import HOOKS, BaseModule, EvalHook, build_runner
    from mmcv.runner.optimizer import OPTIMIZER_BUILDERS as CONSTRUCTORS
    from mmcv.utils import get_logger
    from mmcv.utils.logging import logger_initialized

    LOGGERS = logger_initialized
else:
    from mmengine.evaluator import BaseMetric, Evaluator
    from mmengine.logging import MMLogger
    from mmengine.model import BaseModel as BaseModule
    from mmengine.optim import OptimWrapper
    from mmengine.registry import HOOKS
    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as CONSTRUCTORS
    from mmengine.runner import Runner

    LOGGERS = MMLogger._instance_dict


def attributes():
    """The identities of all that the frameworks' modules and classes have."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition('.')[0] in ('mmcv', 'mmengine', 'torch', 'time'):
            for key, value in list(vars(module or object).items()):
                found[f'{name}:{key}'] = id(value)
                if isinstance(value, type):
                    for part, inner in list(vars(value).items()):
                        found[f'{name}:{key}.{part}'] = id(inner)
    return found


def registered():
    registries = (HOOKS._module_dict, CONSTRUCTORS._module_dict, vars(HOOKS))
    return [{k: id(x) for k, x in found.items()} for found in registries]


class Data(list):
    """Samples, which mmcv's hook asks for the score."""

    def evaluate(self, results, logger=None):
        return dict(score=sum(results))


class Toy(BaseModule):
    def __init__(self):
        super().__init__(init_cfg=dict(type='Kaiming', layer='Linear'))
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))

    def forward(self, inputs, mode='loss'):
        out = self.body(inputs)
        if mode == 'loss':
            return dict(loss=out.square().mean())
        return out.sum(1).tolist()


class ToyOfMmcv(Toy):
    def train_step(self, data, optimizer=None, **kwargs):
        loss = self(**data)['loss']
        return dict(loss=loss, log_vars=dict(a=float(loss)), num_samples=4)

    val_step = train_step


def loader():
    data = Data(dict(inputs=torch.randn(4)) for _ in range(16))
    return DataLoader(data, 4, shuffle=True)


def train_with_mmcv(folder, hooks):
    model = ToyOfMmcv()
    logger = get_logger('toy', log_file=f'{folder}/run.log')
    model.init_weights()
    runner = build_runner(
        dict(type='EpochBasedRunner', max_epochs=2),
        default_args=dict(
            model=model,
            optimizer=torch.optim.SGD(
                model.parameters(), lr=0.1, momentum=0.9
            ),
            work_dir=folder,
            logger=logger,
            meta={},
        ),
    )
    runner.timestamp = 'run'
    runner.register_training_hooks(
        dict(policy='step', step=[1]),
        dict(grad_clip=None),
        dict(interval=1),
        dict(interval=1, hooks=[dict(type='TextLoggerHook')]),
        custom_hooks_config=hooks,
    )
    evaluation = EvalHook(
        loader(),
        save_best='score',
        rule='greater',
        test_fn=lambda model, loader: [
            score for data in loader for score in model(**data, mode='')
        ],
    )
    runner.register_hook(evaluation, priority='LOW')
    data = loader()
    runner.run([data, data], [('train', 1), ('val', 1)])
    return runner, runner.optimizer


def train_with_mmengine(folder, hooks):
    class Score(BaseMetric):
        def process(self, data_batch, data_samples):
            self.results += data_samples

        def compute_metrics(self, results):
            return dict(score=sum(results))

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
            checkpoint=dict(
                type='CheckpointHook', save_best='score', rule='greater'
            ),
        ),
        custom_hooks=hooks,
        randomness=dict(seed=0),
        experiment_name='toy',
    )
    runner.train()
    return runner, runner.train_loop, runner.val_loop, optimizer


def main(folder, statement, hooks):
    """Print what there is to compare, as JSON."""
    before, names = attributes(), registered()
    exec(statement)
    after = attributes()
    found = dict(
        changed=[key for key in before if after.get(key) != before[key]],
        entries=[
            sorted(key for key in new if old.get(key) != new[key])
            for old, new in zip(names, registered())
        ],
        loggers=list(LOGGERS),
        root=[type(x).__name__ for x in logging.root.handlers],
    )
    time.sleep = lambda seconds: None  # mmcv sleeps, against deadlocks
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    train = train_with_mmcv if MMCV1 else train_with_mmengine
    runner, *others = train(folder, json.loads(hooks))
    found['own'] = [
        f'{type(x).__name__}.{key}'
        for x in (runner, runner.model, *runner.hooks, *others)
        for key in vars(x)
    ]
    found['random'] = torch.get_rng_state().tolist()
    print(json.dumps(found))


if __name__ == '__main__':
    main(*sys.argv[1:])
