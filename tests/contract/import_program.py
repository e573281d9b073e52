"""Train without an EMA hook and print all that an import could change.

Usage: WITHOUT_EMA=1 python -m tests.contract.import_program FOLDER STATEMENT
HOOKS, where STATEMENT is run first, and HOOKS are the run's, in JSON. Nothing
of the package is imported but by the statement.
"""

import json
import logging
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

from tests.conftest import MMCV1
from tests.contract.test_evaluation import Draws
from tests.contract.toy import Run

if MMCV1:
    from mmcv.runner import HOOKS
    from mmcv.runner.optimizer import OPTIMIZER_BUILDERS as CONSTRUCTORS
    from mmcv.utils.logging import logger_initialized

    LOGGERS = logger_initialized
    OPTIONS = dict(
        lr=dict(policy='step', step=[1]),
        log=dict(interval=1, hooks=[dict(type='TextLoggerHook')]),
        workflow=[('train', 1), ('val', 1)],
    )
else:
    from mmengine.logging import MMLogger
    from mmengine.registry import HOOKS
    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as CONSTRUCTORS

    LOGGERS = MMLogger._instance_dict
    OPTIONS = dict(
        param_scheduler=dict(type='LinearLR', start_factor=0.1, end=8),
        randomness=dict(seed=0),
        experiment_name='toy',
    )


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


def main(folder, statement, hooks):
    """Print what there is to compare, as JSON."""
    assert 'mmdet_ema' not in sys.modules
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
    hooks = json.loads(hooks)
    run = Run(Path(folder), *hooks, model=Draws(), best='score', **OPTIONS)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    runner = run.train().toy.runner
    owners = [runner, runner.model, run.toy.optimizer, *runner.hooks]
    owners += [getattr(runner, x, run) for x in ('train_loop', 'val_loop')]
    found['own'] = [
        f'{type(x).__name__}.{key}' for x in owners for key in vars(x)
    ]
    found['random'] = torch.get_rng_state().tolist()
    found['log'] = run.log
    print(json.dumps(found))


if __name__ == '__main__':
    main(*sys.argv[1:])
