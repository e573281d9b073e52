"""Read a runner of mmcv: what the lifecycle needs to know."""

from __future__ import annotations

from typing import Any, Dict, List, Set

import torch.distributed as dist
from mmcv.parallel import is_module_wrapper
from mmcv.runner import DistEvalHook, EvalHook, OptimizerHook
from mmcv.runner.checkpoint import get_state_dict
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from mmdet_ema.errors import OptionError
from mmdet_ema.training.facts import RunFacts

_LOADER = '_mmdet_ema_loader'
_OTHERS = ('EMAHook', 'BaseEMAHook', 'MEGVIIEMAHook')


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
    return RunFacts(
        iteration=runner.iter,
        max_iters=runner.max_iters or 0,
        max_epochs=runner.max_epochs if by_epoch else 1,
        by_epoch=by_epoch,
        accumulation=max(counts, default=1),
        batch_size=_batch_size(runner),
        world_size=runner.world_size,
        validates=any(isinstance(hook, EvalHook) for hook in runner.hooks),
        agrees=any(isinstance(hook, DistEvalHook) for hook in runner.hooks),
    )


def will_evaluate(runner: Any, by_epoch: bool) -> bool:
    """Return whether all ranks evaluate after this epoch or iteration.

    mmcv's ``DistEvalHook`` does, and has collectives of its own there.

    Args:
        runner: The runner.
        by_epoch: Whether an epoch ends; else an iteration.
    """
    return any(
        isinstance(hook, DistEvalHook)
        and hook.by_epoch == by_epoch
        and hook._should_evaluate(runner)
        for hook in runner.hooks
    )


def has_optimizer_hook(runner: Any) -> bool:
    """Return whether one of mmcv's hooks calls the optimizer."""
    return any(isinstance(hook, OptimizerHook) for hook in runner.hooks)


def tied_names(model: nn.Module) -> List[List[str]]:
    """Return the names that share one tensor, group by group."""
    groups: Dict[int, List[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def unsaved_names(model: nn.Module) -> Set[str]:
    """Return the buffers that mmcv saves and the model does not load."""
    return {*get_state_dict(model)} - {*model.state_dict()}


def refuse_second(runner: Any) -> None:
    """Refuse a run with two EMA hooks.

    Args:
        runner: The runner.

    Raises:
        OptionError: If there are two, ours or not; all are named.
    """
    found = [hook for hook in runner.hooks if _is_ema(hook)]
    if len(found) > 1:
        names = ' and '.join(_describe(hook) for hook in found)
        raise OptionError(
            f'there are {len(found)} EMA hooks: {names}. They would average '
            f"each other's weights; keep one in custom_hooks."
        )


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


def _is_ema(hook: Any) -> bool:
    return any(kind.__name__ in _OTHERS for kind in type(hook).__mro__)


def _describe(hook: Any) -> str:
    kind = type(hook)
    return f'{kind.__module__}.{kind.__name__} (priority={hook.priority!r})'


def note_loader(runner: Any, loaders: Any, workflow: Any) -> None:
    """Note which data the runner trains on, before it calls any hook.

    Args:
        runner: The runner.
        loaders: Its data loaders.
        workflow: What is done with each, as ``('train', 1)``.
    """
    pairs = zip(loaders, workflow)
    found = [loader for loader, (mode, _) in pairs if mode == 'train']
    setattr(runner, _LOADER, found[0] if found else None)


def _batch_size(runner: Any) -> int:
    loader = getattr(runner, _LOADER, None)
    loader = getattr(runner, 'data_loader', None) if loader is None else loader
    loader = getattr(loader, '_dataloader', loader)
    size = getattr(loader, 'batch_size', None)
    if size is None:
        sampler = getattr(loader, 'batch_sampler', None)
        size = getattr(sampler, 'batch_size', None)
    return int(size or 1)
