"""Read a runner of mmengine: what the lifecycle needs to know."""

from __future__ import annotations

import bisect
import os
from typing import Any, List, Optional

from mmengine.hooks import EMAHook as MMEngineEMAHook
from mmengine.hooks import LoggerHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import (
    BaseLoop,
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    find_latest_checkpoint,
)
from torch import nn
from torch.optim import Optimizer

from mmdet_ema.errors import OptionError
from mmdet_ema.training.facts import RunFacts

# the loops, and what a subclass may not change of them
_OWN_LOOPS = {
    EpochBasedTrainLoop: ('run', 'run_epoch', '_decide_current_val_interval'),
    IterBasedTrainLoop: ('run', 'run_iter', '_decide_current_val_interval'),
}


def model_of(runner: Any) -> nn.Module:
    """Return the model without its wrappers (DDP, test-time augmentation)."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model  # type: ignore[no-any-return]


def optimizers_of(runner: Any) -> List[Optimizer]:
    """Return every optimizer of the run."""
    found = [getattr(w, 'optimizer', None) for w in _wrappers(runner)]
    return [optimizer for optimizer in found if optimizer is not None]


def made_optimizers_of(runner: Any) -> List[Optimizer]:
    """Return the optimizers that are made by now; the others are configs."""
    wrapper = runner.optim_wrapper
    made = hasattr(wrapper, 'update_params') or hasattr(
        wrapper, 'optim_wrappers'
    )
    return optimizers_of(runner) if made else []


def facts_of(runner: Any) -> RunFacts:
    """Return the training run as planned."""
    counts = [getattr(w, '_accumulative_counts', 1) for w in _wrappers(runner)]
    loop = runner.train_loop
    by_epoch = not hasattr(loop, 'dataloader_iterator')
    max_iters = loop.max_iters
    if by_epoch:
        # on resume with another batch size the loop's own number is wrong
        epochs = max(loop.max_epochs - runner.epoch, 0)
        max_iters = runner.iter + epochs * len(runner.train_dataloader)
    return RunFacts(
        iteration=runner.iter,
        max_iters=max_iters,
        max_epochs=loop.max_epochs,
        by_epoch=by_epoch,
        accumulation=min(counts, default=1),
        batch_size=_batch_size(runner.train_dataloader),
        world_size=runner.world_size,
        validates=runner._val_loop is not None,
        agrees=validates_together(runner),
    )


def is_training(runner: Any) -> bool:
    """Return whether the runner was told to train, not only to evaluate."""
    return isinstance(runner._train_loop, BaseLoop)


def evaluation_loops(runner: Any) -> List[BaseLoop]:
    """Return the validation and test loops that are built by now."""
    loops = (runner._val_loop, runner._test_loop)
    return [loop for loop in loops if isinstance(loop, BaseLoop)]


def local_checkpoint(runner: Any) -> Optional[str]:
    """Return the local file that will be loaded; None if there is none."""
    path = runner._load_from
    if isinstance(runner._resume, str):
        path = runner._resume
    if path is None and runner._resume and is_training(runner):
        path = find_latest_checkpoint(runner.work_dir)
    if not isinstance(path, str) or '://' in path:
        return None
    return os.path.expanduser(path)


def will_log(runner: Any, hook: Any, batch_idx: int) -> bool:
    """Return whether the runner's logger logs this training iteration.

    Args:
        runner: The runner.
        hook: A hook, for its counting helpers.
        batch_idx: Index of the batch in the epoch.
    """
    for logger in runner.hooks:
        if isinstance(logger, LoggerHook):
            if hook.every_n_inner_iters(batch_idx, logger.interval):
                return True
            last = hook.end_of_epoch(runner.train_dataloader, batch_idx)
            short = len(runner.train_dataloader) <= logger.interval
            return bool(last and (not logger.ignore_last or short))
    return bool(hook.every_n_inner_iters(batch_idx, 10))


def validates_together(runner: Any, kind: Any = BaseLoop) -> bool:
    """Return whether validations are sure to be run on all ranks at once.

    That is known of mmengine's own training loops alone: one of the user's
    own may validate on one rank, or end an epoch on one rank before the
    others do (torch's ``Join``).

    Args:
        runner: The runner.
        kind: The loop that is meant. Defaults to any.
    """
    loop = runner.train_loop
    owns = any(
        isinstance(loop, own)
        and issubclass(own, kind)
        and all(getattr(type(loop), x) is getattr(own, x) for x in methods)
        for own, methods in _OWN_LOOPS.items()
    )
    return owns and runner._val_loop is not None


def will_validate(runner: Any, by_epoch: bool) -> bool:
    """Return whether all ranks validate after this epoch or iteration.

    Args:
        runner: The runner.
        by_epoch: Whether an epoch ends; else an iteration.
    """
    kind = EpochBasedTrainLoop if by_epoch else IterBasedTrainLoop
    if not validates_together(runner, kind):
        return False
    loop = runner.train_loop
    done = (loop.epoch if by_epoch else loop.iter) + 1
    last = loop.max_epochs if by_epoch else loop.max_iters
    # the loop looks up its interval when the epoch is over
    place = bisect.bisect(loop.dynamic_milestones, done + 1) - 1
    interval = loop.dynamic_intervals[place]
    validates = done % interval == 0 or done == last
    return bool(validates and done >= loop.val_begin)


def refuse_second(runner: Any, ours: Any) -> None:
    """Refuse a run with two EMA hooks.

    Args:
        runner: The runner.
        ours: The class of our hook.

    Raises:
        OptionError: If there are two; both are named.
    """
    found = [h for h in runner.hooks if isinstance(h, (ours, MMEngineEMAHook))]
    if len(found) > 1:
        names = ' and '.join(_describe(hook) for hook in found)
        raise OptionError(
            f'there are {len(found)} EMA hooks: {names}. They would average '
            f"each other's weights; keep one in custom_hooks."
        )


def _describe(hook: Any) -> str:
    kind = type(hook)
    return f'{kind.__module__}.{kind.__name__} (priority={hook.priority!r})'


def _wrappers(runner: Any) -> List[Any]:
    wrapper = runner.optim_wrapper
    many = hasattr(wrapper, 'optim_wrappers')
    return list(wrapper.values()) if many else [wrapper]


def _batch_size(dataloader: Any) -> int:
    size = getattr(dataloader, 'batch_size', None)
    if size is None:
        sampler = getattr(dataloader, 'batch_sampler', None)
        size = getattr(sampler, 'batch_size', None)
    return int(size or 1)
