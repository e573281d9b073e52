"""The averager: averages of a model's tensors, in and out of the model."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import (
    Any,
    Callable,
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

from mmdet_ema.averaging import fsdp1
from mmdet_ema.averaging.averages import (
    MAIN,
    POSTHOC,
    Averages,
    cut_into_pieces,
    join_pieces,
)
from mmdet_ema.averaging.distributed import (
    first_difference,
    make_equal,
    world_size,
)
from mmdet_ema.averaging.model_changes import ModelChanges
from mmdet_ema.averaging.overlap import side_stream
from mmdet_ema.averaging.shards import (
    gather,
    ranks_of,
    reshard,
    sharded_modules,
)
from mmdet_ema.averaging.state import (
    Progress,
    check_fit,
    own_memory,
    read_count,
    read_progress,
    read_tensors,
)
from mmdet_ema.averaging.swap import unmerged
from mmdet_ema.averaging.tensors import (
    Role,
    count_roles,
    is_finite,
    no_match,
    select,
    unmatched,
)
from mmdet_ema.averaging.update import (
    DeferredInterrupts,
    DeviceVerdict,
    Rule,
    UpdatePlan,
    all_finite,
)
from mmdet_ema.checks import (
    check_averages,
    check_choice,
    check_count,
    check_device,
    check_flag,
    check_patterns,
)
from mmdet_ema.errors import (
    CheckpointError,
    NonFiniteError,
    OptionError,
    show,
)
from mmdet_ema.schedules import (
    Schedule,
    ScheduleSpec,
    a_tenth,
    build_schedule,
    check_decay,
    decay_over,
)

NONFINITE = ('skip', 'raise', 'ignore')
# attributes that follow from the model's tensors and their averages
_PLANNED = ('_plan', '_changes', '_stream', '_unwatched')


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
            With 'cpu' and a model on a GPU they come to the GPU for an
            update, tensor by tensor, and go back.
        overlap: Whether an update on a GPU runs in parallel with what follows
            it, up to :meth:`before_step`, which then has to be called before
            every optimizer step. Nothing changes on a CPU. Defaults to False.
        nonfinite: What to do with NaN and Inf in a parameter: 'skip' the
            step, 'raise', or 'ignore'. A buffer that holds some keeps its
            average. Defaults to 'skip'.
        rule: Updates one average in place, given the raw tensor and the step
            n, instead of the schedule: slow. Defaults to None.
        copied: Patterns of names (``'head.queue'``, ``'*.mask'``) of tensors
            that are copied, not averaged. Integers, masks of -inf, pruning
            masks, the vectors of spectral norm and the observers of
            quantization are copied anyway. Defaults to ().
        averages: Further averages of the same steps, by name: each a dict of
            schedule options (``schedule``, ``decay``, ``tau``, ...) and
            ``device``. The main one is 'ema'. Defaults to none.
        posthoc: Whether to add an average 'posthoc', in host memory, with a
            tenth of the window of the main one, and to keep the starting
            weights (:meth:`starting_weights`): of these and the main one,
            averages with other windows can be made after the training.
            Defaults to False.
        **options: Options of a schedule given by name (``decay``, ``tau``).

    Raises:
        OptionError: If an option is unknown or out of range, or two tensors
            of the model share a part of their memory.
        ValueError: If a parameter has no shape yet (a lazy module).

    Attributes:
        schedules: The schedule of each average by name, the main one first.
        entries: The unique tensors of the model, and what is done with each.
        model: The model. After another one was put there call
            :meth:`refresh`.
        trained: The parameters that have an average; another list where they
            are others.
        announces_steps: Whether :meth:`before_step` is called before every
            step, so that an update may go on until then.

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
        averages: Optional[Mapping[str, Mapping[str, Any]]] = None,
        posthoc: bool = False,
        **options: Any,
    ):
        if not isinstance(model, nn.Module):
            raise OptionError(f'model={show(model)} is no torch.nn.Module.')
        device = check_device(device)
        self.schedules = {MAIN: build_schedule(schedule, **options)}
        self._devices = {MAIN: device}
        more = check_averages('averages', averages)
        self.schedules.update(further_schedules(more))
        for name, given in more.items():
            self._devices[name] = check_device(given.get('device', device))
        self.posthoc = check_flag('posthoc', posthoc)
        if self.posthoc:
            self.schedules[POSTHOC] = a_tenth(self.schedules[MAIN])
            self._devices[POSTHOC] = torch.device('cpu')
        if rule is not None and len(self.schedules) > 1:
            raise OptionError(
                'averages= and posthoc=True need schedules, and the average '
                'has a rule of its own instead; leave one of the two out.'
            )
        self.interval = check_count('interval', interval, 1)
        self.phase = check_count('phase', phase, 0)
        self.nonfinite = check_choice('nonfinite', nonfinite, NONFINITE)
        self.update_buffers = check_flag('update_buffers', update_buffers)
        self.overlap = check_flag('overlap', overlap)
        self.copied = check_patterns('copied', copied)
        self.model = model
        self.rule = rule
        self.announces_steps = self.overlap
        self._progress = {name: Progress() for name in self.schedules}
        self._before, self._skipped = self._progress, 0
        # of the update that is under way; None if there is none
        self._verdict: Union[bool, DeviceVerdict, None] = None
        self._replaced: List[str] = []
        self._applied: Optional[str] = None  # what the model holds now
        self._places: List[Any] = []
        self.trained: List[nn.Parameter] = []
        self._select()
        for pattern in unmatched(self.entries, self.copied):
            raise OptionError(no_match(pattern))
        self._plan_updates()
        self._starting: Optional[Dict[str, Tensor]] = None
        self._keep_starting_weights()

    def __getstate__(self) -> Dict[str, Any]:
        self.wait()
        # a copy plans for its own tensors; it cannot while they hold averages
        planned = () if self.is_applied else _PLANNED
        return {k: x for k, x in vars(self).items() if k not in planned}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        vars(self).update(state)
        if '_plan' not in state:
            self._plan_updates()

    @property
    def names(self) -> Tuple[str, ...]:
        """Names of the averages, the main one first."""
        return tuple(self.schedules)

    @property
    def schedule(self) -> Schedule:
        """Schedule of the main average; another one may be set."""
        return self.schedules[MAIN]

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        self.schedules[MAIN] = schedule

    @property
    def num_steps(self) -> int:
        """Steps that were counted, without the skipped ones."""
        return self._waited(MAIN).steps

    @property
    def num_updates(self) -> int:
        """Updates of the averages."""
        return self._waited(MAIN).updates

    @property
    def num_skipped(self) -> int:
        """Steps that were left out because of NaN or Inf."""
        self.wait()
        return self._skipped

    @property
    def known_skipped(self) -> int:
        """Steps that were left out, as far as is known without waiting."""
        return self._skipped

    @property
    def decay(self) -> float:
        """Decay d(n) of the last step; 0 before the first, NaN for a rule."""
        n = self.num_steps
        if self.rule is not None:
            return math.nan
        return check_decay(self.schedule, n) if n else 0.0

    @property
    def is_applied(self) -> bool:
        """Whether the model holds averages at this moment."""
        return self._applied is not None

    @property
    def overlaps(self) -> bool:
        """Whether updates run in parallel with the training: on a GPU only."""
        return self.overlap and self._stream is not None

    @torch.no_grad()
    def update(self) -> bool:
        """Update the averages after an optimizer step.

        Returns:
            False if the step was skipped because of NaN or Inf. True if not,
            or if that is not known yet: on a GPU, it shows in
            :attr:`num_skipped`.

        Raises:
            NonFiniteError: If there is NaN or Inf under ``'raise'``.
            RuntimeError: If the model holds the averages just now, or a
                tensor cannot be followed.
        """
        self._refuse_inside('update')
        self.wait()
        self._follow()
        after, decays = self._next_step()
        main = after[MAIN]
        with DeferredInterrupts():
            self._plan.read(updates=main.averaged == main.steps)
            if self._stream is None:
                self._verdict = self._run(main, decays)
            else:
                self._verdict = self._stream.run(
                    lambda: self._run(main, decays)
                )
            self._before, self._progress = self._progress, after
        if self._stream is not None and not self.announces_steps:
            self._stream.release()
        known = self._verdict is False or (
            self._verdict is True and self._stream is None
        )
        return self.wait() if known or self.nonfinite == 'raise' else True

    def before_step(self) -> None:
        """Let an optimizer change the weights; call it before its step.

        Needed with ``overlap``; also calls :meth:`follow_changes`.
        """
        if self._stream is not None:
            self._stream.release()
        self.follow_changes()

    def follow_changes(self) -> None:
        """Follow parameters that have just become trainable, or were replaced.

        An update does so, too; called before the weights change, their
        averages start from the values before.

        Raises:
            RuntimeError: If there are any and the model holds the averages.
        """
        if self._changes.noticed():
            self._refuse_inside('follow_changes')
            self.wait()
            self._follow()

    def refresh(self) -> None:
        """Follow tensors of the model that were replaced or moved.

        So are those of another model that was put in its place.

        Averages are carried over with the parameter where it is the same
        object under any name, else by name.
        """
        self.wait()
        other = self._changes.model is not self.model
        if not self.is_applied and (other or self._changes.any()):
            self._select_again()

    def take_replaced(self) -> List[str]:
        """Return the parameters that are other objects since the last call.

        Their averages go on by name; where a name or shape is new, they start
        from the present values.
        """
        replaced, self._replaced = self._replaced, []
        return replaced

    def synchronize(self) -> bool:
        """Make the averages of buffers the same on every rank.

        Nothing else asks the other ranks: call it on all of them together,
        before evaluating. Float buffers become the mean over the ranks, the
        others those of rank 0.

        While the averages are applied nothing is done.

        Returns:
            False if nothing was changed: the buffers of the ranks differ in
            number, shape or dtype.
        """
        self.wait()
        if world_size() == 1 or self.is_applied:
            return True
        means: List[Tensor] = []
        copies: List[Tensor] = []
        for averages in self._sets.values():
            for i, average in averages.tensors.items():
                if not self.entries[i].parameters:
                    has_mean = self.entries[i].has_mean
                    (means if has_mean else copies).append(average)
        return make_equal(means, copies)

    def verify_ranks(self) -> None:
        """Check that parameters and averages are the same on every rank.

        Bit for bit, by a checksum each; call it on all ranks together, after
        :meth:`synchronize`. What is sharded is left out: no other rank has it.

        Raises:
            RuntimeError: On every rank, with the name of the first tensor that
                differs.
        """
        self.wait()
        if world_size() == 1 or self.is_applied:
            return
        whole = [(i, e) for i, e in enumerate(self.entries) if not e.is_part]
        named = [(e.name, e.raw) for _, e in whole if e.parameters]
        for name, averages in self._sets.items():
            named += [
                (f'{entry.name} of the averages {name!r}', averages.tensors[i])
                for i, entry in whole
                if i in averages.tensors
            ]
        found = first_difference(named)
        if found is not None:
            raise RuntimeError(
                f'verify_ranks: {found} is not the same on all ranks after '
                f'{self.num_steps} steps: they train, and average, different '
                f'models. Look for what only some of them do, such as a seed, '
                f'a hook or a file of its own.'
            )

    def apply(self, name: str = MAIN) -> None:
        """Put averages into the model until :meth:`restore`.

        Args:
            name: Which ones. Defaults to 'ema', the main ones.

        Raises:
            OptionError: If there are none of that name.
            RuntimeError: If the model holds others.
        """
        self._check_name(name)
        if self._applied not in (None, name):
            raise RuntimeError(
                f'the model holds the averages {self._applied!r}: leave '
                f'applied() before {name!r} are put in.'
            )
        if self.is_applied:
            return
        self.wait()  # what is merged is written into the raw weights
        with unmerged(self.model):
            self.refresh()
            known = {id(entry.raw) for entry in self.entries}
            # an evaluation may put another tensor where one of these was
            self._places = [
                (owner, name, tensor)
                for module in self.model.modules()
                for owner in (module._parameters, module._buffers)
                for name, tensor in owner.items()
                if id(tensor) in known
            ]
            self._changes.forget_gathered()
            with DeferredInterrupts():
                self._sets[name].swap.swap_in()
                self._applied = name

    def restore(self) -> None:
        """Put the raw weights back, bit for bit; no-op if they are there."""
        self._changes.recover()
        name = self._applied
        if name is None:
            return
        with DeferredInterrupts(), unmerged(self.model):
            self._changes.forget_gathered()
            self._sets[name].swap.swap_out()
            self._applied = None
            for owner, name, tensor in self._places:
                if name in owner:
                    owner[name] = tensor
            self._places = []

    @contextlib.contextmanager
    def applied(self, name: str = MAIN) -> Iterator[nn.Module]:
        """Run the body with averages in the model.

        The raw weights come back whatever happens in the body. What the body
        writes into the model's tensors (``load_state_dict``, ``half()``) is
        written into the averages.

        Args:
            name: Which ones. Defaults to 'ema', the main ones.

        Yields:
            The model.
        """
        inner = self.is_applied
        try:
            self.apply(name)
            yield self.model
        finally:
            if not inner:
                self.restore()

    @contextlib.contextmanager
    def taken_out(self) -> Iterator[None]:
        """Run the body with the raw weights in the model, wherever it is."""
        name = self._applied
        self.restore()
        try:
            yield
        finally:
            if name is not None:
                self.apply(name)

    def named_averages(
        self, stored: bool = False, name: str = MAIN
    ) -> Iterator[Tuple[str, Tensor]]:
        """Yield every name of the model's ``state_dict`` with its average.

        Frozen parameters are their own averages; tied ones come under every
        name. The tensors are the live ones, and small ones are views of one
        memory: clone what is to be kept. What FSDP1 has cut is put together:
        on rank 0 alone, and all ranks have to call it.

        Args:
            stored: Whether to leave out frozen parameters. Defaults to False.
            name: Which averages. Defaults to 'ema', the main ones.
        """
        self._check_name(name)
        self.wait()
        averages = self._sets[name]
        return self._named(averages, averages.swap.average, stored)

    def named_parts(self, name: str = MAIN) -> Iterator[Tuple[str, Tensor]]:
        """Yield averages as this rank holds them: live, cut by FSDP1, too."""
        return self._sets[name].named()

    def named_raws(self) -> Iterator[Tuple[str, Tensor]]:
        """Yield every name of the model's ``state_dict`` with its raw value.

        Right while the averages are applied, too; the tensors are those of
        :meth:`named_averages`.
        """
        averages = self._sets[self._applied or MAIN]
        return self._named(averages, averages.swap.raw)

    def _named(
        self,
        averages: Averages,
        value_of: Callable[[int], Tensor],
        stored: bool = False,
    ) -> Iterator[Tuple[str, Tensor]]:
        """Yield names of the ``state_dict`` with the value of their entry."""
        if not fsdp1.saves_whole(self.model, self._modules):
            return averages.named(value_of, stored=stored)
        self._changes.reshard()
        found = join_pieces(self.model, self.entries, value_of, stored)
        return iter(found.items())

    def starting_weights(self) -> Dict[str, Tensor]:
        """Return the weights that the averages started from, by name.

        Under ``posthoc``: every name of the model's ``state_dict``, in host
        memory. They are not in :meth:`state_dict`, as they never change: save
        them once, and give them back after :meth:`load_state_dict`.

        Raises:
            RuntimeError: If there are none.
        """
        if self._starting is None:
            raise RuntimeError(
                'the starting weights are not known: they are kept under '
                'posthoc=True, and after load_state_dict() they have to be '
                'given back by set_starting_weights().'
                if self.posthoc
                else 'the starting weights are kept under posthoc=True alone.'
            )
        return dict(self._starting)

    def set_starting_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Give back what :meth:`starting_weights` returned before a resume.

        Raises:
            CheckpointError: If a name or shape is not that of the model.
        """
        given = read_tensors({'weights': weights}, 'weights')
        check_fit(dict(self.named_raws()), given, strict=True)
        self._starting = {name: x.cpu() for name, x in given.items()}

    def distance(self, name: str = MAIN) -> float:
        """Return ``||average - raw|| / ||raw||`` over trained parameters.

        The L2 norms run over all elements; 0 for a model without any. All
        ranks of a sharded model call it.

        Args:
            name: Which averages. Defaults to 'ema', the main ones.

        Raises:
            RuntimeError: If the model holds others.
        """
        self._check_name(name)
        if self._applied not in (None, name):
            self._refuse_inside('distance')
        self.wait()
        return self._sets[name].distance(self._ranks)

    def first_nonfinite(self) -> Optional[str]:
        """Return the first averaged parameter that holds NaN or Inf."""
        return next(
            (
                entry.name
                for entry in self.entries
                if entry.role is Role.AVERAGED
                and entry.parameters
                and not is_finite(entry.raw.detach())
            ),
            None,
        )

    def held_back(self) -> List[str]:
        """Name the buffers whose average stays: they hold NaN or Inf now."""
        if self.nonfinite == 'ignore' or self.is_applied:
            return []
        buffers = [
            entry
            for entry in self.entries
            if entry.has_mean and not entry.parameters
        ]
        if all_finite([entry.raw for entry in buffers]):
            return []
        return [entry.name for entry in buffers if not is_finite(entry.raw)]

    def counts(self) -> Dict[str, int]:
        """Return tensors per role, and ``'bytes'`` that the averages take."""
        counts = count_roles(self.entries)
        return {**counts, 'bytes': counts['bytes'] * len(self.names)}

    def state_dict(self) -> Dict[str, Any]:
        """Return the state: plain values, and tensors by name.

        Large tensors are the live ones, small ones copies; all are copies
        while the averages are applied. Of a sharded model
        call it on all ranks: rank 0 gets whole tensors in host memory, which
        :meth:`load_state_dict` wants on every rank, the others none.
        """
        states = {
            name: {
                **self.progress(name),
                'schedule': str(schedule),
                # a swap fills the live ones with the raw weights
                'averages': own_memory(
                    gather(self.named_averages(name=name)), self.is_applied
                ),
            }
            for name, schedule in self.schedules.items()
        }
        main = states.pop(MAIN)
        return {**main, 'more': states} if states else main

    def progress(self, name: str = MAIN) -> Dict[str, int]:
        """Return the counters of :meth:`state_dict`."""
        progress = self._waited(name)
        return {
            'num_steps': progress.steps,
            'num_updates': progress.updates,
            'num_skipped': self._skipped,
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
                So does, with n = 0, a further average that is missing.

        The starting weights are not known after it (:meth:`starting_weights`).

        Raises:
            CheckpointError: If it is no such state, shapes differ or, under
                ``strict``, names do.
            RuntimeError: If the model holds averages just now.
        """
        self._refuse_inside('load_state_dict')
        self.wait()
        progress = {MAIN: read_progress(state)}
        tensors = {MAIN: read_tensors(state, 'averages')}
        more = state.get('more', {})
        skipped = read_count(state, 'num_skipped', 0)
        for name in self.names[1:]:
            if name in more:
                progress[name] = read_progress(more[name])
                tensors[name] = read_tensors(more[name], 'averages')
            elif strict:
                raise CheckpointError(
                    f'the state has no averages {name!r}; it has '
                    f'{", ".join((MAIN, *more))}.'
                )
        owned = dict(self._sets[MAIN].owned())
        is_cut = fsdp1.saves_whole(self.model, self._modules)
        if is_cut:
            owned = fsdp1.layout(self.model)
        for given in tensors.values():
            # all are looked at before any is changed
            check_fit(owned, given, strict)
        if is_cut:
            self._changes.reshard()
            tensors = {
                name: cut_into_pieces(self.model, self.entries, given)
                for name, given in tensors.items()
            }
            strict = False  # what was not given is that of the model
        for name, averages in self._sets.items():
            averages.load(
                tensors.get(name, {}),
                strict and name in tensors,
                self.update_buffers,
                self._ranks,
            )
        self._plan_updates()
        self._progress = {x: progress.get(x, Progress()) for x in self.names}
        self._skipped = skipped
        self._starting = None

    def restart(self) -> None:
        """Let all averages start again, n = 0, from the weights as they are.

        Raises:
            RuntimeError: If the model holds averages just now.
        """
        self._refuse_inside('restart')
        self.wait()
        self._follow()
        for averages in self._sets.values():
            averages.load({}, False, self.update_buffers)
        self._progress = {name: Progress() for name in self.names}
        self._keep_starting_weights()

    def wait(self) -> bool:
        """Wait for the update that is under way, if there is one.

        Returns:
            False if its step was skipped because of NaN or Inf, else True.

        Raises:
            NonFiniteError: If there was NaN or Inf under ``'raise'``.
        """
        if self._verdict is None:
            return True
        # a Ctrl-C here leaves it under way
        if self._stream is not None:
            self._stream.wait()
        for device in self._unwatched:
            torch.cuda.synchronize(device)
        finite, self._verdict = bool(self._verdict), None
        if finite:
            return True
        self._progress = self._before
        if self.nonfinite == 'raise':
            where = self.first_nonfinite() or 'a parameter'
            raise NonFiniteError(
                f'{where} holds NaN or Inf after a step; the average was '
                f'left as it was after {self._progress[MAIN].steps} steps.'
            )
        self._skipped += 1
        return False

    def _waited(self, name: str) -> Progress:
        self._check_name(name)
        self.wait()
        return self._progress[name]

    def _check_name(self, name: str) -> None:
        check_choice('name', name, self.names)

    def _refuse_inside(self, method: str) -> None:
        if self._applied is not None:
            raise RuntimeError(f'{method}() inside applied(): leave it first.')

    def _run(
        self, main: Progress, decays: Sequence[Optional[float]]
    ) -> Union[bool, DeviceVerdict]:
        check = self.nonfinite != 'ignore'
        if self.rule is not None and main.averaged == main.steps:
            return self._plan.run_rule(self.rule, main.steps, check)
        return self._plan.run(decays, check)

    def _next_step(
        self,
    ) -> Tuple[Dict[str, Progress], List[Optional[float]]]:
        """Return the counters after the next step, and the decays in it."""
        number = self._progress[MAIN].steps + 1
        due = number % self.interval == self.phase % self.interval
        after: Dict[str, Progress] = {}
        decays: List[Optional[float]] = []
        for name, now in self._progress.items():
            # an average that was added later is behind
            number = now.steps + 1
            decay = None
            after[name] = now._replace(steps=number)
            if due:
                after[name] = Progress(number, now.updates + 1, number)
                if self.rule is None:
                    schedule = self.schedules[name]
                    decay = decay_over(schedule, now.averaged + 1, number)
            decays.append(decay)
        return after, decays

    def _select(self) -> None:
        self._modules = sharded_modules(self.model)
        reshard(self._modules)
        self._ranks = ranks_of(self.model, self._modules)
        if (self._modules or self._ranks) and self.posthoc:
            raise OptionError(
                'posthoc=True keeps the starting weights, which no rank of a '
                'sharded model holds; give several averages instead: '
                'averages=dict(fast=dict(decay=...)).'
            )
        self.entries = select(self.model, self.update_buffers, self.copied)
        self._sets = {
            name: Averages(self.entries, device)
            for name, device in self._devices.items()
        }

    def _keep_starting_weights(self) -> None:
        if self.posthoc:
            raws = dict(self.named_raws())
            own = {id(x): x.to('cpu', copy=True) for x in raws.values()}
            self._starting = {name: own[id(x)] for name, x in raws.items()}

    def _plan_updates(self) -> None:
        """Plan updates for the entries and averages as they are now."""
        for averages in self._sets.values():
            averages.complete()  # loading one set may have changed roles
        sets = [averages.tensors for averages in self._sets.values()]
        # read is what the optimizer steps; buffers are the same entries
        sources = [
            entry
            if entry.master is None
            else dataclasses.replace(entry, raw=entry.master)
            for entry in self.entries
        ]
        self._plan = UpdatePlan(sources, sets, ranks=self._ranks)
        self._changes = ModelChanges(self.model, self.entries)
        self._stream = side_stream(
            [self.entries[i].raw for i in sets[0]],
            [average for tensors in sets for average in tensors.values()],
            self.overlap,
        )
        # offloaded without a stream, as the model is on several devices
        self._unwatched = {
            self.entries[i].raw.device
            for tensors in sets
            for i, average in tensors.items()
            if self._stream is None
            and self.entries[i].raw.is_cuda
            and not average.is_cuda
        }
        trained = [p for i in sets[0] for p in self.entries[i].parameters]
        # whoever listens to them compares lists by identity
        if list(map(id, trained)) != list(map(id, self.trained)):
            self.trained = trained

    def _follow(self) -> None:
        """Follow what has become of the model's tensors."""
        changes = self._changes
        if not changes.noticed():
            return
        if changes.has_thawed() or not (
            changes.follow_buffers() and changes.follow_memory()
        ):
            self._select_again()
        elif any(entry.raw.is_cuda for entry in self.entries):
            # kernels of a GPU read memory as it lay when they were planned
            self._plan_updates()
        else:
            self._plan.look_again()

    @torch.no_grad()
    def _select_again(self) -> None:
        """Select the model's tensors again, and carry their averages over."""
        before, sets = self.entries, self._sets
        known = {id(p) for entry in before for p in entry.parameters}
        self._select()
        for name, averages in self._sets.items():
            averages.carry_over(
                sets[name],
                self.model,
                self.update_buffers,
                self._ranks is not None,
            )
        self._replaced += [
            entry.name
            for entry in self.entries
            if entry.parameters
            and not any(id(p) in known for p in entry.parameters)
        ]
        self._plan_updates()


def further_schedules(
    averages: Mapping[str, Mapping[str, Any]], planned: Optional[int] = None
) -> Dict[str, Schedule]:
    """Return the schedules of further averages by name, for so many steps."""
    found = {}
    for name, given in averages.items():
        spec = {k: x for k, x in given.items() if k != 'device'}
        kind = spec.pop('schedule', 'exponential')
        found[name] = build_schedule(kind, planned, **spec)
    return found
