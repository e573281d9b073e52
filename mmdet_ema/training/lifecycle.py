"""When the average starts, moves, is swapped, saved and loaded.

Knows no runner: an adapter forwards the moments of its framework. The moments
were chosen so that the average starts from the weights as they are when
training starts, after initialisation and after any load.
"""

from __future__ import annotations

import math
import warnings as python_warnings
from typing import (
    Any,
    Dict,
    Mapping,
    MutableMapping,
    Optional,
    Sequence,
    Set,
)

import torch
from torch import nn
from torch.optim import Optimizer

from mmdet_ema.averaging.averager import WeightAverager
from mmdet_ema.averaging.tensors import (
    count_roles,
    no_match,
    select,
    unmatched,
)
from mmdet_ema.checkpoint.format import (
    EMAPart,
    check_training_state,
    pack,
)
from mmdet_ema.errors import NonFiniteError
from mmdet_ema.schedules import Schedule
from mmdet_ema.training import weight_choice
from mmdet_ema.training.facts import RunFacts
from mmdet_ema.training.options import HookOptions
from mmdet_ema.training.planning import (
    check_begin,
    has_begun,
    planned_steps,
    unused,
)
from mmdet_ema.training.report import (
    buffers_of_ranks,
    changes,
    comparable,
    copied_parameters,
    describe,
    describe_rule,
    warnings,
)
from mmdet_ema.training.scaling import REFERENCE, Scaling, scaling_of
from mmdet_ema.training.skips import (
    describe_idle,
    describe_replaced,
    describe_steps,
)
from mmdet_ema.training.stepping import TELLS_OF_STEPS, WeightChanges
from mmdet_ema.version import __version__

Checkpoint = MutableMapping[str, Any]
# iterations without a step that are said at least to be unusual
_IDLE = 50


