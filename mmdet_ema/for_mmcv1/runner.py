"""A runner of mmcv: what the lifecycle needs to know, its log, its methods."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from typing import Any, Callable, Dict, List, Optional, Set

import torch.distributed as dist
from mmcv.parallel import is_module_wrapper
from mmcv.runner import DistEvalHook, EvalHook
from mmcv.runner.checkpoint import get_state_dict
from mmcv.utils.logging import logger_initialized
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from mmdet_ema.frameworks import own_logger
from mmdet_ema.training.plan import RunFacts, batch_size_of

_LOADER = '_mmdet_ema_loader'
_MARK = '_mmdet_ema_wrapped'


class RunLog:
    """Forwards lines to the runner's logger.

    Args:
        logger: The runner's logger; None before there is a runner, for that
            of the tool that runs, which writes into a file. Defaults to None.
    """

    def __init__(self, logger: Optional[logging.Logger] = None):
        self.logger = logger

    def info(self, text: str) -> None:
        """Log a line."""
        (self.logger or _logger_of_the_tool()).info(text)

    def warning(self, text: str) -> None:
        """Log a warning."""
        (self.logger or _logger_of_the_tool()).warning(text)


def _logger_of_the_tool() -> logging.Logger:
    for name in logger_initialized:
        logger = logging.getLogger(name)
        if any(isinstance(h, logging.FileHandler) for h in logger.handlers):
            return logger
    return own_logger()


def wrap_once(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by ``around(method, *args, **kwargs)``.

    It stays a bound method, with the signature that it has. Wrapping it again
    does nothing.
    """
    method = getattr(owner, name)
    if getattr(method, _MARK, False):
        return
    bound = inspect.ismethod(method)

    @functools.wraps(method.__func__ if bound else method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args[bound:], **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(
        owner, name, types.MethodType(wrapped, owner) if bound else wrapped
    )


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


def facts_of(runner: Any) -> RunFacts:
    """Return the training run as planned."""
    by_epoch = runner.max_epochs is not None
    counts = [getattr(hook, 'cumulative_iters', 1) for hook in runner.hooks]
    loader = getattr(runner, _LOADER, None)
    loader = getattr(runner, 'data_loader', None) if loader is None else loader
    loader = getattr(loader, '_dataloader', loader)
    return RunFacts(
        iteration=runner.iter,
        max_iters=runner.max_iters or 0,
        max_epochs=runner.max_epochs if by_epoch else 1,
        by_epoch=by_epoch,
        accumulation=max(counts, default=1),
        batch_size=batch_size_of(loader),
        world_size=runner.world_size,
        validates=any(isinstance(hook, EvalHook) for hook in runner.hooks),
        agrees=any(isinstance(hook, DistEvalHook) for hook in runner.hooks),
    )


def note_loader(runner: Any, loaders: Any, workflow: Any) -> None:
    """Note which data the runner trains on, before it calls any hook."""
    pairs = zip(loaders, workflow)
    found = [loader for loader, (mode, _) in pairs if mode == 'train']
    setattr(runner, _LOADER, found[0] if found else None)


def will_evaluate(runner: Any, by_epoch: bool) -> bool:
    """Return whether all ranks evaluate after this epoch or iteration.

    mmcv's ``DistEvalHook`` does, and has collectives of its own there.
    """
    return any(
        isinstance(hook, DistEvalHook)
        and hook.by_epoch == by_epoch
        and hook._should_evaluate(runner)
        for hook in runner.hooks
    )


def tied_names(model: nn.Module) -> List[List[str]]:
    """Return the names that share one tensor, group by group."""
    groups: Dict[int, List[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def unsaved_names(model: nn.Module) -> Set[str]:
    """Return the buffers that mmcv saves and the model does not load."""
    return {*get_state_dict(model)} - {*model.state_dict()}


def broadcast_statistics(runner: Any) -> None:
    """Give all ranks the BatchNorm statistics of rank 0.

    mmcv's ``DistEvalHook`` does so before it evaluates; done while the
    averages are in the model it would miss the raw statistics.
    """
    for module in runner.model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            for statistics in (module.running_var, module.running_mean):
                assert statistics is not None
                dist.broadcast(statistics, 0)
