"""``EMAHook`` for the runners of mmcv 1.x: forwards to the lifecycle."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from mmcv.runner import BaseRunner, DistEvalHook, EvalHook, Hook, OptimizerHook
from mmcv.runner.checkpoint import get_state_dict

from mmdet_ema.averaging.state import read_count
from mmdet_ema.checkpoint import mmcv1
from mmdet_ema.checkpoint.format import EMA
from mmdet_ema.checks import check_choice, check_path
from mmdet_ema.errors import OptionError
from mmdet_ema.for_mmcv1 import checkpoints
from mmdet_ema.for_mmcv1 import runner as runners
from mmdet_ema.for_mmcv1.compatible import COMPATIBLE, parse_compatible
from mmdet_ema.for_mmcv1.watching import watch, watch_hooks
from mmdet_ema.training import patches
from mmdet_ema.training.lifecycle import EMALifecycle
from mmdet_ema.training.options import RAW, show_options
from mmdet_ema.training.passes import leaving_no_trace
from mmdet_ema.training.plan import check_begin, refuse_second
from mmdet_ema.training.recalibrate import recalibrate
from mmdet_ema.training.report import announce, own_logger
from mmdet_ema.training.sigterm import EPOCH_SAMPLES, Sigterm, skipped


class EMAHook(Hook):  # type: ignore[misc]
    """Exponential moving average of the weights, during training.

    Evaluations, ``val`` in the workflow and the ``state_dict`` of checkpoints
    use the averages; training goes on from the raw weights, which are in the
    checkpoint too. Update n is ``avg = d * avg + (1 - d) * raw`` with, by
    default, ``d = decay * (1 - exp(-n / tau))`` (YOLOv5's ramp). Any priority
    will do: a step that is not averaged yet is so before anything is
    evaluated, saved or logged.

    Args:
        decay (float | str): The old average's weight, in [0, 1), or 'auto'
            for a window of a tenth of the planned steps. Defaults to 0.9999.
        tau (float): Constant of the ramp in updates. Defaults to 2000.
        schedule (str | dict | Callable): Name, ``dict(type=name, **options)``
            or callable n -> decay. Defaults to 'exponential'.
        interval (int): Steps between updates. Defaults to 1.
        begin_iter (int): First iteration to average, from 1. Defaults to 0.
        begin_epoch (int): First epoch to average, from 1. Defaults to 0.
        update_buffers (bool): Whether float buffers are averaged, not copied.
            Defaults to True, or to what the hook does whose options are given.
        device (str, optional): Where the averages live. Defaults to None, for
            where the parameters are.
        evaluate (str | Sequence[str]): Weights to validate and test: 'ema',
            'raw', the name of an average, a list of these, 'both' (ema and
            raw) or 'all'. A pass each; the deployed ones have the plain
            metrics, others ``<metric>_<set>``. Defaults to 'ema'.
        nonfinite (str): 'skip', 'raise' or 'ignore' (average) a step that
            leaves NaN or Inf. Defaults to 'skip'.
        strict_load (bool): Whether to resume needs every average. Defaults to
            False.
        scale_decay (bool): Whether to resume with another batch size keeps
            the averaging window in samples. Defaults to False.
        copied (Sequence[str]): Patterns of names of tensors that are not
            averaged. Defaults to ().
        overlap (bool): Whether updates run on a side stream. Defaults to
            False.
        enabled (bool): Whether to average, or to do nothing but resume from
            the raw weights. Defaults to True.
        averages (dict): Further averages by name, each a dict of schedule
            options and ``device``: ``dict(fast=dict(decay=0.999, tau=500))``.
            Defaults to none.
        posthoc (bool): Add a fast average 'posthoc' in host memory and keep
            the starting weights in the work folder, for other windows after
            the training. Defaults to False.
        deploy (str): Name of the averages in the ``state_dict`` of files.
            Defaults to 'ema', the main ones.
        restart_epochs (Sequence[int]): Epochs, counted from 1, that the
            averages start again before, from the raw weights. Defaults to ().
        recalibrate (int): Batches of training data that the BatchNorm
            statistics of the deployed averages are estimated from again at
            the end; the better ones are kept. Defaults to 0, not at all.
        safe_save (bool): Bring each checkpoint to the disk and move it into
            place when it is whole; only then ``latest.pth`` names it and an
            old best one is removed. Defaults to True.
        save_on_sigterm (bool): After SIGTERM write a checkpoint at the end of
            the step, and exit with status 143; a resume goes on there, in
            the middle of an epoch too. Defaults to False.
        verify_ranks (bool): Before each evaluation of all ranks, compare
            their weights and averages by checksums; stop with the name of the
            first one that differs. Defaults to False.
        ema_type (str, optional): An averaging class of mmengine.
        momentum (float, optional): ``1 - decay``. Alone it means mmcv's hook,
            with its warm-up.
        gamma (float, optional): Constant of the ramp of ``ema_type``.
        evaluate_on_ema (bool, optional): Of mmpretrain's hook: False is
            ``evaluate='raw'``.
        evaluate_on_origin (bool, optional): Of mmpretrain's hook: True is
            ``evaluate='both'``, where the averages are evaluated too.
        warm_up (int, optional): Of mmcv's hook, for
            ``d = min(1 - momentum, n / (warm_up + n - 1))``.
        resume_from (str, optional): Of mmcv's hook: what the run resumes from.
        total_iter (float, optional): Of mmdet 2's hook: its ``tau``.
        skip_buffers (bool, optional): The opposite of ``update_buffers``.
        state_dict_holds (str, optional): 'ema' or 'raw', what the plain keys
            of a file of mmcv's own hook hold that does not tell. Defaults to
            None: 'raw' in files named by iteration, else 'ema'.

    The hook for mmengine says more of the options that it has as well.

    Raises:
        OptionError: If an option is unknown, out of range or contradicts
            another one (a ``ValueError``).

    Example:
        >>> custom_imports = dict(imports=['mmdet_ema'])
        >>> custom_hooks = [dict(type='EMAHook', decay=0.9998, tau=2000)]
    """

    _hook = 'EMAHook'
    theirs = 'MMCVEMAHook'  # what builds the framework's own

    def __init__(
        self,
        *,
        resume_from: Optional[str] = None,
        state_dict_holds: Optional[str] = None,
        **options: Any,
    ):
        checked = parse_compatible(self._hook, options)
        self._resume_from = check_path('resume_from', resume_from)
        if state_dict_holds is not None:
            check_choice('state_dict_holds', state_dict_holds, mmcv1.HOLDS)
        self._holds = state_dict_holds
        self.enabled = checked.enabled
        self.options, self.passes = checked, checked.passes
        self.train_loader: Any = None
        self.log = logging.LoggerAdapter(own_logger(), {})
        self._life = EMALifecycle(checked, self.log)
        # average a step now: other hooks may come before our turn
        self.catch_up = self._life.after_iteration
        self.tell_evaluation = self._life.tell_evaluation
        self.tell_metrics = self._life.tell_metrics
        self._started = self._steps_alone = False
        # iterations: whose optimizer's turn is over, that are in the file
        self._trained = self._saved_iteration = 0
        self._sigterm: Optional[Sigterm] = None
        if checked.save_on_sigterm:
            self._sigterm = Sigterm(self.log)
        # batches that are left out: they were trained before the resume
        self.skips = self._epoch_samples = 0
        self._resumed_from = ''
        self._messages: Dict[str, Any] = {}  # of other hooks, in that file
        self._config: Optional[str] = None
        self._in_hook = self._stays_raw = False
        # how often parameters were written to before the averages came in
        self._versions: Dict[torch.nn.Parameter, int] = {}
        self._equal_since: Any = None
        self._scalars: Tuple[Any, Dict[str, float]] = None, {}
        announce(self._hook, self.theirs)

    show_options(__init__, **dict.fromkeys(COMPATIBLE))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == 'priority':
            # this is all that a runner does with a hook before it loads a
            # file, and it does not say who it is
            runner = sys._getframe(1).f_locals.get('self')
            if isinstance(runner, BaseRunner):
                self._watch(runner)

    def before_run(self, runner: Any) -> None:
        """Check what can be checked before anything is changed."""
        names = {'EMAHook', 'BaseEMAHook', 'MEGVIIEMAHook'}
        hooks = runner.hooks
        kinds = [({k.__name__ for k in type(x).__mro__}, x) for x in hooks]
        refuse_second([x for found, x in kinds if found & names])
        self._watch(runner)
        if self.enabled:
            check_begin(self.options, runners.facts_of(runner))
            count = self.options.recalibrate
            if count and runner.max_epochs is None:
                raise OptionError(
                    f'recalibrate={count} needs a runner of mmcv 1.x that '
                    f'counts epochs (EpochBasedRunner); leave it out.'
                )
            watch_hooks(runner, self)
            if self._sigterm:
                loaders = [getattr(x, 'dataloader', None) for x in hooks]
                self._sigterm.listen([self.train_loader, *loaders])
        path = self._resume_from
        if path is not None and not runner.iter:
            runner.resume(path)
        elif path is not None and _real(path) != _real(self._resumed_from):
            self.log.warning(
                f'EMA: resume_from={path!r} has no effect: the run has '
                f'resumed from another checkpoint already.'
            )
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
        # a runner without mmcv's OptimizerHook steps before any hook
        self._trained = runner.iter + int(self._steps_alone)
        model = runners.model_of(runner)
        optimizers = runners.optimizers_of(runner)
        self._life.before_iteration(
            model, runner.iter, runner.epoch, optimizers
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
        if self.enabled and self.options.safe_save and not self._started:
            checkpoints.tidy(runner, self.log)  # a run that had ended resumes
        self.catch_up()
        self._life.finish()
        if self._sigterm:
            self._sigterm.ignore()

    def after_iteration(self, runner: Any) -> None:
        """Stop if SIGTERM has come; every hook of the iteration was called."""
        if self._sigterm is None or not self._sigterm.has_come():
            return
        facts = runners.facts_of(runner, self.train_loader)
        # gradients that wait for a step are in no file
        if (runner.iter + 1) % facts.accumulation == 0:
            done = runner.inner_iter + 1 if facts.by_epoch else 0
            samples = done * facts.batch_size * facts.world_size
            checkpoints.save_and_stop(runner, self._sigterm, samples)

    def after_read_checkpoint(
        self, runner: Any, checkpoint: Any, filename: str, resumes: bool
    ) -> None:
        """Sort out which weights of a checkpoint go where, before it loads."""
        model = runners.model_of(runner)
        self._convert(checkpoint, model, filename)
        # buffers that mmcv saves and the model does not load
        unloaded = {*get_state_dict(model)} - {*model.state_dict()}
        mmcv1.drop(checkpoint, unloaded)
        self._saved_iteration = mmcv1.iteration_of(checkpoint)
        if not resumes:
            self._life.fine_tune(checkpoint, model)
            return
        optimizers = runners.optimizers_of(runner)
        self._life.resume(checkpoint, model, optimizers)
        meta = checkpoint.get('meta', {})
        self._messages = meta.get('hook_msgs', {})
        self._epoch_samples = read_count(meta, EPOCH_SAMPLES, 0)
        # the runner would take it into later files
        meta.pop(EPOCH_SAMPLES, None)
        self._config = mmcv1.take_program(checkpoint)
        self._resumed_from = filename

    def after_resume(self, runner: Any) -> None:
        """Go on after the iteration that was saved.

        ``IterBasedRunner`` would train it a second time, and forget the best
        score.
        """
        if runner.max_epochs is None:
            runner.meta = runner.meta or {}
            runner.meta.setdefault('hook_msgs', {}).update(self._messages)
        if self._config is not None and runner.meta is not None:
            runner.meta.setdefault('config', self._config)
        if runner.max_epochs is None and self._saved_iteration:
            runner._iter = runner._inner_iter = self._saved_iteration
        self._trained = runner.iter

    @contextlib.contextmanager
    def evaluating(
        self, runner: Any, holds: bool = False, lazily: bool = False
    ) -> Iterator[None]:
        """Evaluate the averages in the body, if they are to be evaluated.

        They stay under ``holds``, unless the body raises; ``lazily`` they
        come when the model is taken, not at once.
        """
        stays, outer = self._life.is_applied, self._in_hook
        self._in_hook = outer or lazily
        try:
            if not lazily:
                self._show(runner)
            yield
            stays = stays or holds or outer
        finally:
            self._in_hook = outer
            if not stays:
                self.show_raw()

    def on_model_taken(self, runner: Any) -> None:
        """Put the averages into the model that an evaluation hook takes."""
        wanted = self.passes[-1] != RAW
        if wanted and self._in_hook and not self._stays_raw:
            self._show(runner)

    @contextlib.contextmanager
    def only(self, runner: Any, weights: str) -> Iterator[None]:
        """Use one set of weights in the body, wherever it is."""
        with self.raw(runner):
            self._life.enter_evaluation(runners.model_of(runner), weights)
            try:
                yield
            finally:
                self._life.leave_evaluation()

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
        before, self._versions = self._versions, {}
        written = any(p._version != n for p, n in before.items())
        if self._life.is_applied and written:
            self.log.warning(
                'EMA: a hook changed parameters while the averages were in '
                'the model, as from the end of an epoch to the next; that is '
                'lost now. Change them in before_train_epoch or '
                'after_train_iter.'
            )
        self._life.leave_evaluation()

    @contextlib.contextmanager
    def saving(self, runner: Any) -> Iterator[None]:
        """Save the averages in the body, with the raw weights next to them."""

        def save(checkpoint: Any) -> None:
            self._life.save(checkpoint)
            mmcv1.put_iteration(checkpoint, self._trained)

        self._start(runner)
        model = runners.model_of(runner)
        self._life.follow(model)
        with checkpoints.with_ema_part(runner, model, save, self._config):
            yield

    def make_equal(self, runner: Any, by_epoch: bool) -> None:
        """Make buffers equal on all ranks if all evaluate now, once.

        Whichever of our hook, a checkpoint and an evaluation comes first calls
        it: a file that is written first is to hold what is evaluated.
        """
        self.catch_up()
        moment = runner.iter, by_epoch
        # with a high priority our turn comes before the optimizer's
        stepped = by_epoch or self._trained > runner.iter
        # on all ranks: only that hook, which has collectives of its own there
        evaluates = any(
            isinstance(hook, DistEvalHook)
            and hook.by_epoch == by_epoch
            and hook._should_evaluate(runner)
            for hook in runner.hooks
        )
        if stepped and evaluates and moment != self._equal_since:
            self._equal_since = moment
            self._life.synchronize()

    def recalibrate(
        self, runner: Any, evaluate: Callable[[Any], Dict[str, Any]]
    ) -> None:
        """Estimate statistics again, when the last epoch is over.

        ``evaluate`` evaluates what the model holds with an evaluation hook.
        """
        if runner.max_epochs is None or runner.epoch + 1 < runner.max_epochs:
            return
        hooks = [hook for hook in runner.hooks if isinstance(hook, EvalHook)]
        model, deploy = runners.model_of(runner), self.options.deploy
        averager = self._life.begin_recalibration(model)
        if averager is None:
            return

        def metrics() -> Dict[str, Any]:
            self.tell_evaluation(deploy)
            with leaving_no_trace(model), self.only(runner, deploy):
                return evaluate(hooks[0])

        recalibrate(
            averager,
            self.options,
            model,
            self.train_loader,
            lambda batch: runner.model.train_step(batch, runner.optimizer),
            metrics,
            lambda found: runners.choose_by(hooks[0], found),
            self.log,
        )

    def add_scalars(self, runner: Any) -> None:
        """Let a logger log decay, distance and skipped steps too.

        They are put next to what is logged, not into its history: the logger
        would show their mean over its interval. mmcv clears what was logged.
        """
        averager = self._life.averager
        steps = averager.num_steps if averager else 0
        moment = (id(averager), runner.iter, steps)
        if moment != self._scalars[0]:  # once for all loggers
            self._scalars = moment, self._life.scalars()
        scalars = dict(self._scalars[1])
        scalars['ema_distance'] = _Distance(scalars['ema_distance'])
        runner.log_buffer.output.update(scalars)

    def _watch(self, runner: Any) -> None:
        self.log.logger = runner.logger
        watch(runner, self)

    def _start(self, runner: Any) -> None:
        """Get ready; every weight is initialised and loaded by now."""
        if self._started:
            return
        self._started = True
        hooks = runner.hooks
        if self.options.safe_save:
            # it removes the last best file before it writes the next
            evaluates = [x for x in hooks if isinstance(x, EvalHook)]
            patches.remove_later(evaluates, 'file_client')
            checkpoints.tidy(runner, self.log)
        facts = runners.facts_of(runner, self.train_loader)
        self.skips = 0
        if self._epoch_samples:
            batch = facts.batch_size * facts.world_size
            done, self._epoch_samples = self._epoch_samples // batch, 0
            can_skip = runners.can_skip(runner)
            self.skips = skipped(done, runner, can_skip, self.log)
        self._steps_alone = not any(
            isinstance(x, OptimizerHook) for x in hooks
        )
        model = runners.model_of(runner)
        self._life.start(model, facts, runners.optimizers_of(runner))

    def _show(self, runner: Any) -> None:
        if self._life.is_applied:
            return
        self._start(runner)
        model = runners.model_of(runner)
        self._life.enter_evaluation(model)
        self._versions = {
            p: p._version
            for p in model.parameters()
            if p.requires_grad and not p.is_inference()
        }

    def _convert(self, checkpoint: Any, model: Any, filename: str) -> None:
        """Turn a file of another hook into one of ours."""
        owned = [x for x in model.state_dict() if x.startswith('ema_')]
        if EMA in checkpoint or owned:
            return
        groups: Dict[int, List[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            groups.setdefault(id(tensor), []).append(name)
        tied = [names for names in groups.values() if len(names) > 1]
        holds = self._holds
        found = mmcv1.convert_buffers(checkpoint, tied, filename, holds)
        if found is not None:
            self.log.info(found.line)
            for warning in found.warnings:
                self.log.warning(warning)

    def _take_late(self, runner: Any) -> None:
        """Take our part of a file that was loaded before we were there."""
        if mmcv1.MESSAGE not in (runner.meta or {}).get('hook_msgs', {}):
            return
        model = runners.model_of(runner)
        optimizers = enumerate(runners.optimizers_of(runner))
        checkpoint = dict(
            state_dict=model.state_dict(),
            meta=dict(runner.meta, epoch=runner.epoch, iter=runner.iter),
            optimizer={str(i): x.state_dict() for i, x in optimizers},
        )
        mmcv1.take_message(checkpoint)
        self.after_read_checkpoint(runner, checkpoint, '', True)
        model.load_state_dict(checkpoint['state_dict'])
        self.after_resume(runner)


class _Distance(float):
    """Shows three digits, however small: mmcv rounds to four places."""

    def __format__(self, spec: str) -> str:
        return format(float(self), '.3g')

    def __round__(self, digits: Any = None) -> Any:
        return self


def _real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


class ExpMomentumEMAHook(EMAHook):
    """Instead of mmdet 2's hook of that name.

    ``d = (1 - momentum) * (1 - exp(-n / total_iter))``, with momentum 0.0002,
    total_iter 2000 and float buffers averaged by default.

    Args:
        **options: As for :class:`EMAHook`, but for other ramps.
    """

    _hook = 'ExpMomentumEMAHook'
    theirs = 'MMDetExpMomentumEMAHook'


class LinearMomentumEMAHook(EMAHook):
    """Instead of mmdet 2's hook of that name.

    ``d = min(1 - momentum, n / (warm_up + n - 1))``, with momentum 0.0002,
    warm_up 100 and float buffers averaged by default.

    Args:
        **options: As for :class:`EMAHook`, but for other ramps.
    """

    _hook = 'LinearMomentumEMAHook'
    theirs = 'MMDetLinearMomentumEMAHook'
