"""``EMAHook`` for mmengine's runners: forwards to the lifecycle."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
from typing import Any, Dict, Iterator, Optional, Tuple

from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.hooks import EMAHook as MMEngineEMAHook
from mmengine.model import BaseAveragedModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmdet_ema.averaging.fsdp1 import is_fsdp1
from mmdet_ema.averaging.state import read_count
from mmdet_ema.checkpoint.files import read_structure
from mmdet_ema.checkpoint.folder import readable
from mmdet_ema.errors import CheckpointError, OptionError, show
from mmdet_ema.for_mmengine import (
    checkpoints,
    deepspeed_files,
    evaluation,
    fsdp1,
)
from mmdet_ema.for_mmengine import runner as runners
from mmdet_ema.schedules import Schedule
from mmdet_ema.training.compatible import is_family
from mmdet_ema.training.lifecycle import EMALifecycle
from mmdet_ema.training.options import (
    NAMES,
    Choice,
    parse_options,
    show_options,
)
from mmdet_ema.training.plan import refuse_second
from mmdet_ema.training.recalibrate import recalibrate
from mmdet_ema.training.sigterm import EPOCH_SAMPLES, Sigterm


class EMAHook(Hook):  # type: ignore[misc]
    """Exponential moving average of the weights, during training.

    Validation, test and the ``state_dict`` of checkpoints use the averages;
    training goes on from the raw weights, which are in the checkpoint too.
    Update n is ``avg = d * avg + (1 - d) * raw`` with, by default,
    ``d = decay * (1 - exp(-n / tau))`` (YOLOv5's ramp).

    Args:
        decay (float | str): Weight of the old average at the end of the ramp,
            in [0, 1), or 'auto': a window of a tenth of the planned steps
            (also of those of a resume), ``tau`` half of it. Defaults to
            0.9999.
        tau (float): Constant of the ramp in updates. Defaults to 2000.
        schedule (str | dict | Callable): Name, ``dict(type=name, **options)``
            or callable n -> decay. Defaults to 'exponential'.
        interval (int): Optimizer steps between updates; the averaging window
            does not change with it. Defaults to 1.
        begin_iter (int): First iteration averaged, from 1. Defaults to 0.
        begin_epoch (int): First epoch averaged, from 1. Defaults to 0.
        update_buffers (bool): Average float buffers, or copy them. Defaults
            to True, or to False with one of the compatible options.
        device (str, optional): 'cpu' for averages in host memory. Defaults to
            None, where the parameters are.
        overlap (bool): Update on a side stream of the GPU, in parallel with
            the next pass; only the optimizer may change parameters then.
            Defaults to False.
        evaluate (str | Sequence[str]): Weights to validate and test: 'ema',
            'raw', the name of an average, a list of these, 'both' (ema and
            raw) or 'all'. A pass each; the deployed ones have the plain
            metrics, others ``<metric>_<set>``. ``save_best`` and ``monitor``
            take either. Every file holds all averages: the best one of
            ``coco/bbox_mAP_fast`` tests to it with ``evaluate='fast'``.
            Defaults to 'ema'.
        nonfinite (str): 'skip' a step that leaves NaN or Inf in a parameter,
            'raise', or 'ignore'; a buffer's average stays. Defaults to 'skip'.
        strict_load (bool): Refuse a resume where an average is missing.
            Defaults to False.
        scale_decay (bool): After a resume with another batch or world size,
            use ``decay ** kappa``: the same window in samples. Defaults to
            False.
        copied (Sequence[str]): Names (``'*.queue'``) of tensors to copy, as
            integers, masks and the like are anyway. Defaults to ().
        enabled (bool): False: put the raw weights back on resume, then do
            nothing. Defaults to True.
        averages (dict): Further averages by name, each a dict of schedule
            options and ``device``: ``dict(fast=dict(decay=0.999, tau=500))``.
            Defaults to none.
        posthoc (bool): Add the averages 'posthoc', in host memory, with a
            tenth of the main window, and keep the starting weights in the
            work folder as ``ema_start.pt`` (``ema_start_epoch_N.pt`` after
            a restart): averages with other windows can be made of these
            after the training. Defaults to False.
        deploy (str): Name of the averages in the ``state_dict`` of files.
            Defaults to 'ema', the main ones.
        restart_epochs (Sequence[int]): Epochs, counted from 1, that the
            averages start again before, from the raw weights. Defaults to ().
        recalibrate (int): Batches of training data that the BatchNorm
            statistics of the deployed averages are estimated from again at
            the end; the log compares both, and the better ones are kept.
            Defaults to 0, not at all.
        safe_save (bool): Bring each checkpoint to the disk and move it into
            place when it is whole; only then ``last_checkpoint`` names it and
            an old one is removed. Defaults to True.
        save_on_sigterm (bool): After SIGTERM write a checkpoint at the end of
            the step, and exit with status 143; ``--resume`` goes on there, in
            the middle of an epoch too. Defaults to False.
        verify_ranks (bool): Before each evaluation of all ranks, compare
            their weights and averages by checksums; stop with the name of the
            first one that differs. Defaults to False.
        ema_type (str, optional): Compatible option: name of an averaging
            class, for its numbers and mmengine's defaults.
        momentum (float, optional): Compatible option: ``1 - decay``.
        gamma (float, optional): Compatible option: constant of the ramp of
            ``ExpMomentumEMA`` or ``MomentumAnnealingEMA``.
        evaluate_on_ema (bool, optional): Compatible option: mmpretrain's word
            for ``evaluate``; False is 'raw'.
        evaluate_on_origin (bool, optional): Compatible option: True is
            'both', where the averages are evaluated too.
        **more: Options of a ``BaseAveragedModel`` of your own, if
            ``ema_type`` names one.

    Raises:
        OptionError: If an option is unknown, out of range or contradicts
            another one (a ``ValueError``).

    Example:
        >>> custom_imports = dict(imports=['mmdet_ema'])
        >>> custom_hooks = [dict(type='EMAHook', decay=0.9998, tau=2000)]
    """

    priority = 'NORMAL'

    def __init__(self, **options: Any):
        self.priority = options.pop('priority', self.priority)
        choice, options = _rule_of_ones_own(options)
        checked = parse_options(choice, **options)
        self.enabled, self._options = checked.enabled, checked
        self._log = runners.RunLog()
        self._life = EMALifecycle(checked, self._log)
        self._model: Any = None  # unwrapped
        self._wrapped: Any = None  # as it was when that was found
        self._logger: Optional[LoggerHook] = None
        self._configs: Dict[str, str] = {}
        # the set of weights of the pass that is going on
        self._weights: Optional[str] = None
        self._evaluates = self._trained = False
        self._sigterm: Optional[Sigterm] = None
        if checked.save_on_sigterm:
            self._sigterm = Sigterm(self._log)
        self._epoch_samples = 0  # of the resumed file

    show_options(__init__)

    def before_run(self, runner: Any) -> None:
        """Check what can be checked before anything is loaded or changed."""
        kinds = (EMAHook, MMEngineEMAHook)
        refuse_second(
            [x for x in runner.hooks if isinstance(x, kinds)],
            runner.cfg.get('custom_hooks'),
        )
        # whoever uses torch's safe_globals() takes ours away when leaving it
        checkpoints.allow_framework_types()
        by_deepspeed = runners.is_deepspeed(runner)
        if not by_deepspeed:
            self._check_file(runner)
        self._model = runners.model_of(runner)
        if is_fsdp1(self._model):
            fsdp1.prepare(runner)
        if self.enabled:
            runners.refuse_strategy(runner)
            if by_deepspeed:
                self._join_deepspeed(runner)
            evaluation.watch_loops(runner, self._life.passes, self._evaluating)
            if runners.is_training(runner):
                if self._options.recalibrate:
                    self._check_order(runner)
                evaluation.check_monitored(runner, self._options, self._log)

    def _join_deepspeed(self, runner: Any) -> None:
        """Write and read what its strategy does not ask hooks for."""
        if deepspeed_files.is_watched(runner.strategy):
            return
        deepspeed_files.watch_saves(
            runner.strategy, self._model, self._life.raw_weights
        )
        # the strategy has loaded its part by now
        folder = runners.local_checkpoint(runner)
        if folder is None:
            return
        resumes = bool(runner._resume)
        checkpoint = deepspeed_files.read_whole(
            folder, runner.iter if resumes else None
        )
        if checkpoint is not None and resumes:
            checkpoint['optimizer'] = {}  # is in files of DeepSpeed's own
            self.after_load_checkpoint(runner, checkpoint)
        elif self._options.strict_load and resumes:
            raise CheckpointError(
                f'strict_load=True, but {folder!r} has no file '
                f'{deepspeed_files.WHOLE} with averages. With '
                f'strict_load=False they start from the weights.'
            )
        else:
            self._log.warning(
                f'EMA: the averages start anew (n = 0) from the raw weights '
                f'that DeepSpeed has loaded from {folder!r}.'
            )

    def _check_file(self, runner: Any) -> None:
        """Look into the local file that will be loaded, if any."""
        path = runners.local_checkpoint(runner)
        if path is None or os.path.isdir(path):
            return  # a folder is one of ranks, which each read their file
        if not (runner._resume and runners.is_training(runner)):
            read_structure(path)
            return
        chosen = runner._load_from is not None or runner._resume is not True
        newest = readable(path, runner.work_dir, chosen, self._log)
        if newest != path:
            runner._load_from = newest

    def before_train(self, runner: Any) -> None:
        """Get ready; every weight is initialised and loaded by now."""
        if not self.enabled:
            return
        self._trained = False
        self._model = runners.model_of(runner)
        optimizers = runners.optimizers_of(runner)
        skips, samples, self._epoch_samples = 0, self._epoch_samples, 0
        if samples or self._sigterm:
            skips = checkpoints.watch_iterations(
                runner, self._sigterm, samples, self._log
            )
        facts = runners.facts_of(runner, skips)
        self._life.start(self._model, facts, optimizers)
        loggers = [x for x in runner.hooks if isinstance(x, LoggerHook)]
        self._logger = loggers[0] if loggers else None
        runners.show_distance(runner)
        if self._options.safe_save:
            checkpoints.tidy(runner, self._log)

    def before_train_epoch(self, runner: Any) -> None:
        """Follow tensors that were replaced."""
        if self.enabled:
            if self._options.safe_save:
                checkpoints.save_safely(runner)
            self._life.before_epoch()

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Start the average if its time has come."""
        if not self.enabled:
            return
        # another wrapper or optimizer may have taken the place of the last
        self._life.before_iteration(
            self._present_model(runner),
            runner.iter,
            runner.epoch,
            runners.optimizers_of(runner),
        )

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Update the average if the weights changed."""
        if not self.enabled:
            return
        self._life.after_iteration()
        many = runner.world_size > 1
        if many and runners.will_validate(runner, by_epoch=False):
            self._life.synchronize()
        if self._options.recalibrate and runners.ends(runner, by_epoch=False):
            self._recalibrate(runner)
        # the distance costs a reading of the weights: only where it is logged
        logger, loader = self._logger, runner.train_dataloader
        interval = logger.interval if logger else 10
        if self.every_n_inner_iters(batch_idx, interval) or (
            logger and self.end_of_epoch(loader, batch_idx)
        ):
            for name, value in self._life.scalars().items():
                runner.message_hub.update_scalar(f'train/{name}', value)

    def after_train_epoch(self, runner: Any) -> None:
        """Make buffers equal on all ranks, if all validate next.

        Here, not at the validation: a file that is written first is to hold
        what is evaluated.
        """
        if runners.will_validate(runner, by_epoch=True):
            self._life.synchronize()
        self._life.tell_steps()
        if self._options.recalibrate and runners.ends(runner, by_epoch=True):
            self._recalibrate(runner)

    def _check_order(self, runner: Any) -> None:
        hooks = list(runner.hooks)
        before = hooks[: hooks.index(self)]
        if any(isinstance(x, CheckpointHook) for x in before):
            count = self._options.recalibrate
            raise OptionError(
                f'recalibrate={count} with priority={show(self.priority)}: '
                f'CheckpointHook would write the last file before; leave '
                f'priority out.'
            )

    def _recalibrate(self, runner: Any) -> None:
        """Estimate statistics again, before the last file is written."""
        options, model = self._options, self._model
        averager = self._life.begin_recalibration(model)
        if averager is not None:
            recalibrate(
                averager,
                options,
                model,
                runner.train_dataloader,
                functools.partial(runners.pass_forward, runner),
                lambda: evaluation.evaluate_apart(
                    runner, self._evaluating(options.deploy), 'recalibrate'
                ),
                functools.partial(runners.choose_by, runner),
                self._log,
            )

    def after_train(self, runner: Any) -> None:
        """Stop listening to the optimizers."""
        self._life.after_iteration()
        self._life.finish()
        if self._sigterm:
            self._sigterm.ignore()
        self._trained = True

    def before_val_epoch(self, runner: Any) -> None:
        """Put the averages into the model."""
        if self.enabled and not self._evaluates:
            model = self._present_model(runner)
            # which makes the averages of a file that was resumed
            self._life.enter_evaluation(model, self._weights)
            self._evaluates = True
            self._life.tell_evaluation(self._weights)

    before_test_epoch = before_val_epoch

    def before_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Put the averages in where a loop did not say that it begins."""
        self.before_val_epoch(runner)

    before_test_iter = before_val_iter

    def after_val_epoch(
        self, runner: Any, metrics: Optional[Dict[str, float]] = None
    ) -> None:
        """Put the raw weights back."""
        self._evaluates = False
        self._life.leave_evaluation()
        # of all passes, in the last one
        self._life.tell_metrics(metrics or {})

    after_test_epoch = after_val_epoch

    @contextlib.contextmanager
    def _evaluating(self, weights: str) -> Iterator[None]:
        """Let the body evaluate a set of weights."""
        before, self._weights = self._weights, weights
        try:
            yield
        finally:
            self._evaluates, self._weights = False, before
            self._life.leave_evaluation()

    def before_save_checkpoint(self, runner: Any, checkpoint: Any) -> None:
        """Put the averages into ``state_dict``, the raw weights next to it."""
        checkpoints.deploy_config(checkpoint, runner.cfg, self._configs)
        if is_fsdp1(self._model):
            fsdp1.finish(self._model, checkpoint)
        if not self.enabled:
            return
        self._life.follow(self._present_model(runner))
        if runner.model is not self._model:
            model = runners.model_of(runner)
            checkpoints.strip_wrapper(checkpoint, model)
        self._life.save(checkpoint)
        checkpoints.make_plain(checkpoint, self._log)

    def _present_model(self, runner: Any) -> Any:
        """Return the model; a hook may have put another one in its place."""
        if runner.model is not self._wrapped:
            self._wrapped = runner.model
            model = runners.model_of(runner)
            # else it is the same in a wrapper that changes names, of compile
            if not any(x is self._model for x in model.modules()):
                self._model = model
        return self._model

    def after_load_checkpoint(self, runner: Any, checkpoint: Any) -> None:
        """Sort out which weights of the checkpoint go where."""
        if self.enabled and self._model is None:
            runners.refuse_strategy(runner)  # loads before the run begins
        checkpoints.unmake(checkpoint)
        self._model = model = runners.model_of(runner)
        optimizers = runners.optimizers_of(runner)
        if is_fsdp1(model):
            fsdp1.prepare(runner)
            path = runners.local_checkpoint(runner)
            fsdp1.begin(model, checkpoint, optimizers, path)
            optimizers = []  # theirs are not the names of a file
        resumes = runners.is_in_resume(runner)
        trains = runners.is_training(runner) and not self._trained
        if not (trains or resumes):
            self._life.choose(checkpoint, model)
        elif runner._resume or resumes:
            checkpoints.refuse_foreign(checkpoint, self._log)
            if runners.is_deepspeed(runner):
                optimizers = []  # has their states in files of its own
            evaluates = runners.only_evaluates(runner)
            self._life.resume(checkpoint, model, optimizers, evaluates)
            meta = checkpoint['meta']
            self._epoch_samples = read_count(meta, EPOCH_SAMPLES, 0)
        else:
            self._life.fine_tune(checkpoint, model)


def _rule_of_ones_own(
    given: Dict[str, Any],
) -> Tuple[Optional[Choice], Dict[str, Any]]:
    """Return the rule of a user's averaging class, and our own options.

    Its ``avg_func`` is called for each tensor; the class never sees the
    model, so that nothing is deep-copied.
    """
    ema_type = given.get('ema_type')
    kind: Any = ema_type
    if isinstance(ema_type, str):
        with MODELS.switch_scope_and_registry(None) as registry:
            kind = registry.get(ema_type)
    own = inspect.isclass(kind) and issubclass(kind, BaseAveragedModel)
    if not own or is_family(ema_type):
        return None, given
    if kind.update_parameters is not BaseAveragedModel.update_parameters:
        raise OptionError(
            f'ema_type={show(ema_type)} overrides update_parameters; only an '
            f'avg_func can be used. Move what it does there.'
        )
    ours = {k: x for k, x in given.items() if k in NAMES}
    theirs = {k: x for k, x in given.items() if k not in NAMES}
    for name in ('gamma', 'interval', 'momentum'):
        if given.get(name) is not None:
            theirs[name] = given[name]
    instance = kind(nn.Identity(), **theirs)

    def rule(average: Tensor, raw: Tensor, step: int) -> None:
        if step == 1:
            average.copy_(raw)
        else:
            instance.steps.fill_(step - 1)
            instance.avg_func(average, raw, instance.steps)

    schedule = Schedule(kind.__name__, lambda n: math.nan)  # it has no decay
    return Choice(lambda planned: schedule, 1, (), rule), ours
