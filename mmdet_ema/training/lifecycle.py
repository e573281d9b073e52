"""When the average starts, moves, is swapped, saved and loaded.

Knows no runner: an adapter forwards the moments of its framework. The moments
were chosen so that the average starts from the weights as they are when
training starts, after initialisation and after any load.
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import (
    Any,
    ContextManager,
    Dict,
    Mapping,
    Optional,
    Sequence,
    Set,
)

from torch import Tensor, nn

from mmdet_ema.averaging.averager import WeightAverager
from mmdet_ema.averaging.averages import MAIN
from mmdet_ema.averaging.shards import gather
from mmdet_ema.averaging.state import read_count
from mmdet_ema.averaging.tensors import select
from mmdet_ema.checkpoint import format as ema_format
from mmdet_ema.checkpoint.format import CHANGED, EMAPart
from mmdet_ema.checkpoint.start import START, is_there, keep_start, start_name
from mmdet_ema.errors import NonFiniteError
from mmdet_ema.optimizers.nominal import scale_weight_decay
from mmdet_ema.schedules import check_decay
from mmdet_ema.training import passes, report, resume
from mmdet_ema.training.options import RAW, Options
from mmdet_ema.training.plan import Plan, RunFacts, check_begin, has_begun
from mmdet_ema.training.recalibrate import layers_to_estimate
from mmdet_ema.training.steps import TELLS_OF_STEPS, WeightChanges
from mmdet_ema.version import __version__

Checkpoint = Dict[str, Any]
Metrics = Mapping[str, Any]
# iterations without a step that are said at least to be unusual
_IDLE = 50


class EMALifecycle:
    """The life of the averages inside a trainer."""

    def __init__(self, options: Options, log: Any):
        self.options = options
        # the sets of weights that are evaluated, the main one last
        self.passes = options.passes
        # from the first iteration that counts on, or of an evaluated file
        self.averager: Optional[WeightAverager] = None
        self._log = log
        self._estimates = 0
        # what was found in a file, until its weights are in the model
        self._pending: Optional[EMAPart] = None
        self._only_evaluates = False
        self._plan: Optional[Plan] = None
        self._reported = True
        self._changes: Optional[WeightChanges] = None
        self._first: Dict[str, int] = {}
        self._iterations = self._told_iterations = self._replacements = 0
        # the present one from 1, and that of the last update
        self._iteration = self._updated_at = 0
        self._told_skipped = self._restarted = 0
        self._start: Any = None  # fingerprint of the starting weights
        # the step after which a decay was last changed; 0 if it never was
        self._changed_at = 0
        self._warned: Set[str] = set()

    @property
    def is_applied(self) -> bool:
        """Whether the model holds the averages just now."""
        return self.averager is not None and self.averager.is_applied

    def start(
        self, model: nn.Module, facts: RunFacts, optimizers: Sequence[Any]
    ) -> None:
        """Get ready: training is about to start, everything is loaded."""
        check_begin(self.options, facts)
        self._estimates = 0  # a training that broke off goes on here
        self.finish()
        if self._only_evaluates:
            self._expect(None)
        part, done, before = self._pending, 0, {}
        if part is not None:
            done, before = part.steps, part.before
            self._restarted = read_count(before, 'restarted', 0)
            self._changed_at = read_count(before, CHANGED, 0)
            self._start = before.get(START)
        elif self.averager is not None:
            done = self.averager.num_steps
        # a training that goes on in this process keeps the batch size
        known = self._plan.reference if self._plan and not before else None
        self._plan = Plan(self.options, facts, done, before, known)
        if part is not None:
            self._make_averager(model)
        elif self.averager is not None:
            self.averager.schedules.update(self._plan.schedules)
        self._reported = False
        self._estimates = self.options.recalibrate
        self._iterations = self._told_iterations = 0
        self._changes = WeightChanges(
            lambda: self.averager.trained if self.averager else (),
            self._before_step,
            facts.accumulation,
        )
        scale_weight_decay(optimizers, facts.samples, self._log)

    def before_epoch(self) -> None:
        """Follow tensors that were replaced since the last epoch."""
        if self.averager is not None:
            self.averager.refresh()

    def follow(self, model: nn.Module, trains: bool = False) -> None:
        """Go on with a model that a hook has put in the place of the last.

        One that is not trained may be a part, or fused, and be there for an
        evaluation alone: averages of what it has not would be lost.
        """
        averager = self.averager
        if (
            averager is None
            or averager.is_applied
            # a wrapper has it inside
            or any(module is averager.model for module in model.modules())
            or not (trains or _shapes(model) == _shapes(averager.model))
        ):
            return
        averager.model = model
        averager.refresh()

    def before_iteration(
        self,
        model: nn.Module,
        iteration: int,
        epoch: int,
        optimizers: Sequence[Any],
    ) -> None:
        """Start the average if its time has come, after so many iterations.

        The model is unwrapped, the optimizers are those of now.
        """
        # what comes after us may have changed the weights of the last one
        self.after_iteration()
        self._iteration = iteration + 1
        averager, changes, plan = self.averager, self._changes, self._plan
        if averager is not None and averager.is_applied:
            self._log.warning(
                'EMA: an evaluation left the averages in the model; training '
                'goes on from the raw weights.'
            )
            averager.restore()
        self.follow(model, trains=True)
        begins = averager is None and has_begun(self.options, iteration, epoch)
        if begins or self._pending is not None:
            averager = self._make_averager(model)
        if not self._reported:
            self._report(model)
        if averager is None or changes is None or plan is None:
            return
        if not self._iterations:
            self._first = averager.progress()
        # the file says which epoch was the last one: a run that resumes
        # within it does not restart again
        restarts = epoch + 1 in self.options.restart_epochs
        if restarts and epoch + 1 != self._restarted:
            self._restarted, self._changed_at = epoch + 1, 0
            # the steps before are told of at the end, too
            self._first['num_steps'] -= averager.num_steps
            averager.restart()
            if self.options.posthoc:
                self._keep_start(averager)
            self._log.info(
                f'EMA: epoch {epoch + 1}: the averages start again from the '
                f'raw weights (restart_epochs).'
            )
        if not changes.told:
            # maybe nobody tells before the weights change
            averager.follow_changes()
        replaced = averager.take_replaced()
        if replaced:
            self._replacements += 1
            if math.log10(self._replacements).is_integer():
                self._log.info(report.describe_replaced(replaced))
        changes.begin(optimizers)
        self._iterations += 1
        times = changes.idle / max(_IDLE, 2 * plan.facts.accumulation)
        if times >= 1 and math.log10(times).is_integer():
            self._log.warning(report.describe_idle(changes.idle))

    def _keep_start(self, averager: WeightAverager, new: bool = True) -> None:
        """Keep the starting weights in the work folder, or look for them."""
        folder = self._plan.facts.folder if self._plan else ''
        if not folder or self._only_evaluates:
            return
        path = os.path.join(folder, start_name(self._restarted))
        if new:
            weights = averager.starting_weights()
            self._start = keep_start(path, weights, self._log)
        elif not is_there(path, self._start):
            self._log.warning(
                f'EMA: posthoc=True: {path} with the starting weights of this '
                f'run is not there: windows that reach back to its start '
                f'cannot be had afterwards. Copy it from the folder of the '
                f'run that was resumed, if that had posthoc=True.'
            )

    def _before_step(self) -> None:
        averager, changes = self.averager, self._changes
        if averager is None or changes is None or averager.is_applied:
            return
        parallel = self.options.overlap or self.options.device is not None
        if parallel and not changes.heard and changes.were_written():
            self._end_overlap(averager)
        averager.before_step()

    def after_iteration(self) -> None:
        """Update the average if the weights changed; safe to call again.

        Others may evaluate or save before an adapter's turn comes.
        """
        averager, changes = self.averager, self._changes
        if averager is None:
            return
        if changes and not averager.is_applied and changes.take():
            try:
                averager.wait()
                self._tell_skipped(averager)
                self._updated_at = self._iteration
                if not changes.told:
                    self._end_overlap(averager)
                averager.update()
            except NonFiniteError as error:
                k = self.options.interval
                seen = '' if k == 1 else f' (weights are seen every {k} steps)'
                raise NonFiniteError(
                    f'iteration {self._iteration}{seen}: {error}'
                ) from None
        self._tell_skipped(averager)

    def _end_overlap(self, averager: WeightAverager) -> None:
        """Let no update run on while nobody tells before weights change."""
        if averager.announces_steps and averager.overlaps:
            self._log.warning(
                'EMA: overlap=True has no effect from here on: the weights '
                "changed outside of an optimizer's step(). Leave it out."
            )
        averager.announces_steps = False

    def _tell_skipped(self, averager: WeightAverager) -> None:
        """Tell of a skip that has come to light; on a GPU that is later."""
        if averager.known_skipped != self._told_skipped:
            self._told_skipped = averager.known_skipped
            line = report.describe_skip(averager, self._updated_at)
            if line:
                self._log.warning(line)

    def finish(self) -> None:
        """Stop listening to the optimizers; the average stays."""
        plan, count = self._plan, self._estimates
        if count and self._iterations and plan and plan.facts.recalibrates:
            self._estimates = 0
            self._log.warning(
                f'EMA: recalibrate={count} has had no effect: training ended '
                f'before its last epoch or iteration.'
            )
        if self._changes is not None:
            self._changes.detach()
            self._changes = None
        if self.averager is not None:
            self.averager.wait()
            self._tell_skipped(self.averager)
        self.tell_steps()

    def tell_steps(self) -> None:
        """Say how many steps were averaged: once, and again at the end."""
        averager, plan, total = self.averager, self._plan, self._iterations
        told, at_the_end = self._told_iterations, self._changes is None
        if told == total or (told and not at_the_end):
            return
        if averager is None or plan is None:
            return
        self._told_iterations, now = total, averager.progress()
        steps = now['num_steps'] - self._first['num_steps']
        skipped = now['num_skipped'] - self._first['num_skipped']
        self._log.info(
            f'EMA: {steps} steps averaged, {skipped} skipped (NaN or Inf), '
            f'in {total} iterations.'
        )
        if not steps + skipped and total > plan.facts.accumulation:
            self._log.warning(report.describe_idle(total))

    def scalars(self) -> Dict[str, float]:
        """Return what loggers log of the last step."""
        averager = self.averager
        if averager is None:
            return {'ema_decay': 0.0, 'ema_distance': 0.0, 'ema_skipped': 0}
        found = {
            'ema_decay': averager.decay,
            'ema_distance': averager.distance(),
            'ema_skipped': averager.num_skipped,
        }
        # their names tell readers of the log which sets there are
        for name in averager.names[1:]:
            steps = averager.progress(name)['num_steps']
            decay = check_decay(averager.schedules[name], steps)
            found[f'ema_decay_{name}'] = decay if steps else 0.0
        return {name: x for name, x in found.items() if math.isfinite(x)}

    def synchronize(self) -> None:
        """Make the averages of buffers equal; call it on all ranks at once.

        Under ``verify_ranks`` all else is compared.
        """
        if self.averager is not None and not self.averager.synchronize():
            self._warn_once(
                'EMA: the buffers of the ranks differ in number, shape or '
                'dtype, so that their averages cannot be made equal: each '
                'rank evaluates its own, and files hold those of rank 0.'
            )
        if self.averager is not None and self.options.verify_ranks:
            self.averager.verify_ranks()

    def enter_evaluation(
        self, model: nn.Module, weights: Optional[str] = None
    ) -> None:
        """Put one of ``passes`` into the model, the main one by default."""
        self.after_iteration()
        self.follow(model)
        if self._pending is not None:
            self._make_averager(model)
        if self.averager is None:
            return
        if not self._only_evaluates:
            for name in self.averager.held_back():
                self._warn_once(
                    f'EMA: the buffer {name} holds NaN or Inf, and its '
                    f'average stays as it was before. If it is meant to, '
                    f'copied=[{name!r}] copies it.'
                )
        self.tell_steps()
        weights = weights or self.passes[-1]
        if weights != RAW:
            self.averager.apply(weights)

    def tell_evaluation(self, weights: Optional[str] = None) -> None:
        """Say whose metrics come next: of ``passes``, by default the last."""
        if self._only_evaluates or not self.options.enabled:
            return  # said when the file was read
        self.after_iteration()
        weights = weights or self.passes[-1]
        if self.averager is None:
            said = 'the raw weights: the average has not begun'
        else:
            said = passes.sets_of_weights([weights])
            if weights != RAW:
                updates = self.averager.progress(weights)['num_updates']
                said = f'{said} (n={updates})'
        self._log.info(f'EMA: evaluating {said}')

    def tell_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of several sets of weights side by side."""
        if len(self.passes) > 1:
            table = passes.compare(metrics, self.passes)
            if table:
                self._log.info(table)

    def begin_recalibration(
        self, model: nn.Module
    ) -> Optional[WeightAverager]:
        """Return the averages whose statistics are estimated again, if any.

        Call it at the end, on all ranks, before the last file is written.
        """
        self.after_iteration()
        averager, plan, count = self.averager, self._plan, self._estimates
        if not count or plan is None or not plan.facts.recalibrates:
            return None
        self._estimates, lack = 0, ''
        if averager is None:
            lack = 'the average has not begun'
        elif not layers_to_estimate(model):
            lack = 'no BatchNorm layer is in training mode'
        if lack:
            self._log.warning(
                f'EMA: recalibrate={count} has no effect: {lack}.'
            )
            return None
        self.synchronize()
        return averager

    def leave_evaluation(self) -> None:
        """Put the raw weights back; safe to call at any time."""
        if self.averager is not None:
            self.averager.restore()

    def raw_weights(self) -> ContextManager[None]:
        """Have the raw weights in the model, also within an evaluation."""
        if self.averager is None:
            return contextlib.nullcontext()
        return self.averager.taken_out()

    def save(self, checkpoint: Checkpoint) -> None:
        """Give a checkpoint with the live weights its EMA part, in place."""
        self.after_iteration()
        averager, deploy = self.averager, self.options.deploy
        averages: Dict[str, Tensor] = {}
        raws: Dict[str, Tensor] = {}
        more: Dict[str, Checkpoint] = {}
        meta = dict(self._plan.meta) if self._plan else {}
        meta['writer'] = f'mmdet_ema {__version__}'
        if averager is not None and not self._only_evaluates:
            averager.refresh()
            if averager.is_applied:
                raws = gather(averager.named_raws())
            for name in averager.names:
                named = averager.named_averages(stored=True, name=name)
                schedule = str(averager.schedules[name])
                progress, tensors = averager.progress(name), gather(named)
                if name == deploy:
                    averages = tensors
                    meta.update(progress)
                    if name != MAIN:
                        meta['schedule'] = schedule
                else:
                    more[name] = dict(schedule=schedule, **progress)
                    more[name]['state_dict'] = tensors
            told = {
                'restarted': self._restarted,
                CHANGED: self._changed_at,
                START: self._start,
                'deploy': deploy if more else '',
            }
            meta.update({key: value for key, value in told.items() if value})
        steps = meta.get('num_steps', 0)
        ema_format.pack(checkpoint, averages, raws, steps, meta, more)

    def resume(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        optimizers: Sequence[Any],
        evaluates: bool = False,
    ) -> None:
        """Go on from a checkpoint; see ``resume.for_resume``.

        With ``evaluates`` it is evaluated first, and nothing may follow.
        """
        options, log = self.options, self._log
        if evaluates:
            resume.check_evaluated(checkpoint, model, options, log)
        self._expect(
            resume.for_resume(checkpoint, model, optimizers, options, log)
        )

    def fine_tune(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        """Start again from a checkpoint's weights."""
        resume.for_fine_tuning(checkpoint, model, self.options, self._log)
        self._expect(None)

    def choose(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        """Evaluate a checkpoint; see ``resume.for_evaluation``."""
        options, log = self.options, self._log
        part = resume.for_evaluation(checkpoint, model, options, log)
        self._expect(part, only_evaluates=True)

    def _expect(
        self, part: Optional[EMAPart], only_evaluates: bool = False
    ) -> None:
        self.averager, self._pending = None, part
        self._start, self._restarted, self._changed_at = None, 0, 0
        self._only_evaluates = only_evaluates

    def _make_averager(self, model: nn.Module) -> WeightAverager:
        """Start the average: from the weights, or where the file left it."""
        part, self._pending = self._pending, None
        plan, options = self._plan, self.options
        planned = plan.planned if plan else part.steps if part else 0
        schedules = options.schedules_for(planned)
        self.averager = averager = WeightAverager(
            model, **options.of_the_averager(schedules)
        )
        averager.announces_steps = TELLS_OF_STEPS
        if plan is not None:
            averager.schedules.update(plan.schedules)
        if part is not None:
            states, more = part.states(), plan.more if plan else {}
            changed = resume.tell_sets(states, averager.names, more, self._log)
            if plan and (plan.has_changed or changed):
                self._changed_at = part.steps
            # a file without the main ones deploys others in their place
            main = states.pop(MAIN, None) or states[part.deployed]
            averager.load_state_dict({**main, 'more': states}, strict=False)
        if options.posthoc:
            self._keep_start(averager, new=part is None)
        self._told_skipped = averager.known_skipped
        return averager

    def _report(self, model: nn.Module) -> None:
        """Report in the first iteration: the tensors are known by then."""
        assert self._plan is not None
        self._reported, options = True, self.options
        if self.averager is not None:
            entries = self.averager.entries
        else:
            entries = select(model, options.update_buffers, options.copied)
        report.report(self._plan, entries, self._log)
        report.report_unsaved(model, entries, self._log)

    def _warn_once(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            self._log.warning(line)


def _shapes(model: nn.Module) -> Dict[str, Sequence[int]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.shape for name, tensor in named}