class EMALifecycle:
    """The life of one average inside a trainer.

    Args:
        options: Checked options.
        log: Where lines go; has ``info`` and ``warning``.
    """

    def __init__(self, options: HookOptions, log: Any):
        self.options = options
        self.averager: Optional[WeightAverager] = None
        self.last_iteration = self._taken_in = self._noted = 0
        self._log = log
        self._resume_part: Optional[EMAPart] = None
        self._shown_part: Optional[EMAPart] = None
        self._shown: Optional[WeightAverager] = None
        self._changes: Optional[WeightChanges] = None
        self._accumulation = 1
        self._iterations = self._told_iterations = self._replacements = 0
        self._first: Dict[str, int] = {}
        self._schedule: Optional[Schedule] = None
        self._scaling: Optional[Scaling] = None
        self._compared: Dict[str, Any] = {}
        self._warned: Set[str] = set()

    @property
    def passes(self) -> Sequence[str]:
        """The sets of weights that are evaluated, the main one last."""
        evaluate = self.options.evaluate
        return ('raw', 'ema') if evaluate == 'both' else (evaluate,)

    @property
    def evaluated(self) -> Optional[WeightAverager]:
        """The averager whose averages an evaluation shows."""
        return self._shown if self.averager is None else self.averager

    def start(
        self,
        model: nn.Module,
        facts: RunFacts,
    ) -> None:
        """Get ready: training is about to start, everything is loaded.

        Args:
            model: The model, unwrapped.
            facts: The run as planned.

        Raises:
            OptionError: If the average would start after the end.
        """
        check_begin(self.options, facts)
        self._shown = self._shown_part = None
        before = self._resume_part.meta if self._resume_part else {}
        self._plan(facts, before)
        self._resume_if_asked(model)
        self._report(model, facts, before)
        self._stop_listening()
        self._accumulation = facts.accumulation
        self._iterations = self._told_iterations = 0
        self._changes = WeightChanges(
            self._trained, self._before_step, facts.accumulation
        )

    def before_epoch(self) -> None:
        """Follow tensors that were replaced since the last epoch."""
        if self.averager is not None:
            self.averager.refresh()

    def before_iteration(
        self,
        model: nn.Module,
        iteration: int,
        epoch: int,
        optimizers: Sequence[Any],
    ) -> None:
        """Start the average if its time has come.

        Args:
            model: The model, unwrapped.
            iteration: Iterations done.
            epoch: Epochs done.
            optimizers: The optimizers of the run, as they are now.
        """
        if self.averager is not None and self.averager.is_applied:
            self._log.warning(
                'EMA: an evaluation left the averages in the model; training '
                'goes on from the raw weights.'
            )
            self.averager.restore()
        self._resume_if_asked(model)
        if self.averager is None and has_begun(self.options, iteration, epoch):
            assert self._schedule is not None
            self.averager = self._make(model, self._schedule)
        if self.averager is not None and self._changes is not None:
            self._begin(self.averager, self._changes, optimizers)

    def after_iteration(self, iteration: int) -> bool:
        """Update the average if the weights changed, once an iteration.

        Args:
            iteration: The iteration that ends, from 1.

        Returns:
            False if a step turned out to be skipped because of NaN or Inf:
            that of ``last_iteration``; else True.

        Raises:
            NonFiniteError: If there is NaN or Inf under ``'raise'``.
        """
        averager, changes = self.averager, self._changes
        if averager is None:
            return True
        if averager.is_applied or changes is None or not changes.take():
            return self._note_skips()
        try:
            averager.wait()
            fine = self._note_skips()
            self._taken_in = iteration
            if not changes.told:
                self._end_overlap(averager)
            averager.update()
            self._note_replaced(averager)
            return self._note_skips() and fine
        except NonFiniteError as error:
            k = self.options.interval
            seen = '' if k == 1 else f' (weights are seen every {k} steps)'
            raise NonFiniteError(
                f'iteration {iteration}{seen}: {error}'
            ) from None

    def finish(self) -> None:
        """Stop listening to the optimizers; the average stays."""
        self._stop_listening()
        self.tell_steps()

    def tell_steps(self) -> None:
        """Say how many steps were averaged: once, and again at the end."""
        averager, total = self.averager, self._iterations
        at_the_end = self._changes is None
        if averager is None or self._told_iterations == total:
            return
        if self._told_iterations and not at_the_end:
            return
        self._told_iterations, now = total, averager.progress()
        steps, skipped = (
            now[name] - self._first[name]
            for name in ('num_steps', 'num_skipped')
        )
        self._log.info(describe_steps(steps, skipped, total))
        if not steps + skipped and total > self._accumulation:
            self._log.warning(describe_idle(total))

    def synchronize(self) -> None:
        """Make the averages of buffers equal; call it on all ranks at once."""
        if self.averager is not None and not self.averager.synchronize():
            self._warn_once(
                'EMA: the buffers of the ranks differ in number, shape or '
                'dtype, so that their averages cannot be made equal: each '
                'rank evaluates its own, and files hold those of rank 0.'
            )

    def enter_evaluation(
        self, model: nn.Module, weights: Optional[str] = None
    ) -> None:
        """Put the averages into the model, if they are to be evaluated.

        Args:
            model: The model, unwrapped.
            weights: One of ``passes``; the main one by default.
        """
        self._resume_if_asked(model)
        if self._shown_part is not None:
            part, self._shown_part = self._shown_part, None
            schedule = self.options.schedule_for(part.steps)
            self._shown = self._from_part(model, schedule, part)
        if self.averager is not None:
            for name in self.averager.held_back():
                self._warn_once(
                    f'EMA: the buffer {name} holds NaN or Inf, and its '
                    f'average stays as it was before. If it is meant to, '
                    f'copied=[{name!r}] copies it.'
                )
        self.tell_steps()
        weights = weights or self.passes[-1]
        if self.evaluated is not None and weights != 'raw':
            self.evaluated.apply()

    def leave_evaluation(self) -> None:
        """Put the raw weights back; safe to call at any time."""
        if self.evaluated is not None:
            self.evaluated.restore()

    def save(self, checkpoint: Checkpoint) -> None:
        """Give a checkpoint its EMA part, in place.

        Args:
            checkpoint: A checkpoint whose ``state_dict`` is the live model's.
        """
        averager = self.averager
        meta = {**self._compared, 'writer': f'mmdet_ema {__version__}'}
        if averager is None:
            pack(checkpoint, {}, {}, 0, meta)
            return
        averager.refresh()
        averages = dict(averager.named_averages(stored=True))
        raws = dict(averager.named_raws()) if averager.is_applied else {}
        meta.update(averager.progress())
        pack(checkpoint, averages, raws, averager.num_steps, meta)

    def resume(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
    ) -> None:
        """Go on from a checkpoint; see ``weight_choice.for_resume``."""
        strict = self.options.strict_load
        part = weight_choice.for_resume(checkpoint, model, strict, self._log)
        check_training_state(checkpoint, optimizers, self._log)
        self._resume_part, self.averager = part, None

    def fine_tune(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        """Start anew from a checkpoint's weights."""
        self.averager = self._resume_part = None
        weight_choice.for_fine_tuning(checkpoint, model, self._log)

    def choose(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        """Evaluate a checkpoint; see ``weight_choice.for_evaluation``."""
        self.averager = self._resume_part = self._shown = None
        self._shown_part = weight_choice.for_evaluation(
            checkpoint, model, self.options.evaluate, self._log
        )

    def _warn_once(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            self._log.warning(line)

    def _note_skips(self) -> bool:
        """Return whether no skipped step has come to light since the last."""
        assert self.averager is not None
        known = self.averager.known_skipped
        if known == self._noted:
            return True
        self._noted, self.last_iteration = known, self._taken_in
        return False

    def _begin(
        self,
        averager: WeightAverager,
        changes: WeightChanges,
        optimizers: Sequence[Any],
    ) -> None:
        if not self._iterations:
            self._first = averager.progress()
        if not changes.told:
            # maybe nobody tells before the weights change
            averager.follow_changes()
        self._note_replaced(averager)
        changes.begin(optimizers)
        self._iterations += 1
        limit = max(_IDLE, 2 * self._accumulation)
        times = changes.idle / limit
        if times >= 1 and math.log10(times).is_integer():
            self._log.warning(describe_idle(changes.idle))

    def _trained(self) -> Sequence[nn.Parameter]:
        return () if self.averager is None else self.averager.trained

    def _before_step(self) -> None:
        averager, changes = self.averager, self._changes
        if averager is None or changes is None or averager.is_applied:
            return
        beside = self.options.overlap or self.options.device is not None
        if beside and not changes.heard and changes.were_written():
            self._end_overlap(averager)
        averager.before_step()

    def _end_overlap(self, averager: WeightAverager) -> None:
        """Let no update run on while nobody tells before weights change."""
        if averager.announces_steps and self.options.overlap:
            self._log.warning(
                'EMA: overlap=True has no effect from here on: the weights '
                "changed outside of an optimizer's step(). Leave it out."
            )
        averager.announces_steps = False

    def _note_replaced(self, averager: WeightAverager) -> None:
        names = averager.take_replaced()
        if names:
            self._replacements += 1
            if math.log10(self._replacements).is_integer():
                self._log.info(describe_replaced(names))

    def _stop_listening(self) -> None:
        if self._changes is not None:
            self._changes.detach()
            self._changes = None
        if self.averager is not None:
            self.averager.wait()

    def _plan(self, facts: RunFacts, before: Mapping[str, Any]) -> None:
        """Fix the schedule; it may need to know how long the run is."""
        planned = planned_steps(self.options, facts, self._done())
        schedule = self.options.schedule_for(planned)
        if before or self._scaling is None:
            applied = self.options.scale_decay
            self._scaling = scaling_of(before, facts.samples, applied)
        self._schedule = self._scaling.of(schedule)
        if self.averager is not None:
            self.averager.schedule = self._schedule
        self._compared = comparable(
            schedule,
            self.options.interval,
            facts.batch_size * facts.accumulation,
            facts.world_size,
        )
        self._compared[REFERENCE] = self._scaling.saved

    def _done(self) -> int:
        """Return the steps that the average has seen before this training."""
        if self.averager is not None:
            return self.averager.num_steps
        return self._resume_part.steps if self._resume_part else 0

    def _resume_if_asked(self, model: nn.Module) -> None:
        if self._resume_part is not None:
            part, self._resume_part = self._resume_part, None
            schedule = self._schedule or self.options.schedule_for(part.steps)
            self.averager = self._from_part(model, schedule, part)

    def _make(self, model: nn.Module, schedule: Schedule) -> WeightAverager:
        with python_warnings.catch_warnings():
            # the report says so, in the run's log
            python_warnings.filterwarnings('ignore', 'copied=')
            averager = WeightAverager(
                model,
                schedule,
                interval=self.options.interval,
                phase=self.options.phase,
                update_buffers=self.options.update_buffers,
                device=self.options.device,
                overlap=self.options.overlap,
                nonfinite=self.options.nonfinite,
                rule=self.options.rule,
                copied=self.options.copied,
            )
        averager.announces_steps = TELLS_OF_STEPS
        self._noted = 0
        return averager

    def _from_part(
        self, model: nn.Module, schedule: Schedule, part: EMAPart
    ) -> WeightAverager:
        averager = self._make(model, schedule)
        averages = part.tensors(part.averages)
        state = {**part.meta, 'num_steps': part.steps, 'averages': averages}
        averager.load_state_dict(state, strict=False)
        self._noted = averager.known_skipped
        return averager

    def _report(
        self, model: nn.Module, facts: RunFacts, before: Mapping[str, Any]
    ) -> None:
        assert self._schedule is not None
        if self.averager is None:
            options = self.options
            entries = select(model, options.update_buffers, options.copied)
        else:
            entries = self.averager.entries
        done = self._done()
        planned = planned_steps(self.options, facts, done)
        counts, phase = count_roles(entries), self.options.phase
        plan = (self._schedule, self.options.interval)
        if self.options.rule is None:
            self._log.info(describe(*plan, done, planned, counts, phase))
            found = warnings(*plan, planned, phase)
        else:
            self._log.info(describe_rule(self._schedule.name, counts))
            found = []
        found += [f'EMA: {x}' for x in unused(self.options, facts, done)]
        if self.options.overlap and not TELLS_OF_STEPS:
            found.append(
                f'EMA: overlap=True has no effect: torch {torch.__version__} '
                f'does not tell of the steps of optimizers, 2.0 does.'
            )
        found += [copied_parameters(entries), changes(before, self._compared)]
        missing = unmatched(entries, self.options.copied)
        found += [f'EMA: {no_match(pattern)}' for pattern in missing]
        if facts.world_size > 1:
            buffers = sum(not entry.parameters for entry in entries)
            self._log.info(buffers_of_ranks(buffers, facts.agrees))
        if self._scaling is not None and self.options.rule is None:
            plain = self.options.schedule_for(planned)
            found.append(self._scaling.describe(plain))
        for line in filter(None, found):
            self._log.warning(line)
