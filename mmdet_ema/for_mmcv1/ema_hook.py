"""``EMAHook`` for the runners of mmcv 1.x: forwards to the lifecycle."""

from __future__ import annotations

import contextlib
import inspect
import os
from typing import Any, Callable, Dict, Iterator, Optional

import torch
from mmcv.runner import BaseRunner, Hook

from mmdet_ema.checkpoint.format import EMA
from mmdet_ema.checkpoint.mmcv1 import (
    HOLDS,
    MESSAGE,
    convert_buffers,
    drop,
    iteration_of,
    put_iteration,
    take_message,
    take_program,
)
from mmdet_ema.checks import check_choice, check_flag
from mmdet_ema.for_mmcv1 import runner_facts
from mmdet_ema.for_mmcv1.run_log import RunLog
from mmdet_ema.for_mmcv1.saving import remove_later, with_ema_part
from mmdet_ema.for_mmcv1.watching import watch, watch_hooks
from mmdet_ema.for_mmcv1.words import check_path, parse_words
from mmdet_ema.optimizers.nominal import scale_weight_decay
from mmdet_ema.training.lifecycle import EMALifecycle
from mmdet_ema.training.planning import check_begin


class EMAHook(Hook):  # type: ignore[misc]
    """Exponential moving average of the weights, during training.

    Evaluations, ``val`` in the workflow and the ``state_dict`` of checkpoints
    use the averages; training goes on from the raw weights, which are in the
    checkpoint too. Update n is ``avg = d * avg + (1 - d) * raw`` with, by
    default, ``d = decay * (1 - exp(-n / tau))`` (YOLOv5's ramp). Any priority
    will do: a step that is not averaged yet is so before anything is
    evaluated, saved or logged.

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
            are averaged; else copied. Defaults to True, or to what the hook
            does whose words are given.
        device (str, optional): Where the averages live: None for where the
            parameters are, 'cpu' for host memory. Defaults to None.
        evaluate (str): Weights that evaluations run on: 'ema', 'raw' or
            'both' (twice; the metrics of the raw weights come under
            ``raw/<name>``). Defaults to 'ema'.
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
        overlap (bool): Whether an update runs beside the next forward and
            backward pass, on a stream (or, without a GPU, a thread) of its
            own; the numbers are the same. Nothing but the optimizer may
            change parameters then. Defaults to False.
        enabled (bool): False: put the raw weights back on resume, then do
            nothing. Defaults to True.
        ema_type (str, optional): mmengine's word: name of an averaging
            class, for its numbers and mmengine's defaults.
        momentum (float, optional): OpenMMLab's word: ``1 - decay``. Alone it
            means mmcv's hook, with its warm-up.
        gamma (float, optional): mmengine's word: constant of the ramp of
            ``ExpMomentumEMA`` or ``MomentumAnnealingEMA``.
        warm_up (int, optional): mmcv's word, for
            ``d = min(1 - momentum, n / (warm_up + n - 1))``.
        resume_from (str, optional): mmcv's word: a checkpoint that the run
            resumes from.
        total_iter (float, optional): mmdet 2's word: constant of the
            exponential ramp.
        skip_buffers (bool, optional): mmdet 2's word: not
            ``update_buffers``.
        state_dict_holds (str, optional): What the plain keys of a file of
            mmcv's own hook hold where the file does not tell: 'ema', or 'raw'
            if that hook had a priority of 50 or more. Defaults to None: 'raw'
            in files named by iteration, else 'ema', with a warning.

    Raises:
        OptionError: If an option is unknown, out of range or contradicts
            another one (a ``ValueError``).

    Example:
        >>> custom_imports = dict(imports=['mmdet_ema'])
        >>> custom_hooks = [dict(type='EMAHook', decay=0.9998, tau=2000)]
    """

    _words = 'EMAHook'

    def __init__(
        self,
        *,
        enabled: bool = True,
        resume_from: Optional[str] = None,
        state_dict_holds: Optional[str] = None,
        **options: Any,
    ):
        checked = parse_words(self._words, options)
        self.enabled = check_flag('enabled', enabled)
        self.evaluates_both = checked.evaluate == 'both'
        self._resume_from = check_path('resume_from', resume_from)
        if state_dict_holds is not None:
            check_choice('state_dict_holds', state_dict_holds, HOLDS)
        self._holds = state_dict_holds
        self._log = RunLog()
        self._life = EMALifecycle(checked, self._log)
        self._config: Optional[str] = None
        self._resumed_from = ''
        self.resumes = self.runs = False
        self.raw_metrics: Dict[str, Any] = {}
        self.view: Any = None
        self._versions: Dict[torch.nn.Parameter, int] = {}
        self._started = self._steps_alone = False
        self._in_hook = self._stays_raw = False
        self._iteration = self._trained = self._saved_iteration = 0
        self._equal_since: Any = None

    @property
    def priority(self) -> int:
        """Priority in the run, which mmcv sets when it registers the hook."""
        try:
            return self.__dict__['priority']  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError('priority') from None

    @priority.setter
    def priority(self, value: int) -> None:
        self.__dict__['priority'] = value
        # this is all that a runner does with a hook before it loads a file,
        # and it does not say who it is
        frame = inspect.currentframe()
        caller = frame.f_back if frame else None
        runner = caller.f_locals.get('self') if caller else None
        if isinstance(runner, BaseRunner):
            watch(runner, self)

    def before_run(self, runner: Any) -> None:
        """Check what can be checked before anything is changed."""
        self._log.logger = runner.logger
        runner_facts.refuse_second(runner)
        watch(runner, self)
        if self.enabled:
            check_begin(self._life.options, runner_facts.facts_of(runner))
            watch_hooks(runner, self)
        self._resume(runner)
        self._take_late(runner)
        self._started = False

    def before_train_epoch(self, runner: Any) -> None:
        """Follow tensors that were replaced."""
        if self.enabled:
            watch_hooks(runner, self)
            self._start(runner)
            self._life.before_epoch()

    def before_train_iter(self, runner: Any) -> None:
        """Start the average if its time has come."""
        if not self.enabled:
            return
        self._start(runner)
        self.catch_up()
        self._iteration = runner.iter + 1
        # a runner without mmcv's OptimizerHook steps before any hook
        self._trained = runner.iter + int(self._steps_alone)
        model = runner_facts.model_of(runner)
        optimizers = runner_facts.optimizers_of(runner)
        self._life.before_iteration(
            model, runner.iter, runner.epoch, optimizers
        )

    def after_train_iter(self, runner: Any) -> None:
        """Update the average if the weights changed."""
        # else the optimizer's turn comes after ours
        if self._trained > runner.iter:
            self.make_equal(runner, by_epoch=False)

    def after_optimizer(self, runner: Any) -> None:
        """Note that the optimizer's turn of this iteration is over.

        Args:
            runner: The runner.
        """
        self._trained = runner.iter + 1

    def after_run(self, runner: Any) -> None:
        """Stop listening to the optimizers."""
        self.catch_up()
        self._life.finish()
        self.catch_up()  # of a skip that came to light just now

    def after_read_checkpoint(
        self, runner: Any, checkpoint: Any, filename: str, resumes: bool
    ) -> None:
        """Sort out which weights of a checkpoint go where.

        Args:
            runner: The runner, which loads it next.
            checkpoint: What was read, changed in place.
            filename: Name of the file.
            resumes: Whether training resumes from it.
        """
        self._log.logger = runner.logger
        model = runner_facts.model_of(runner)
        self._convert(checkpoint, model, filename)
        drop(checkpoint, runner_facts.unsaved_names(model))
        self._saved_iteration = iteration_of(checkpoint)
        if resumes:
            optimizers = runner_facts.optimizers_of(runner)
            self._life.resume(checkpoint, model, optimizers)
            self._config = take_program(checkpoint)
            self._resumed_from = filename
            if not self.enabled:
                self._log.warning(
                    'EMA: enabled=False: training goes on from the raw '
                    'weights, without an average.'
                )
        else:
            self._life.fine_tune(checkpoint, model)

    def after_resume(self, runner: Any) -> None:
        """Go on after the iteration that was saved.

        ``IterBasedRunner`` would train it a second time.

        Args:
            runner: The runner, which has resumed.
        """
        if self._config is not None and runner.meta is not None:
            runner.meta.setdefault('config', self._config)
        if runner.max_epochs is None and self._saved_iteration:
            runner._iter = runner._inner_iter = self._saved_iteration
        self._iteration = self._trained = runner.iter

    @contextlib.contextmanager
    def evaluating(self, runner: Any, holds: bool = False) -> Iterator[None]:
        """Evaluate the averages in the body, if they are to be evaluated.

        Args:
            runner: The runner.
            holds: Whether they stay in the model after the body, unless it
                raises. Defaults to False.
        """
        inner = self._is_shown
        try:
            self._show(runner)
            yield
            inner = inner or holds or self._in_hook
        finally:
            if not inner:
                self.show_raw()

    @contextlib.contextmanager
    def evaluating_lazily(self) -> Iterator[None]:
        """Evaluate the averages in the body, once the model is taken."""
        inner, outer = self._is_shown, self._in_hook
        self._in_hook = True
        try:
            yield
        finally:
            self._in_hook = outer
            if not inner:
                self.show_raw()

    def on_model_taken(self, runner: Any) -> None:
        """Put the averages into the model that an evaluation hook takes.

        Args:
            runner: The runner.
        """
        wanted = self._life.options.evaluate != 'raw'
        if wanted and self._in_hook and not self._stays_raw:
            self._show(runner)

    @contextlib.contextmanager
    def raw(self, runner: Any) -> Iterator[None]:
        """Use the raw weights in the body, wherever it is.

        Args:
            runner: The runner.
        """
        shown, outer = self._is_shown, self._stays_raw
        self.show_raw()
        self._stays_raw = True
        try:
            yield
        finally:
            self._stays_raw = outer
        if shown:
            self._show(runner)

    def show_raw(self) -> None:
        """Put the raw weights back, if the averages are in the model."""
        if self._is_shown and any(
            parameter._version != version
            for parameter, version in self._versions.items()
        ):
            self._log.warning(
                'EMA: a hook changed parameters while the averages were in '
                'the model, as from the end of an epoch to the next; that is '
                'lost now. Change them in before_train_epoch or '
                'after_train_iter.'
            )
        self._versions = {}
        self._life.leave_evaluation()

    @contextlib.contextmanager
    def saving(self, runner: Any) -> Iterator[None]:
        """Save the averages in the body, with the raw weights beside.

        Args:
            runner: The runner.
        """
        self._start(runner)
        self.catch_up()
        model = runner_facts.model_of(runner)
        with with_ema_part(runner, model, self._save):
            yield

    def catch_up(self) -> None:
        """Average a step now; other hooks may come before our turn."""
        taken = self._life.after_iteration(self._iteration)
        if not taken and self._life.averager is not None:
            iteration = self._life.last_iteration
            self._log.skipped(self._life.averager, iteration)

    def make_equal(self, runner: Any, by_epoch: bool) -> None:
        """Make buffers equal on all ranks if all evaluate now, once.

        Whichever of our hook, a checkpoint and an evaluation comes first calls
        it: a file that is written first is to hold what is evaluated.

        Args:
            runner: The runner.
            by_epoch: Whether an epoch ends; else an iteration.
        """
        self.catch_up()
        moment = runner.iter, by_epoch
        # with a high priority our turn comes before the optimizer's
        stepped = by_epoch or self._trained > runner.iter
        evaluates = runner_facts.will_evaluate(runner, by_epoch)
        if stepped and evaluates and moment != self._equal_since:
            self._equal_since = moment
            self._life.synchronize()

    def log_training(self, log: Callable[[Any], Any], runner: Any) -> Any:
        """Let a logger log a training step, with decay and distance.

        Args:
            log: The ``log`` of a logger hook.
            runner: The runner.
        """
        return self._log.with_scalars(log, runner, self._life.averager)

    @property
    def _is_shown(self) -> bool:
        evaluated = self._life.evaluated
        return evaluated is not None and evaluated.is_applied

    def _show(self, runner: Any) -> None:
        if not self._is_shown:
            self._start(runner)
            self.catch_up()
            model = runner_facts.model_of(runner)
            self._life.enter_evaluation(model)
            self._versions = {
                parameter: parameter._version
                for parameter in model.parameters()
                if parameter.requires_grad and not parameter.is_inference()
            }

    def _take_late(self, runner: Any) -> None:
        """Take our part of a file that was loaded before we were there."""
        messages = (runner.meta or {}).get('hook_msgs', {})
        if MESSAGE not in messages:
            return
        model = runner_facts.model_of(runner)
        meta = dict(runner.meta, epoch=runner.epoch, iter=runner.iter)
        optimizers = enumerate(runner_facts.optimizers_of(runner))
        checkpoint = dict(
            state_dict=model.state_dict(),
            meta=meta,
            optimizer={str(i): x.state_dict() for i, x in optimizers},
        )
        take_message(checkpoint)
        self.after_read_checkpoint(runner, checkpoint, '', True)
        model.load_state_dict(checkpoint['state_dict'])
        self.after_resume(runner)

    def _convert(self, checkpoint: Any, model: Any, filename: str) -> None:
        """Turn a file of another hook into one of ours."""
        owned = [x for x in model.state_dict() if x.startswith('ema_')]
        if EMA in checkpoint or owned:
            return
        tied = runner_facts.tied_names(model)
        found = convert_buffers(checkpoint, tied, filename, self._holds)
        if found is not None:
            self._log.info(found.line)
            for warning in found.warnings:
                self._log.warning(warning)

    def _save(self, checkpoint: Any) -> None:
        self._life.save(checkpoint)
        put_iteration(checkpoint, self._trained)

    def _start(self, runner: Any) -> None:
        """Get ready; every weight is initialised and loaded by now."""
        if self._started:
            return
        self._started = True
        remove_later(runner)
        self._steps_alone = not runner_facts.has_optimizer_hook(runner)
        facts = runner_facts.facts_of(runner)
        self._life.start(runner_facts.model_of(runner), facts)
        optimizers = runner_facts.optimizers_of(runner)
        scale_weight_decay(optimizers, facts.samples, self._log)

    def _resume(self, runner: Any) -> None:
        """Resume as mmcv's hook does, unless the run has resumed already."""
        if self._resume_from is None:
            return
        if runner.iter and _is_same(self._resume_from, self._resumed_from):
            return
        if runner.iter:
            self._log.warning(
                f'EMA: resume_from={self._resume_from!r} has no effect: the '
                f'run has resumed from another checkpoint already.'
            )
        else:
            runner.resume(self._resume_from)


def _is_same(path: str, other: str) -> bool:
    """Return whether two names are of one file; it may be gone by now."""
    real = [os.path.realpath(os.path.expanduser(x)) for x in (path, other)]
    return real[0] == real[1]
