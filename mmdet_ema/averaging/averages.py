"""The averages of one model: storage, plans and names, without a schedule."""

from __future__ import annotations

from operator import attrgetter
from typing import (
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

import torch
from torch import Tensor, nn

from mmdet_ema.averaging.distance import relative_distance
from mmdet_ema.averaging.distributed import make_equal, world_size
from mmdet_ema.averaging.finite import all_finite
from mmdet_ema.averaging.fit import check_fit, count_roles
from mmdet_ema.averaging.intake import Intake
from mmdet_ema.averaging.kernels import average_dtype
from mmdet_ema.averaging.model_changes import Watch
from mmdet_ema.averaging.parametrized import parametrized
from mmdet_ema.averaging.swap import Exchange
from mmdet_ema.averaging.tensors import Entry, Role, is_finite, select

Named = Iterator[Tuple[str, Tensor]]
_TRAINS = attrgetter('requires_grad')


class AverageStore:
    """Holds one average for every unique tensor that can change.

    Args:
        model: The model.
        update_buffers: Whether float buffers are averaged.
        device: Where the averages live; None for where the tensors are.
        overlap: Whether steps are taken in beside the training.
        copied: Patterns of names that are copied, not averaged.

    Attributes:
        replaced: Names of parameters that became other objects, until someone
            takes them.
        trained: The parameters that have an average; another list where they
            are others.
    """

    def __init__(
        self,
        model: nn.Module,
        update_buffers: bool,
        device: Optional[torch.device] = None,
        overlap: bool = False,
        copied: Sequence[str] = (),
    ):
        self._model = model
        self._update_buffers = update_buffers
        self._copied = copied
        self._device = device
        self.intake = Intake(overlap)
        self._watch: Watch
        self.replaced: List[str] = []
        self.trained: List[nn.Parameter] = []
        self._averages: Dict[int, Tensor] = {}
        self._entries: List[Entry] = []
        self._select()

    @property
    def entries(self) -> List[Entry]:
        """The unique tensors of the model."""
        return self._entries

    @property
    def is_applied(self) -> bool:
        """Whether the model holds the averages."""
        return self._exchange.swapped

    def apply(self) -> None:
        """Swap the averages into the model."""
        self.refresh()
        self._exchange.swap_in()

    def restore(self) -> None:
        """Swap the raw values back into the model."""
        self._exchange.swap_out()

    def gated(self) -> List[Entry]:
        """Return the entries in which NaN or Inf means a bad step."""
        averaged = [self._entries[i] for i in self._averages]
        return [entry for entry in averaged if entry.gated]

    def synchronize(self) -> bool:
        """Make the averages of buffers the same on every rank.

        Those that have a mean become it, the others those of rank 0.

        Returns:
            False if the buffers of the ranks do not fit each other.
        """
        if world_size() == 1 or self.is_applied:
            return True
        means: List[Tensor] = []
        copies: List[Tensor] = []
        for i, average in self._averages.items():
            entry = self._entries[i]
            if not entry.parameters:
                (means if entry.has_mean else copies).append(average)
        return make_equal(means, copies)

    def held_back(self) -> List[str]:
        """Name the buffers that keep their average: they hold NaN or Inf."""
        entries = [
            entry
            for entry in self._entries
            if entry.has_mean and not entry.parameters
        ]
        parts = [part for entry in entries for part in entry.parts]
        if self.is_applied or all_finite(parts):
            return []
        return [entry.name for entry in entries if not is_finite(entry)]

    def thaw(self) -> None:
        """Give an average to parameters that are trainable by now."""
        thawed = self._thawed()
        for i in thawed:
            self._own(i)
        if thawed:
            self._plan()

    @property
    def has_changed(self) -> bool:
        """Whether parameters were thawed, replaced or added; cheap."""
        return self._watch.is_rebuilt() or bool(self._thawed())

    def follow(self, rebuilt: bool = True) -> None:
        """Follow what was replaced if it shows; cheap enough for each step.

        Args:
            rebuilt: Whether to look for replaced modules and parameters, too.
                Defaults to True.
        """
        if rebuilt and self._watch.is_rebuilt():
            self.refresh()
            # where every tensor is as before, too: once is enough
            self._watch = Watch(self._model)
        elif self._watch.hints() and not self._rebind():
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow replaced tensors; averages are carried over.

        With the parameter where it is the same object under any name, else
        by name.
        """
        if self.is_applied or not self._watch.replaced():
            return
        old = dict(self._named(self._average_of, unsaved=True))
        # a tensor may have got another name, as those that are pruned do
        before, averages = self._entries, self._averages
        known = {id(p) for entry in before for p in entry.parameters}
        same = {id(before[i].raw): average for i, average in averages.items()}
        self._select()
        for entry in self._entries:
            if id(entry.raw) in same:
                average = same[id(entry.raw)]
                old.update((x.name, x.of(average)) for x in entry.labels)
        old.update(parametrized(self._model, old))
        now = dict(self._named(self._average_of, unsaved=True))
        kept = {
            name: average
            for name, average in old.items()
            if name in now and now[name].shape == average.shape
        }
        self.replaced += [
            entry.name
            for entry in self._entries
            if entry.parameters
            and not any(id(p) in known for p in entry.parameters)
        ]
        self.load(kept, strict=False)

    def named_averages(self, stored: bool = False) -> Named:
        """Yield every saved name with its average.

        Args:
            stored: Whether to leave out what has no average of its own.
        """
        return self._named(self._average_of, stored)

    def named_raws(self) -> Named:
        """Yield every saved name with its raw value."""
        return self._named(self._raw_of)

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor], strict: bool) -> None:
        """Copy averages in by name; nothing changes if one does not fit.

        An average that holds NaN or Inf is not copied in where the model's
        tensor holds none: it starts again from there. Where only the model's
        does, the average goes on.

        Args:
            averages: Averages by name.
            strict: Whether a missing name is an error.

        Raises:
            CheckpointError: If a shape differs or a name is missing.
        """
        assert not self.is_applied
        check_fit(dict(self.named_averages()), averages, strict)
        all_are_finite = all_finite(
            [x for x in averages.values() if _is_float(x)]
        )
        for i, entry in enumerate(self._entries):
            new = [
                (label, averages[label.name])
                for label in entry.labels
                if label.name in averages
            ]
            if new and i in self._frozen and self._differs(i, new[0][1]):
                self._own(i)
            finite = all_are_finite or all(
                bool(torch.isfinite(average).all()) for _, average in new
            )
            if new and finite and entry.holds_nonfinite:
                entry.has_mean, entry.holds_nonfinite = True, False
                if entry.parameters or self._update_buffers:
                    self._own(i)
            if i in self._averages and (finite or not entry.has_mean):
                for label, average in new:
                    label.write(self._averages[i], average)
        self._plan()

    def distance(self) -> float:
        """Return ``||average - raw|| / ||raw||`` over trained parameters."""
        return relative_distance(
            (self._average_of(i), self._raw_of(i))
            for i, entry in enumerate(self._entries)
            if i in self._averages and entry.parameters
        )

    def counts(self) -> Dict[str, int]:
        """Return tensors per role, and the bytes of all averages."""
        return count_roles(self._entries)

    def _select(self) -> None:
        self._entries = select(self._model, self._update_buffers, self._copied)
        self._watch = Watch(self._model)
        self._averages = {}
        for i, entry in enumerate(self._entries):
            if entry.role is not Role.SHARED:
                self._averages[i] = self._fresh(entry)
        self._plan()

    def _fresh(self, entry: Entry) -> Tensor:
        raw = entry.raw.detach()
        averaged = entry.role is Role.AVERAGED
        dtype = average_dtype(raw.dtype) if averaged else raw.dtype
        # tensors made in inference mode could not be updated outside of it
        with torch.inference_mode(False):
            average = raw.to(device=self._device, dtype=dtype, copy=True)
            offloaded = raw.is_cuda and average.device.type == 'cpu'
            return average.pin_memory() if offloaded else average

    def _rebind(self) -> bool:
        """Follow buffers that became other tensors of the same kind.

        Some models do so in every forward pass; selecting anew would cost
        more than the update.
        """
        entries = {id(entry.raw): entry for entry in self._entries}
        pairs = self._watch.replaced_buffers()
        if not pairs or not all(
            _can_follow(entries.get(id(a)), b) for a, b in pairs
        ):
            return False
        for old, new in pairs:
            entries[id(old)].raw = new
        self._watch = Watch(self._model)
        self._plan()
        return True

    def _own(self, i: int) -> None:
        self._entries[i].role = Role.AVERAGED
        self._averages[i] = self._fresh(self._entries[i])

    def _differs(self, i: int, average: Tensor) -> bool:
        raw = self._entries[i].labels[0].of(self._entries[i].raw.detach())
        return not torch.equal(raw, average.to(raw))

    def _plan(self) -> None:
        """Make the plans anew; the only place that knows all lists."""
        entries = self._entries
        self._frozen = [
            i for i, entry in enumerate(entries) if entry.role is Role.SHARED
        ]
        self._held = [p for i in self._frozen for p in entries[i].parameters]
        owned = [entries[i] for i in self._averages]
        averages, raws = list(self._averages.values()), [e.raw for e in owned]
        self._position = {i: k for k, i in enumerate(self._averages)}
        self._exchange = Exchange(averages, raws)
        self.intake.plan(owned, averages)
        trained = [p for entry in owned for p in entry.parameters]
        if list(map(id, trained)) != list(map(id, self.trained)):
            self.trained = trained

    def _thawed(self) -> List[int]:
        if not any(map(_TRAINS, self._held)):
            return []
        return [
            i
            for i in self._frozen
            if any(map(_TRAINS, self._entries[i].parameters))
        ]

    def _named(
        self,
        value_of: Callable[[int], Tensor],
        stored: bool = False,
        unsaved: bool = False,
    ) -> Named:
        for i, entry in enumerate(self._entries):
            if stored and i not in self._averages:
                continue
            value = value_of(i)
            for label in entry.labels:
                if label.saved or unsaved:
                    yield label.name, label.of(value)

    def _average_of(self, i: int) -> Tensor:
        if i in self._position:
            return self._exchange.average(self._position[i])
        return self._entries[i].raw.detach()

    def _raw_of(self, i: int) -> Tensor:
        if i in self._position:
            return self._exchange.raw(self._position[i])
        return self._entries[i].raw.detach()


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _can_follow(entry: Optional[Entry], new: Tensor) -> bool:
    """Return whether a tensor can take the place of an entry's."""
    if entry is None or len(entry.labels) > 1 or entry.labels[0].view:
        return False
    old = entry.raw
    alike = (old.shape, old.dtype, old.device, old.stride()) == (
        new.shape,
        new.dtype,
        new.device,
        new.stride(),
    )
    return alike and new._base is None
