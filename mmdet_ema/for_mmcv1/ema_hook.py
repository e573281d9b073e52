"""``EMAHook`` for the runners of mmcv 1.x: forwards to the lifecycle."""

from __future__ import annotations

import contextlib
import inspect
import os
from typing import Any, Dict, Iterator, Optional

import torch
from mmcv.runner import BaseRunner, Hook, OptimizerHook

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
from mmdet_ema.checks import check_choice, check_path
from mmdet_ema.for_mmcv1 import runner as runners
from mmdet_ema.for_mmcv1.saving import remove_later, with_ema_part
from mmdet_ema.for_mmcv1.watching import watch, watch_hooks
from mmdet_ema.for_mmcv1.words import WORDS, parse_words
from mmdet_ema.training.lifecycle import EMALifecycle
from mmdet_ema.training.options import show_options
from mmdet_ema.training.plan import check_begin, refuse_second


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
            does whose options are given.
        device (str, optional): Where the averages live: None for where the
            parameters are, 'cpu' for host memory. Defaults to None.
        evaluate (str): Weights that evaluations run on: 'ema', 'raw' or
            'both' (twice; the metrics of the raw weights come under
            ``raw/<name>``). Defaults to 'ema'.
        nonfinite (str): What to do with a step that leaves NaN or Inf:
            in a parameter: 'skip' it, 'raise', or 'ignore' (average it). A
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
        overlap (bool): Whether an update of a model on a GPU runs in parallel
            with the next forward and backward pass, on a side stream; the
            numbers are the same. Nothing but the optimizer may change
            parameters then. Defaults to False.
        enabled (bool): False: put the raw weights back on resume, then do
            nothing. Defaults to True.
        ema_type (str, optional): Compatible option: name of an averaging
            class, for its numbers and mmengine's defaults.
        momentum (float, optional): Compatible option: ``1 - decay``. Alone it
            means mmcv's hook, with its warm-up.
        gamma (float, optional): Compatible option: constant of the ramp of
            ``ExpMomentumEMA`` or ``MomentumAnnealingEMA``.
        warm_up (int, optional): Of mmcv's hook, for
            ``d = min(1 - momentum, n / (warm_up + n - 1))``.
        resume_from (str, optional): Of mmcv's hook: a checkpoint that the run
            resumes from.
        total_iter (float, optional): Of mmdet 2's hook: constant of the
            exponential ramp.
        skip_buffers (bool, optional): Of mmdet 2's hook: not
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
        resume_from: Optional[str] = None,
        state_dict_holds: Optional[str] = None,
        **options: Any,
    ):
        checked = parse_words(self._words, options)
        self._resume_from = check_path('resume_from', resume_from)
        if state_dict_holds is not None:
            check_choice('state_dict_holds', state_dict_holds, HOLDS)
        self._holds = state_dict_holds
        self.enabled = checked.enabled
        self.evaluates_both = checked.evaluate == 'both'
        self._log = runners.RunLog()
        self._life = EMALifecycle(checked, self._log)
        self._config: Optional[str] = None
        self._resumed_from = ''
        self.resumes = self.runs = False
        self.raw_metrics: Dict[str, Any] = {}
        # a runner as evaluation hooks see it
        self.view: Any = None
        # how often parameters were written to before the averages came in
        self._versions: Dict[torch.nn.Parameter, int] = {}
        self._started = self._steps_alone = False
        self._in_hook = self._stays_raw = False
        self._iteration = self._trained = self._saved_iteration = 0
        self._equal_since: Any = None
        self._scalars: Dict[str, float] = {}
        self._scalars_of: Any = None

    show_options(__init__, **dict.fromkeys(WORDS))

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
        refuse_second([hook for hook in runner.hooks if _is_ema(hook)])
        watch(runner, self)
        if self.enabled:
            check_begin(self._life.options, runners.facts_of(runner))
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
        self._life.before_iteration(
            runners.model_of(runner),
            runner.iter,
            runner.epoch,
            runners.optimizers_of(runner),
        )

    def after_train_iter(self, runner: Any) -> None:
        """Update the average if the weights changed."""
        # else the optimizer's turn comes after ours
        if self._trained > runner.iter:
            self.make_equal(runner, by_epoch=False)

    def after_optimizer(self, runner: Any) -> None:
        """Note that the optimizer's turn of this iteration is over."""
        self._trained = runner.iter + 1

    def after_run(self, runner: Any) -> None:
        """Stop listening to the optimizers."""
        self.catch_up()
        self._life.finish()

    def after_read_checkpoint(
        self, runner: Any, checkpoint: Any, filename: str, resumes: bool
    ) -> None:
        """Sort out which weights of a checkpoint go where, before it loads."""
        self._log.logger = runner.logger
        model = runners.model_of(runner)
        self._convert(checkpoint, model, filename)
        drop(checkpoint, runners.unsaved_names(model))
        self._saved_iteration = iteration_of(checkpoint)
        if not resumes:
            self._life.fine_tune(checkpoint, model)
            return
        optimizers = runners.optimizers_of(runner)
        self._life.resume(checkpoint, model, optimizers)
        self._config = take_program(checkpoint)
        self._resumed_from = filename

    def after_resume(self, runner: Any) -> None:
        """Go on after the iteration that was saved.

        ``IterBasedRunner`` would train it a second time.
        """
        if self._config is not None and runner.meta is not None:
            runner.meta.setdefault('config', self._config)
        if runner.max_epochs is None and self._saved_iteration:
            runner._iter = runner._inner_iter = self._saved_iteration
        self._iteration = self._trained = runner.iter

    @contextlib.contextmanager
    def evaluating(self, runner: Any, holds: bool = False) -> Iterator[None]:
        """Evaluate the averages in the body, if they are to be evaluated.

        Where ``holds`` says so they stay, unless the body raises.
        """
        inner = self._life.is_applied
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
        inner, outer = self._life.is_applied, self._in_hook
        self._in_hook = True
        try:
            yield
        finally:
            self._in_hook = outer
            if not inner:
                self.show_raw()

    def on_model_taken(self, runner: Any) -> None:
        """Put the averages into the model that an evaluation hook takes."""
        wanted = self._life.options.evaluate != 'raw'
        if wanted and self._in_hook and not self._stays_raw:
            self._show(runner)

    @contextlib.contextmanager
    def raw(self, runner: Any) -> Iterator[None]:
        """Use the raw weights in the body, wherever it is."""
        shown, outer = self._life.is_applied, self._stays_raw
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
        if self._life.is_applied and any(
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
        """Save the averages in the body, with the raw weights next to them."""
        self._start(runner)
        self.catch_up()
        model = runners.model_of(runner)
        with with_ema_part(runner, model, self._save):
            yield

    def catch_up(self) -> None:
        """Average a step now; other hooks may come before our turn."""
        self._life.after_iteration(self._iteration)

    def make_equal(self, runner: Any, by_epoch: bool) -> None:
        """Make buffers equal on all ranks if all evaluate now, once.

        Whichever of our hook, a checkpoint and an evaluation comes first calls
        it: a file that is written first is to hold what is evaluated.
        """
        self.catch_up()
        moment = runner.iter, by_epoch
        # with a high priority our turn comes before the optimizer's
        stepped = by_epoch or self._trained > runner.iter
        evaluates = runners.will_evaluate(runner, by_epoch)
        if stepped and evaluates and moment != self._equal_since:
            self._equal_since = moment
            self._life.synchronize()

    def add_scalars(self, runner: Any) -> None:
        """Let a logger log decay, distance and skipped steps too.

        They are put next to what is logged, not into its history: the logger
        would show their mean over its interval. mmcv clears what was logged.
        """
        if runner.rank != 0:
            return
        averager = self._life.averager
        steps = averager.num_steps if averager else 0
        moment = (id(averager), runner.iter, steps)
        if moment != self._scalars_of:  # once for all loggers
            self._scalars_of, self._scalars = moment, self._life.scalars()
        runner.log_buffer.output.update(self._scalars)

    def _show(self, runner: Any) -> None:
        if not self._life.is_applied:
            self._start(runner)
            self.catch_up()
            model = runners.model_of(runner)
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
        model = runners.model_of(runner)
        meta = dict(runner.meta, epoch=runner.epoch, iter=runner.iter)
        optimizers = enumerate(runners.optimizers_of(runner))
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
        tied = runners.tied_names(model)
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
        self._steps_alone = not any(
            isinstance(hook, OptimizerHook) for hook in runner.hooks
        )
        self._life.start(
            runners.model_of(runner),
            runners.facts_of(runner),
            runners.optimizers_of(runner),
        )

    def _resume(self, runner: Any) -> None:
        """Resume as mmcv's hook does, unless the run has resumed already."""
        path = self._resume_from
        if path is None:
            return
        if not runner.iter:
            runner.resume(path)
            return
        real, other = (
            os.path.realpath(os.path.expanduser(x))
            for x in (path, self._resumed_from)
        )
        if real != other:
            self._log.warning(
                f'EMA: resume_from={path!r} has no effect: the run has '
                f'resumed from another checkpoint already.'
            )


def _is_ema(hook: Any) -> bool:
    names = {kind.__name__ for kind in type(hook).__mro__}
    return not names.isdisjoint(('EMAHook', 'BaseEMAHook', 'MEGVIIEMAHook'))


class ExpMomentumEMAHook(EMAHook):
    """Instead of mmdet 2's hook of that name.

    ``d = (1 - momentum) * (1 - exp(-n / total_iter))``, with momentum 0.0002,
    total_iter 2000 and float buffers averaged by default.

    Args:
        **options: As for :class:`EMAHook`, but for other ramps.
    """

    _words = 'ExpMomentumEMAHook'


class LinearMomentumEMAHook(EMAHook):
    """Instead of mmdet 2's hook of that name.

    ``d = min(1 - momentum, n / (warm_up + n - 1))``, with momentum 0.0002,
    warm_up 100 and float buffers averaged by default.

    Args:
        **options: As for :class:`EMAHook`, but for other ramps.
    """

    _words = 'LinearMomentumEMAHook'
