"""Read a runner of mmengine: what the lifecycle needs to know."""

from __future__ import annotations

import bisect
import logging
import os
import re
import sys
from types import FrameType
from typing import Any, List, Mapping, Optional, Set, Tuple

from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import (
    BaseLoop,
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    find_latest_checkpoint,
)
from torch import nn
from torch.optim import Optimizer

from mmdet_ema.averaging.fsdp1 import is_fsdp1
from mmdet_ema.averaging.shards import sharded_modules
from mmdet_ema.errors import OptionError
from mmdet_ema.for_mmengine.deepspeed_files import WHOLE
from mmdet_ema.for_mmengine.fsdp2_strategy import FSDP2Strategy
from mmdet_ema.training.patches import wrap_once
from mmdet_ema.training.plan import RunFacts, batch_size_of, doubt_switch

# the loops, and what a subclass may not change of them
_OWN_LOOPS = {
    EpochBasedTrainLoop: ('run', 'run_epoch', '_decide_current_val_interval'),
    IterBasedTrainLoop: ('run', 'run_iter', '_decide_current_val_interval'),
}


class RunLog:
    """Forwards lines to the logger of the run that is going on."""

    def info(self, text: str) -> None:
        """Log a line."""
        print_log(text, logger='current')

    def warning(self, text: str) -> None:
        """Log a warning."""
        print_log(text, logger='current', level=logging.WARNING)


def show_distance(runner: Any) -> None:
    """Let a line of the log show the distance with three digits.

    mmengine rounds to four places, and an average may be nearer than that.
    """

    def get_with_digits(get: Any, *args: Any, **kwargs: Any) -> Any:
        values, line = get(*args, **kwargs)
        distance = values.get('ema_distance')
        if distance is not None:
            shown = f'ema_distance: {distance:.3g}'
            line = re.sub(r'ema_distance: [^ ]+', shown, line)
        return values, line

    wrap_once(runner.log_processor, 'get_log_after_iter', get_with_digits)


def model_of(runner: Any) -> nn.Module:
    """Return the model without its wrappers (DDP, test-time augmentation).

    FSDP1's stays: without it nobody knows the whole parameters.
    """
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        if is_fsdp1(model):
            break
        model = model.module
    return model  # type: ignore[no-any-return]


def is_deepspeed(runner: Any) -> bool:
    """Return whether DeepSpeed steps the model and writes the files."""
    return 'DeepSpeedStrategy' in _kinds_of(runner)


def _kinds_of(runner: Any) -> Set[str]:
    kinds = type(getattr(runner, 'strategy', None)).__mro__
    return {kind.__name__ for kind in kinds}


def refuse_strategy(runner: Any) -> None:
    """Refuse what shards a model in a way that is not averaged."""
    strategy, kinds = getattr(runner, 'strategy', None), _kinds_of(runner)
    if 'ColossalAIStrategy' in kinds:
        raise OptionError(
            'strategy of type ColossalAIStrategy: EMAHook is not asked when '
            'it writes and reads files, so that no average would be saved; '
            "use strategy=dict(type='FSDP2Strategy') or DDPStrategy."
        )
    if 'DeepSpeedStrategy' in kinds:
        if not is_training(runner):
            raise OptionError(
                f'DeepSpeedStrategy evaluates no averages: test the file '
                f'{WHOLE} in the folder of a checkpoint without it, with '
                f"runner_type='Runner'."
            )
        return
    if not isinstance(runner.model, nn.Module):
        return
    found = sharded_modules(runner.model)
    by_fsdp1 = any(map(is_fsdp1, found))
    knows = by_fsdp1 and is_fsdp1(runner.model) and 'FSDPStrategy' in kinds
    if found and not knows and not isinstance(strategy, FSDP2Strategy):
        by = 'FullyShardedDataParallel' if by_fsdp1 else 'fully_shard'
        raise OptionError(
            f'the model is sharded by {by}, and '
            f'{type(strategy or runner).__name__} writes files on one rank '
            f'alone; let FlexibleRunner shard it with '
            f"strategy=dict(type='FSDP2Strategy')."
        )
    kind = str(getattr(strategy, 'state_dict_type', ''))
    if knows and 'SHARDED_STATE_DICT' in kind:
        raise OptionError(
            "state_dict_cfg with 'SHARDED_STATE_DICT' of FSDPStrategy writes "
            "a part of each tensor to each rank's file; use 'local' for files "
            "of ranks, or 'FULL_STATE_DICT' for a whole one."
        )


def optimizers_of(runner: Any) -> List[Optimizer]:
    """Return every optimizer of the run that is made by now."""
    found = []
    for wrapper in _wrappers(runner):
        optimizer = getattr(wrapper, 'optimizer', None)
        if not isinstance(optimizer, Optimizer) and is_deepspeed(runner):
            # its own calls the one that it was given
            optimizer = getattr(optimizer, 'optimizer', optimizer)
        if optimizer is not None:
            found.append(optimizer)
    return found


def _wrappers(runner: Any) -> List[Any]:
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, dict):  # a config: nothing is made yet
        return []
    return list(getattr(wrapper, 'optim_wrappers', {'': wrapper}).values())


