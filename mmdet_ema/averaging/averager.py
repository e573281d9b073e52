"""The averager: averages of a model's tensors, in and out of the model."""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import (
    Any,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import torch
from torch import Tensor, nn

from mmdet_ema.averaging.averages import AverageStore
from mmdet_ema.averaging.finite import first_nonfinite
from mmdet_ema.averaging.interrupts import DeferredInterrupts
from mmdet_ema.averaging.kernels import Rule
from mmdet_ema.averaging.state import Progress, read_progress, read_tensors
from mmdet_ema.averaging.tensors import Entry, no_match, unmatched
from mmdet_ema.averaging.update import Step
from mmdet_ema.checks import (
    check_choice,
    check_count,
    check_device,
    check_flag,
    check_patterns,
)
from mmdet_ema.errors import NonFiniteError, OptionError, show
from mmdet_ema.schedules import (
    ScheduleSpec,
    build_schedule,
    check_decay,
    decay_over,
)

NONFINITE = ('skip', 'raise', 'ignore')


class WeightAverager:
    """Moving average of the weights of a model, for a plain PyTorch loop.

    Call :meth:`update` after every optimizer step; evaluate and export inside
    :meth:`applied`. Update n = 1, 2, ... is
    ``avg = d(n) * avg + (1 - d(n)) * raw``, from the weights that the model
    has when the averager is made.

    Args:
        model: The model. It is neither copied nor changed.
        schedule: Name, ``dict(type=name, **options)`` or callable n -> decay.
            Defaults to 'exponential', YOLOv5's ramp.
        interval: Steps between updates; the decay of an update is the product
            of those of its steps, so the window does not change. Defaults
            to 1.
        phase: Which step of an interval updates: steps with
            ``step % interval == phase % interval``. Defaults to 0.
        update_buffers: Whether float buffers are averaged (else copied).
            Defaults to True.
        device: Where the averages live; None for where the parameters are.
            With 'cpu' and a model on a GPU, a thread averages beside the
            training.
        overlap: Whether an update runs beside what follows it, up to
            :meth:`before_step`, which then has to be called before every
            optimizer step. Defaults to False.
        nonfinite: What to do with NaN and Inf in a parameter: 'skip' the
            step, 'raise', or 'ignore'. A buffer that holds some keeps its
            average. Defaults to 'skip'.
        rule: Updates one average in place, given the raw tensor and the step
            n, in the place of the schedule: slow. Defaults to None.
        copied: Patterns of names (``'head.queue'``, ``'*.mask'``) of tensors
            that are copied, not averaged. Integers, masks of -inf, pruning
            masks, the vectors of spectral norm and the observers of
            quantization are copied anyway. Defaults to ().
        **options: Options of a schedule given by name (``decay``, ``tau``).

    Raises:
        OptionError: If an option is unknown or out of range.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> averager = WeightAverager(model, schedule='constant', decay=0.9)
        >>> averager.update()
        True
        >>> with averager.applied():
        ...     output = model(torch.ones(1, 2))
        >>> averager.num_updates
        1
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: ScheduleSpec = 'exponential',
        *,
        interval: int = 1,
        phase: int = 0,
        update_buffers: bool = True,
        device: Union[str, torch.device, None] = None,
        overlap: bool = False,
        nonfinite: str = 'skip',
        rule: Optional[Rule] = None,
        copied: Sequence[str] = (),
        **options: Any,
    ):
        if not isinstance(model, nn.Module):
            raise OptionError(f'model={show(model)} is no torch.nn.Module.')
        self.schedule = build_schedule(schedule, **options)
        self.interval = check_count('interval', interval, 1)
        self.phase = check_count('phase', phase, 0)
        self.nonfinite = check_choice('nonfinite', nonfinite, NONFINITE)
        check_flag('update_buffers', update_buffers)
        self.model = model
        self.rule = rule
        self.overlap = check_flag('overlap', overlap)
        self.announces_steps = self.overlap
        self._followed = False
        self._progress = self._before = Progress()
        copied = check_patterns('copied', copied)
        self._store = AverageStore(
            model, update_buffers, check_device(device), self.overlap, copied
        )
        for pattern in unmatched(self.entries, copied):
            warnings.warn(no_match(pattern), stacklevel=2)

    @property
    def num_steps(self) -> int:
        """Steps that were taken in."""
        return self._settled().steps

    @property
    def num_updates(self) -> int:
        """Updates of the averages."""
        return self._settled().updates

    @property
    def num_skipped(self) -> int:
        """Steps that were left out because of NaN or Inf."""
        return self._settled().skipped

    @property
    def known_skipped(self) -> int:
        """Steps that were left out, as far as is known without waiting."""
        return self._progress.skipped

    @property
    def decay(self) -> float:
        """Decay d(n) of the last step; 0 before the first, NaN for a rule."""
        n = self.num_steps
        if self.rule is not None:
            return math.nan
        return check_decay(self.schedule, n) if n else 0.0

    @property
    def trained(self) -> Sequence[nn.Parameter]:
        """The parameters that have an average; another list if they change."""
        return self._store.trained

    @property
    def is_applied(self) -> bool:
        """Whether the model holds the averages at this moment."""
        return self._store.is_applied

    @torch.no_grad()
    def update(self) -> bool:
        """Take in the weights after an optimizer step.

        Returns:
            False if the step was skipped because of NaN or Inf. True if not,
            or if that is not known yet: on a GPU, and with ``overlap``, it
            shows in :attr:`num_skipped`.

        Raises:
            NonFiniteError: If there is NaN or Inf under ``'raise'``.
            RuntimeError: If the model holds the averages just now.
        """
        self._refuse_inside('update')
        self.settle()
        self._store.follow(rebuilt=not self._followed)
        self._followed = False
        step, after = self._next_step()
        intake = self._store.intake
        with DeferredInterrupts():
            intake.start(step)
            self._before, self._progress = self._progress, after
        if not self.announces_steps:
            intake.release()
        hurry = self.nonfinite == 'raise' or self.rule is not None
        return self.settle() if hurry or intake.is_settled else True

    def before_step(self) -> None:
        """Let an optimizer change the weights; call it before its step.

        Needed with ``overlap``; also calls :meth:`follow_changes`.
        """
        self._store.intake.release()
        self.follow_changes()
        self._followed = True

    def follow_changes(self) -> None:
        """Follow parameters that are trainable only now, replaced or added.

        An update does so, too, but for the first; called before the weights
        change, their averages start from the values before.

        Raises:
            RuntimeError: If there are any and the model holds the averages.
        """
        if self._store.has_changed:
            self._refuse_inside('follow_changes')
            self.settle()
            self._store.thaw()
            self._store.follow()

    def thaw(self) -> None:
        """Average parameters that were frozen and are trainable now.

        Call it before the step that first changes them.

        Raises:
            RuntimeError: If the model holds the averages just now.
        """
        self._refuse_inside('thaw')
        self.settle()
        self._store.thaw()

    def refresh(self) -> None:
        """Follow tensors of the model that were replaced or moved."""
        self.settle()
        self._store.refresh()

    def take_replaced(self) -> List[str]:
        """Return the parameters that became other objects since the last call.

        Their averages went on by name, with new names and shapes from the
        values that they had.
        """
        replaced, self._store.replaced = self._store.replaced, []
        return replaced

    def synchronize(self) -> bool:
        """Make the averages of buffers the same on every rank.

        Nothing else asks the other ranks: call it on all of them together,
        before evaluating. Float buffers become the mean over the ranks, the
        others those of rank 0.

        Returns:
            False if nothing was changed: the buffers of the ranks differ in
            number, shape or dtype.
        """
        self.settle()
        return self._store.synchronize()

    def apply(self) -> None:
        """Put the averages into the model until :meth:`restore`."""
        if not self.is_applied:
            self.settle()
            self._store.apply()

    def restore(self) -> None:
        """Put the raw weights back, bit for bit; no-op if they are there."""
        if self.is_applied:
            self._store.restore()

    @contextlib.contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Run the body with the averages in the model.

        The raw weights come back whatever happens in the body.

        Yields:
            The model.
        """
        inner = self.is_applied
        try:
            self.apply()
            yield self.model
        finally:
            if not inner:
                self.restore()

    def named_averages(
        self, stored: bool = False
    ) -> Iterator[Tuple[str, Tensor]]:
        """Yield every name of the model's ``state_dict`` with its average.

        Frozen parameters are their own averages; tied ones come under every
        name. The tensors are the live ones: clone what is to be kept.

        Args:
            stored: Whether to leave out frozen parameters. Defaults to False.
        """
        self.settle()
        return self._store.named_averages(stored)

    def named_raws(self) -> Iterator[Tuple[str, Tensor]]:
        """Yield every name of the model's ``state_dict`` with its raw value.

        Also right while the averages are applied; the tensors are live.
        """
        return self._store.named_raws()

    def distance(self) -> float:
        """Return ``||average - raw|| / ||raw||`` over trained parameters.

        The L2 norms run over all elements; 0 for a model without any.
        """
        self.settle()
        return self._store.distance()

    def first_nonfinite(self) -> Optional[str]:
        """Return the first tensor of the model that holds NaN or Inf."""
        return first_nonfinite(self._store.gated())

    def held_back(self) -> List[str]:
        """Name the buffers whose average stays: they hold NaN or Inf now."""
        if self.nonfinite == 'ignore':
            return []
        self.settle()
        return self._store.held_back()

    @property
    def entries(self) -> List[Entry]:
        """The unique tensors of the model, and what is done with each."""
        return self._store.entries

    def counts(self) -> Dict[str, int]:
        """Return tensors per role, and ``'bytes'`` that the averages take."""
        return self._store.counts()

    def state_dict(self) -> Dict[str, Any]:
        """Return the state: plain values, and live tensors by name."""
        return {
            **self.progress(),
            'schedule': str(self.schedule),
            'averages': dict(self.named_averages()),
        }

    def progress(self) -> Dict[str, int]:
        """Return the counters of :meth:`state_dict`."""
        progress = self._settled()
        return {
            'num_steps': progress.steps,
            'num_updates': progress.updates,
            'num_skipped': progress.skipped,
            'averaged_steps': progress.averaged,
        }

    def load_state_dict(
        self, state: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Load what :meth:`state_dict` returned.

        Args:
            state: The state; counters left out of it are derived.
            strict: Whether a name that is missing is an error; if not, the
                average of that tensor starts from the weights as they are.

        Raises:
            CheckpointError: If it is no such state, shapes differ or, under
                ``strict``, names do.
            RuntimeError: If the model holds the averages just now.
        """
        self._refuse_inside('load_state_dict')
        self.settle()
        progress = read_progress(state)
        self._store.load(read_tensors(state, 'averages'), strict)
        self._progress = progress

    def _refuse_inside(self, method: str) -> None:
        if self.is_applied:
            raise RuntimeError(f'{method}() inside applied(): leave it first.')

    def _next_step(self) -> Tuple[Step, Progress]:
        """Return the next step, and the counters once it is taken in."""
        now, gated = self._progress, self.nonfinite != 'ignore'
        number = now.steps + 1
        if number % self.interval != self.phase % self.interval:
            return Step(number, gated=gated), now._replace(steps=number)
        decay = None
        if self.rule is None:
            decay = decay_over(self.schedule, now.averaged + 1, number)
        after = now._replace(
            steps=number, updates=now.updates + 1, averaged=number
        )
        return Step(number, decay, self.rule, gated), after

    def _settled(self) -> Progress:
        self.settle()
        return self._progress

    def settle(self) -> bool:
        """Wait for the step that is under way, if there is one.

        Returns:
            False if it was skipped because of NaN or Inf, else True.

        Raises:
            NonFiniteError: If there was NaN or Inf under ``'raise'``.
        """
        if not self._store.intake.is_open:
            return True
        before = self._before
        try:
            finite = self._store.intake.join()
        except Exception:
            # what fails leaves the counters as before the step
            self._progress = before
            raise
        if finite:
            return True
        self._progress = before
        if self.nonfinite == 'raise':
            where = self.first_nonfinite() or 'a parameter'
            raise NonFiniteError(
                f'{where} holds NaN or Inf after a step; the average was '
                f'left as it was after {before.steps} steps.'
            )
        self._progress = before._replace(skipped=before.skipped + 1)
        return False
