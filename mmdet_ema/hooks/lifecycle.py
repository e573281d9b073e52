"""When the average starts, moves, is swapped, saved and loaded.

Knows no runner: an adapter forwards the moments of its framework. The moments
were chosen so that the average starts from the weights as they are when
training starts, after initialisation and after any load.
"""

from __future__ import annotations

from typing import Any, Dict, MutableMapping, Optional, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from mmdet_ema.checkpoint.layout import EMAPart, pack, put_raw, unpack
from mmdet_ema.core.averager import WeightAverager
from mmdet_ema.core.errors import CheckpointError, NonFiniteError, OptionError
from mmdet_ema.core.schedules import Schedule
from mmdet_ema.core.selection import select
from mmdet_ema.core.store import check_fit, count_roles
from mmdet_ema.hooks.facts import RunFacts
from mmdet_ema.hooks.options import HookOptions
from mmdet_ema.hooks.report import changes, comparable, describe, warnings
from mmdet_ema.hooks.stepping import StepCounter
from mmdet_ema.version import __version__


class EMALifecycle:
    """The life of one average inside a trainer.

    Args:
        options: Checked options.
        log: Where lines go; has ``info`` and ``warning``.
    """

    def __init__(self, options: HookOptions, log: Any):
        self.options = options
        self.averager: Optional[WeightAverager] = None
        self._log = log
        self._pending: Optional[EMAPart] = None
        self._steps: Optional[StepCounter] = None
        self._schedule: Optional[Schedule] = None
        self._compared: Dict[str, Any] = {}

    @property
    def swaps(self) -> bool:
        """Whether evaluation runs on the averages at all."""
        return self.options.evaluate != 'raw'

    def start(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        facts: RunFacts,
    ) -> None:
        """Get ready: training is about to start, everything is loaded.

        Args:
            model: The model, unwrapped.
            optimizers: Every optimizer of the run.
            facts: The run as planned.

        Raises:
            OptionError: If the average would start after the end.
        """
        self._check_begin(facts)
        done = self._pending.steps if self._pending else 0
        planned = done + self._steps_left(facts, bool(done))
        self._schedule = self.options.schedule_for(planned)
        self._compared = comparable(
            self._schedule,
            self.options.interval,
            facts.batch_size * facts.accumulation,
            facts.world_size,
        )
        self._report(model, done, planned)
        self.averager = self._resumed(model) if self._pending else None
        self._detach()
        self._steps = StepCounter(optimizers, self._thaw)

    def before_iteration(
        self, model: nn.Module, iteration: int, epoch: int
    ) -> None:
        """Start the average if its time has come.

        Args:
            model: The model, unwrapped.
            iteration: Iterations done.
            epoch: Epochs done.
        """
        begun = (
            iteration + 1 >= self.options.begin_iter
            and epoch + 1 >= self.options.begin_epoch
        )
        if self.averager is None and begun:
            self.averager = self._make(model)

    def after_iteration(self, iteration: int) -> bool:
        """Update the average if the iteration took a step.

        Args:
            iteration: The iteration that ends, from 1.

        Returns:
            False if the step was skipped because of NaN or Inf, else True.

        Raises:
            NonFiniteError: If there is NaN or Inf under ``'raise'``.
        """
        stepped = self._steps is not None and self._steps.take()
        if self.averager is None or not stepped:
            return True
        try:
            return self.averager.update()
        except NonFiniteError as error:
            raise NonFiniteError(f'iteration {iteration}: {error}') from None

    def before_epoch(self) -> None:
        """Follow tensors that were replaced since the last epoch."""
        if self.averager is not None:
            self.averager.refresh()

    def enter_evaluation(self, model: nn.Module) -> None:
        """Put the averages into the model, if they are to be evaluated.

        Args:
            model: The model, unwrapped.
        """
        if self.averager is None and self._pending is not None:
            self._schedule = self.options.schedule_for(self._pending.steps)
            self.averager = self._resumed(model)
        if self.averager is not None and self.swaps:
            self.averager.apply()

    def leave_evaluation(self) -> None:
        """Put the raw weights back; safe to call at any time."""
        if self.averager is not None:
            self.averager.restore()

    def finish(self) -> None:
        """Stop listening to the optimizers; the average stays."""
        self._detach()

    def save(self, checkpoint: MutableMapping[str, Any]) -> None:
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
        self, checkpoint: MutableMapping[str, Any], model: nn.Module
    ) -> None:
        """Take the average from a checkpoint that training resumes from.

        The checkpoint's ``state_dict`` holds the raw weights afterwards, for
        the framework to load.

        Args:
            checkpoint: The checkpoint, changed in place.
            model: The model, unwrapped; only its shapes are looked at.

        Raises:
            CheckpointError: If the EMA part does not fit the model.
        """
        part = unpack(checkpoint)
        self._pending = part if part is not None and part.steps else None
        if part is None:
            self._log.warning(
                'EMA: the checkpoint has no EMA part; the average starts '
                'from its weights.'
            )
            return
        self._check_part(part, model)
        put_raw(checkpoint, part)

    def fine_tune(self, checkpoint: MutableMapping[str, Any]) -> None:
        """Note that training starts from a checkpoint's weights.

        Args:
            checkpoint: The checkpoint; left as it is.
        """
        self.averager = self._pending = None
        part = unpack(checkpoint)
        origin = 'weights' if part is None else f'averages (n={part.steps})'
        self._log.info(
            f'EMA: the average starts from the {origin} of the checkpoint.'
        )

    def choose(
        self, checkpoint: MutableMapping[str, Any], model: nn.Module
    ) -> None:
        """Choose the weights of a checkpoint that will be evaluated.

        Args:
            checkpoint: The checkpoint, changed in place.
            model: The model, unwrapped; only its shapes are looked at.

        Raises:
            CheckpointError: If there are no raw weights and they are asked
                for, or the EMA part does not fit the model.
        """
        self.averager = self._pending = None
        evaluate = self.options.evaluate
        part = unpack(checkpoint)
        if part is None and evaluate != 'ema':
            raise CheckpointError(
                f'evaluate={evaluate!r} needs raw weights, but the checkpoint '
                f'holds one set of weights and no EMA part; use '
                f"evaluate='ema' to test what it holds."
            )
        if part is None:
            self._log.info(
                'EMA: no EMA part in the checkpoint; its weights '
                'are evaluated as they are.'
            )
            return
        self._log.info(
            f'EMA: evaluating {_SETS[evaluate]} of the checkpoint '
            f'(n={part.steps}).'
        )
        if evaluate != 'ema':
            put_raw(checkpoint, part)
        if evaluate == 'both':
            self._check_part(part, model)
            self._pending = part

    def _thaw(self) -> None:
        if self.averager is not None:
            self.averager.thaw()

    def _detach(self) -> None:
        if self._steps is not None:
            self._steps.detach()

    def _make(self, model: nn.Module) -> WeightAverager:
        assert self._schedule is not None
        return WeightAverager(
            model,
            self._schedule,
            interval=self.options.interval,
            phase=self.options.phase,
            update_buffers=self.options.update_buffers,
            device=self.options.device,
            nonfinite=self.options.nonfinite,
        )

    def _resumed(self, model: nn.Module) -> WeightAverager:
        part, self._pending = self._pending, None
        assert part is not None
        averager = self._make(model)
        averages = part.tensors(part.averages)
        state = {**part.meta, 'num_steps': part.steps, 'averages': averages}
        averager.load_state_dict(state, strict=False)
        return averager

    def _check_begin(self, facts: RunFacts) -> None:
        begin, end = self.options.begin_epoch, facts.max_epochs
        if begin > end:
            hint = '' if facts.by_epoch else ' of an iteration-based run'
            raise OptionError(
                f'begin_epoch={begin} is past the end: {end} epoch(s){hint} '
                f'are planned. Use begin_epoch <= {end} or begin_iter.'
            )
        if self.options.begin_iter > facts.max_iters:
            raise OptionError(
                f'begin_iter={self.options.begin_iter} is past the end: '
                f'{facts.max_iters} iterations are planned.'
            )

    def _steps_left(self, facts: RunFacts, running: bool) -> int:
        epochs = max(self.options.begin_epoch - 1, 0)
        begin = max(self.options.begin_iter - 1, 0)
        begin = max(begin, epochs * facts.iters_per_epoch)
        first = facts.iteration if running else max(facts.iteration, begin)
        return -(-(facts.max_iters - first) // facts.accumulation)

    def _report(self, model: nn.Module, done: int, planned: int) -> None:
        assert self._schedule is not None
        counts = count_roles(select(model, self.options.update_buffers))
        interval = self.options.interval
        text = describe(self._schedule, interval, done, planned, counts)
        self._log.info(text)
        for line in warnings(self._schedule, interval, planned):
            self._log.warning(line)
        for line in self.options.no_effect:
            self._log.warning(f'EMA: {line}')
        before = self._pending.meta if self._pending else {}
        changed = changes(before, self._compared)
        if changed:
            self._log.warning(changed)

    def _check_part(self, part: EMAPart, model: nn.Module) -> None:
        shapes = {
            name: value
            for name, value in model.state_dict().items()
            if isinstance(value, torch.Tensor)
        }
        strict = self.options.strict_load
        try:
            check_fit(shapes, part.tensors(part.averages), strict)
            check_fit(shapes, part.tensors(part.raws), strict)
        except CheckpointError as error:
            raise CheckpointError(
                f'cannot resume the EMA: {error} To fine-tune from this file, '
                f'use load_from without resume.'
            ) from None
        missing = [name for name in shapes if name not in part.averages]
        if missing:
            self._log.warning(
                f'EMA: {len(missing)} tensors of the model are not in the '
                f'checkpoint ({", ".join(missing[:3])}, ...); their average '
                f'starts from the weights as they are.'
            )


_SETS = {
    'ema': 'the averages',
    'raw': 'the raw weights',
    'both': 'the averages and the raw weights',
}
