"""A runner of mmcv: what the lifecycle needs to know, its log, its methods."""

from __future__ import annotations

import logging
import re
from typing import Any, List, Mapping, Tuple

from mmcv.parallel import is_module_wrapper
from mmcv.runner import (
    DistEvalHook,
    EpochBasedRunner,
    EvalHook,
    OptimizerHook,
)
from mmcv.utils.logging import logger_initialized
from torch import nn
from torch.optim import Optimizer

from mmdet_ema.training.plan import RunFacts, batch_size_of, doubt_switch
from mmdet_ema.training.report import own_logger


def logger_of_the_tool() -> logging.Logger:
    """Return the tool's logger, before there is a run: it has a file."""
    for name in logger_initialized:
        logger = logging.getLogger(name)
        if any(isinstance(h, logging.FileHandler) for h in logger.handlers):
            return logger
    return own_logger()


def model_of(runner: Any) -> nn.Module:
    """Return the model without its wrappers (DDP, DP)."""
    model = runner.model
    while is_module_wrapper(model):
        model = model.module
    return model  # type: ignore[no-any-return]


def optimizers_of(runner: Any) -> List[Optimizer]:
    """Return every optimizer of the run."""
    found = runner.optimizer
    return list(found.values()) if isinstance(found, dict) else [found]


def can_skip(runner: Any) -> bool:
    """Return whether an epoch can begin in its middle."""
    own = EpochBasedRunner.train
    return getattr(type(runner), 'train', None) is own


def choose_by(hook: Any, metrics: Mapping[str, Any]) -> Tuple[str, bool]:
    """Return the metric that chooses the best file, and if higher is better.

    The first one where there is no ``save_best``.
    """
    first = next(iter(metrics))
    if hook.save_best is None:
        return first, 'loss' not in first.lower()
    name = hook.key_indicator if hook.key_indicator in metrics else first
    return name, hook.rule != 'less'


def accumulation_of(hook: Any) -> int:
    """Return the iterations to one step, if the hook is to know."""
    names = ['cumulative_iters']
    if isinstance(hook, OptimizerHook):
        # DistOptimizerHook of OpenSelfSup and of the code that came with Swin
        names.append('update_interval')
    found = [getattr(hook, name, None) for name in names]
    return max([x for x in found if isinstance(x, int)], default=1)


def facts_of(runner: Any, loader: Any = None) -> RunFacts:
    """Return the run as planned; it trains on ``loader``, or what it reads."""
    by_epoch = runner.max_epochs is not None
    counts = [accumulation_of(hook) for hook in runner.hooks]
    loader = getattr(runner, 'data_loader', None) if loader is None else loader
    loader = getattr(loader, '_dataloader', loader)
    # the tools of mmdet 2 put its text there
    config = str((runner.meta or {}).get('config', ''))
    return RunFacts(
        iteration=runner.iter,
        max_iters=runner.max_iters or 0,
        max_epochs=runner.max_epochs if by_epoch else 1,
        by_epoch=by_epoch,
        accumulation=max(counts, default=1),
        batch_size=batch_size_of(loader),
        world_size=runner.world_size,
        folder='' if runner.rank else runner.work_dir or '',
        validates=any(isinstance(hook, EvalHook) for hook in runner.hooks),
        agrees=any(isinstance(hook, DistEvalHook) for hook in runner.hooks),
        doubts=doubt_switch(
            re.findall(r'^(\w+) *=(?! *(?:0|None)$)', config, re.MULTILINE),
            runner.hooks,
            'Write its hooks and EMAHook into one list.',
        ),
    )