def schedulers_of(runner: Any) -> List[Any]:
    """Return every scheduler of learning rates and momenta."""
    found = getattr(runner, 'param_schedulers', None) or []
    groups = found.values() if isinstance(found, dict) else [found]
    return [scheduler for group in groups for scheduler in group]


def facts_of(runner: Any, skips: int = 0) -> RunFacts:
    """Return the training run as planned; ``skips`` of its epoch are done."""
    counts = [getattr(w, '_accumulative_counts', 1) for w in _wrappers(runner)]
    if is_deepspeed(runner):
        counts = [runner.model.gradient_accumulation_steps()]
    loop, loader = runner.train_loop, runner.train_dataloader
    max_iters = loop.max_iters
    if counts_epochs(loop):
        # on resume with another batch size the loop's own number is wrong
        epochs = max(loop.max_epochs - runner.epoch, 0)
        max_iters = runner.iter - skips + epochs * len(loader)
    return RunFacts(
        iteration=runner.iter,
        max_iters=max_iters,
        max_epochs=loop.max_epochs,
        by_epoch=counts_epochs(loop),
        accumulation=min(counts, default=1),
        batch_size=batch_size_of(loader),
        world_size=runner.world_size,
        folder='' if runner.rank else runner.work_dir,
        validates=runner._val_loop is not None,
        agrees=_validating_loop(runner) is not None,
        doubts=doubt_switch(
            [name for name, value in runner.cfg.items() if value],
            runner.hooks,
            "Use default_hooks = dict(ema=dict(type='EMAHook')) instead.",
        ),
    )


def counts_epochs(loop: Any) -> bool:
    """Return whether a training loop counts epochs."""
    return not hasattr(loop, 'dataloader_iterator')


def has_stepped(runner: Any) -> bool:
    """Return whether no gradients wait for a step: no file holds these."""
    if is_deepspeed(runner):
        engine = runner.model
        waiting = engine.micro_steps % engine.gradient_accumulation_steps()
        return not waiting
    return all(
        wrapper.should_update()
        for wrapper in _wrappers(runner)
        if hasattr(wrapper, 'should_update')
    )


def is_training(runner: Any) -> bool:
    """Return whether the runner was told to train, not only to evaluate."""
    return isinstance(runner._train_loop, BaseLoop)


def only_evaluates(runner: Any) -> bool:
    """Return whether a validation or test was begun, and no training."""
    loops = runner._val_loop, runner._test_loop
    return not is_training(runner) and any(
        isinstance(loop, BaseLoop) for loop in loops
    )


def is_in_resume(runner: Any) -> bool:
    """Return whether ``runner.resume`` is running.

    Somebody may call it by hand, also before the runner trains, and it tells
    hooks nothing of what the file is loaded for.
    """
    frame: Optional[FrameType] = sys._getframe(1)
    while frame is not None:
        resumes = frame.f_code.co_name == 'resume'
        if resumes and frame.f_locals.get('self') is runner:
            return True
        frame = frame.f_back
    return False


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


def ends(runner: Any, by_epoch: bool) -> bool:
    """Return whether training ends with this epoch or iteration.

    One of the two: whatever the loop counts, and writes files after.
    """
    loop = runner.train_loop
    if by_epoch != counts_epochs(loop):
        return False
    if by_epoch:
        return bool(loop.epoch + 1 >= loop.max_epochs)
    return bool(loop.iter + 1 >= loop.max_iters)


def pass_forward(runner: Any, batch: Any) -> None:
    """Let the model compute its losses of a batch, and nothing else."""
    model: Any = model_of(runner)
    data = model.data_preprocessor(batch, True)
    # a wrapper of sharded parameters has to gather them
    run = getattr(runner.model, '_run_forward', model._run_forward)
    run(data, mode='loss')


def choose_by(runner: Any, metrics: Mapping[str, Any]) -> Tuple[str, bool]:
    """Return the metric that chooses the best file, and if higher is better.

    The first one where there is no ``save_best``.
    """
    first = next(iter(metrics))
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best:
            for name, rule in zip(hook.key_indicators, hook.rules):
                name = first if name == 'auto' else name
                if rule and name in metrics:
                    return name, rule == 'greater'
    return first, 'loss' not in first.lower()


def will_validate(runner: Any, by_epoch: bool) -> bool:
    """Return whether all ranks validate after this epoch or iteration."""
    own = EpochBasedTrainLoop if by_epoch else IterBasedTrainLoop
    if _validating_loop(runner) is not own:
        return False
    loop = runner.train_loop
    done = (loop.epoch if by_epoch else loop.iter) + 1
    last = loop.max_epochs if by_epoch else loop.max_iters
    # the loop looks up its interval when the epoch is over
    place = bisect.bisect(loop.dynamic_milestones, done + 1) - 1
    interval = loop.dynamic_intervals[place]
    validates = done % interval == 0 or done == last
    return bool(validates and done >= loop.val_begin)


def _validating_loop(runner: Any) -> Optional[type]:
    """Return the loop of mmengine's that validates on all ranks at once.

    None where that is not sure: a loop of the user's own may validate on one
    rank, or end an epoch on one rank before the others do (torch's ``Join``).
    """
    kind = type(runner.train_loop)
    for own, methods in _OWN_LOOPS.items():
        if issubclass(kind, own) and runner._val_loop is not None:
            same = all(getattr(kind, x) is getattr(own, x) for x in methods)
            return own if same else None
    return None
