"""``EMAHook`` for mmengine's runners: forwards to the lifecycle."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, Optional, Sequence, Union

import torch
from mmengine.hooks import Hook

from mmdet_ema.checkpoint.files import read_structure
from mmdet_ema.checks import check_flag
from mmdet_ema.for_mmengine import runner_facts
from mmdet_ema.for_mmengine.evaluation import (
    check_monitored,
    forget_results,
    run_passes,
)
from mmdet_ema.for_mmengine.plain_checkpoint import (
    make_plain,
    refuse_foreign,
    strip_wrapper,
    unmake,
)
from mmdet_ema.for_mmengine.run_log import RunLog
from mmdet_ema.for_mmengine.safe_globals import allow_framework_types
from mmdet_ema.for_mmengine.saving import keep_files_whole
from mmdet_ema.for_mmengine.user_classes import find_rule
from mmdet_ema.optimizers.nominal import scale_weight_decay
from mmdet_ema.schedules import ScheduleSpec
from mmdet_ema.training.lifecycle import EMALifecycle
from mmdet_ema.training.loop_guard import guard_loop
from mmdet_ema.training.options import parse_options


class EMAHook(Hook):  # type: ignore[misc]
    """Exponential moving average of the weights, during training.

    Validation, test and the ``state_dict`` of checkpoints use the averages;
    training goes on from the raw weights, which are in the checkpoint too.
    Update n is ``avg = d * avg + (1 - d) * raw`` with, by default,
    ``d = decay * (1 - exp(-n / tau))`` (YOLOv5's ramp).

    Args:
        decay (float): Weight of the old average at the end of the ramp, in
            [0, 1). Defaults to 0.9999.
        tau (float): Constant of the ramp in updates. Defaults to 2000.
        schedule (str | dict | Callable): Name, ``dict(type=name, **options)``
            or callable n -> decay. Defaults to 'exponential'.
        interval (int): Optimizer steps between updates; the averaging window
            does not change with it. Defaults to 1.
        begin_iter (int): First iteration that is averaged, counted from 1.
            Defaults to 0, from the start.
        begin_epoch (int): First epoch that is averaged, counted from 1.
            Defaults to 0, from the start.
        update_buffers (bool): Whether float buffers (BatchNorm statistics)
            are averaged; else copied. Defaults to True, or False where one of
            OpenMMLab's words is given.
        device (str, optional): Where the averages live: None for where the
            parameters are, 'cpu' for host memory. Defaults to None.
        overlap (bool): Whether an update runs beside the next forward and
            backward pass, on a stream (or, without a GPU, a thread) of its
            own; the numbers are the same. Nothing but the optimizer may
            change parameters then. Defaults to False.
        evaluate (str): Weights that validation and test run on: 'ema', 'raw'
            or 'both' (a pass over the data for each; the metrics of the raw
            weights come under ``raw/<name>``). Defaults to 'ema'.
        nonfinite (str): What to do with a step that leaves NaN or Inf:
            in a parameter: 'skip' it, 'raise', or 'ignore' (take it in). A
            buffer that holds some keeps its average. Defaults to 'skip'.
        strict_load (bool): Whether an average that is missing in a checkpoint
            is an error on resume. Defaults to False.
        scale_decay (bool): Whether a resume with another batch size or world
            size uses ``decay ** kappa``, which keeps the averaging window in
            samples. Defaults to False.
        copied (Sequence[str]): Patterns of names (``'head.queue'``,
            ``'*.mask'``) of tensors that are copied, not averaged. Integers,
            masks of -inf, pruning masks, the vectors of spectral norm and the
            observers of quantization are copied anyway. Defaults to ().
        enabled (bool): False: put the raw weights back on resume, then do
            nothing. Defaults to True.
        ema_type (str, optional): OpenMMLab's word: name of an averaging
            class, for its numbers and mmengine's defaults.
        momentum (float, optional): OpenMMLab's word: ``1 - decay``.
        gamma (float, optional): OpenMMLab's word: constant of the ramp of
            ``ExpMomentumEMA`` or ``MomentumAnnealingEMA``.
        **more: Options of an averaging class of your own, where ``ema_type``
            names one (a subclass of mmengine's ``BaseAveragedModel``).

    Raises:
        OptionError: If an option is unknown, out of range or contradicts
            another one (a ``ValueError``).

    Example:
        >>> custom_imports = dict(imports=['mmdet_ema'])
        >>> custom_hooks = [dict(type='EMAHook', decay=0.9998, tau=2000)]
    """

    priority = 'NORMAL'

    def __init__(
        self,
        decay: Optional[float] = None,
        tau: Optional[float] = None,
        schedule: Optional[ScheduleSpec] = None,
        interval: int = 1,
        begin_iter: int = 0,
        begin_epoch: int = 0,
        update_buffers: Optional[bool] = None,
        device: Union[str, torch.device, None] = None,
        overlap: bool = False,
        evaluate: str = 'ema',
        nonfinite: str = 'skip',
        strict_load: bool = False,
        scale_decay: bool = False,
        copied: Sequence[str] = (),
        enabled: bool = True,
        ema_type: Any = None,
        momentum: Optional[float] = None,
        gamma: Optional[float] = None,
        **more: Any,
    ):
        self.priority = more.pop('priority', self.priority)
        options = parse_options(
            decay=decay,
            tau=tau,
            schedule=schedule,
            interval=interval,
            begin_iter=begin_iter,
            begin_epoch=begin_epoch,
            update_buffers=update_buffers,
            device=device,
            overlap=overlap,
            evaluate=evaluate,
            nonfinite=nonfinite,
            strict_load=strict_load,
            scale_decay=scale_decay,
            copied=copied,
            ema_type=ema_type,
            momentum=momentum,
            gamma=gamma,
            find_rule=find_rule,
            **more,
        )
        self.enabled = check_flag('enabled', enabled)
        self._log = RunLog()
        self._life = EMALifecycle(options, self._log)
        self._weights: Optional[str] = None
        self._evaluates = False
        self._trained = False
        self._model: Any = None

    def before_run(self, runner: Any) -> None:
        """Check what can be checked before anything is loaded or changed."""
        runner_facts.refuse_second(runner, EMAHook)
        # whoever uses torch's safe_globals() takes ours away when leaving it
        allow_framework_types()
        path = runner_facts.local_checkpoint(runner)
        if path is not None:
            read_structure(path)
        if not self.enabled:
            return
        self._watch_loops(runner)
        if runner_facts.is_training(runner):
            check_monitored(runner, self._life.passes)

    def before_train(self, runner: Any) -> None:
        """Get ready; every weight is initialised and loaded by now."""
        if not self.enabled:
            return
        self._trained = False
        self._model = runner_facts.model_of(runner)
        facts = runner_facts.facts_of(runner)
        self._life.start(self._model, facts)
        optimizers = runner_facts.optimizers_of(runner)
        scale_weight_decay(optimizers, facts.samples, self._log)
        self._watch_loops(runner)

    def before_train_epoch(self, runner: Any) -> None:
        """Follow tensors that were replaced."""
        if self.enabled:
            keep_files_whole(runner)
        self._life.before_epoch()

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Start the average if its time has come."""
        if not self.enabled:
            return
        # a hook that comes after ours may have changed the weights
        self._catch_up(runner, runner.iter)
        self._life.before_iteration(
            self._model,
            runner.iter,
            runner.epoch,
            runner_facts.optimizers_of(runner),
        )

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Update the average if the weights changed."""
        self._catch_up(runner)
        if runner_facts.will_validate(runner, by_epoch=False):
            self._life.synchronize()
        if runner_facts.will_log(runner, self, batch_idx):
            self._log.scalars(runner, self._life.averager)

    def after_train_epoch(self, runner: Any) -> None:
        """Make buffers equal on all ranks, if all validate next.

        Here, not at the validation: a file that is written first is to hold
        what is evaluated.
        """
        if runner_facts.will_validate(runner, by_epoch=True):
            self._life.synchronize()
        self._life.tell_steps()

    def after_train(self, runner: Any) -> None:
        """Stop listening to the optimizers."""
        self._catch_up(runner, runner.iter)
        self._life.finish()
        self._catch_up(runner, runner.iter)  # of a skip that shows just now
        self._trained = True

    def before_val_epoch(self, runner: Any) -> None:
        """Put the averages into the model."""
        self._enter_evaluation(runner)

    def before_test_epoch(self, runner: Any) -> None:
        """Put the averages into the model."""
        self._enter_evaluation(runner)

    def before_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Put the averages in where a loop did not say that it begins."""
        self._enter_evaluation(runner)

    def before_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Put the averages in where a loop did not say that it begins."""
        self._enter_evaluation(runner)

    def after_val_epoch(
        self, runner: Any, metrics: Optional[Dict[str, float]] = None
    ) -> None:
        """Put the raw weights back."""
        self._leave_evaluation()

    def after_test_epoch(
        self, runner: Any, metrics: Optional[Dict[str, float]] = None
    ) -> None:
        """Put the raw weights back."""
        self._leave_evaluation()

    def before_save_checkpoint(self, runner: Any, checkpoint: Any) -> None:
        """Put the averages into ``state_dict``, the raw weights beside."""
        if not self.enabled:
            return
        self._catch_up(runner)
        strip_wrapper(checkpoint, runner_facts.model_of(runner))
        self._life.save(checkpoint)
        make_plain(checkpoint, self._log)

    def after_load_checkpoint(self, runner: Any, checkpoint: Any) -> None:
        """Sort out which weights of the checkpoint go where."""
        unmake(checkpoint)
        model = runner_facts.model_of(runner)
        if not runner_facts.is_training(runner) or self._trained:
            self._life.choose(checkpoint, model)
        elif runner._resume:
            refuse_foreign(checkpoint, self._log)
            optimizers = runner_facts.made_optimizers_of(runner)
            self._life.resume(checkpoint, model, optimizers)
            if not self.enabled:
                self._log.warning(
                    'EMA: enabled=False: training goes on from the raw '
                    'weights, without an average.'
                )
        else:
            self._life.fine_tune(checkpoint, model)

    def _catch_up(self, runner: Any, iteration: Optional[int] = None) -> None:
        """Update now; other hooks may save before our turn comes."""
        iteration = runner.iter + 1 if iteration is None else iteration
        taken = self._life.after_iteration(iteration)
        if not taken and self._life.averager is not None:
            iteration = self._life.last_iteration
            self._log.skipped(runner, self._life.averager, iteration)

    def _watch_loops(self, runner: Any) -> None:
        """Watch the evaluation loops that there are, and those to come."""
        for loop in runner_facts.evaluation_loops(runner):
            self._watch(runner, loop)
        for name in ('build_val_loop', 'build_test_loop'):
            if name not in vars(runner):
                build = getattr(runner, name)
                build = functools.partial(self._build, runner, build)
                setattr(runner, name, build)

    def _build(
        self, runner: Any, build: Callable[[Any], Any], cfg: Any
    ) -> Any:
        loop = build(cfg)
        self._watch(runner, loop)
        return loop

    def _watch(self, runner: Any, loop: Any) -> None:
        """Let a loop run once for each set of weights."""

        def around(run: Callable[[], Any]) -> Any:
            evaluator = getattr(loop, 'evaluator', None)
            passes = self._life.passes
            try:
                return run_passes(
                    runner, evaluator, passes, lambda w: self._pass(run, w)
                )
            except BaseException:
                forget_results(evaluator)
                raise

        guard_loop(loop, self._leave_evaluation, around)

    def _pass(self, run: Callable[[], Any], weights: str) -> Any:
        """Run a loop on one set of weights."""
        before, self._weights = self._weights, weights
        try:
            return run()
        finally:
            self._leave_evaluation()
            self._weights = before

    def _enter_evaluation(self, runner: Any) -> None:
        if self._evaluates or not self.enabled:
            return
        if runner_facts.is_training(runner) and not self._trained:
            self._catch_up(runner)
        model = runner_facts.model_of(runner)
        self._life.enter_evaluation(model, self._weights)
        self._evaluates = True

    def _leave_evaluation(self) -> None:
        self._evaluates = False
        self._life.leave_evaluation()
