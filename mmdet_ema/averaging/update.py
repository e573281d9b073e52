"""One update, ``avg = d * avg + (1 - d) * raw``, of all tensors at once.

All that can be prepared is prepared once: tensors are grouped, those of few
elements are gathered into one buffer whose average is one flat tensor too, and
an update is a handful of multi-tensor calls.

Whether the parameters hold NaN or Inf has to be known before an average is
written, which cannot be taken back. On a CPU that is one more reading of the
weights. On a GPU the verdict is a flag that stays there: the kernels that
write look at it, and the host never waits.
"""

from __future__ import annotations

import cmath
import functools
import math
import signal
import threading
from types import TracebackType
from typing import (
    Any,
    Callable,
    Dict,
    List,
    Optional,
    Sequence,
    Tuple,
    Type,
    Union,
)

import torch
from torch import Tensor

from mmdet_ema.averaging.shards import Ranks
from mmdet_ema.averaging.tensors import Entry, Role, is_finite

Rule = Callable[[Tensor, Tensor, int], None]
"""Updates one average in place, given the raw tensor and the step n."""

# elements; a call costs more than averaging so few
_SMALL = 2**12


class UpdatePlan:
    """What an update does to one or several sets of averages.

    Args:
        entries: The entries of the model.
        sets: The averages, by the number of their entry. Small ones become
            views of one tensor, in place of what was there.
        deferred: Whether the verdict on a step may stay on the device; None
            for where that is faster.
        ranks: The ranks that share tensors, and agree on the verdict.
            Defaults to none.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        sets: Sequence[Dict[int, Tensor]],
        deferred: Optional[bool] = None,
        ranks: Optional[Ranks] = None,
    ):
        self._ranks = ranks
        self._entries, self._sets = entries, sets
        self._owned = [
            i for i in sets[0] if entries[i].raw.numel() and sets[0][i].numel()
        ]
        small: List[int] = []  # weights
        self._large: List[int] = []
        others: List[int] = []  # buffers, and what is copied
        self._direct: List[int] = []
        for i in self._owned:
            entry = entries[i]
            is_small = entry.raw.numel() < _SMALL
            if entry.role is Role.AVERAGED and entry.parameters:
                (small if is_small else self._large).append(i)
            elif is_small or entry.raw.is_cuda:
                others.append(i)
            else:
                # read where they are: nothing runs on a CPU in parallel with
                # a forward pass, and a copy of them takes room
                self._direct.append(i)
        self._small, self._others = self._gather(small), self._gather(others)
        self._groups = self._group()
        self._sources = [s for sources, _ in self._groups for s in sources]
        if deferred is None:
            devices = {entries[i].raw.device for i in self._owned}
            deferred = len(devices) == 1 and devices.pop().type == 'cuda'
        self._can_defer = deferred and self._can_fuse()

    def read(self, updates: bool = True) -> None:
        """Gather small weights and all buffers.

        A forward pass changes buffers: what runs in parallel with it reads
        what was gathered before.

        Args:
            updates: Whether averages are updated, or copies alone.
                Defaults to True.
        """
        for gathered in (*self._small, *self._others):
            if updates or gathered.is_copied:
                gathered.read()

    def look_again(self) -> None:
        """Read tensors where they are now: some lie elsewhere."""
        for gathered in (*self._small, *self._others):
            gathered.where = None

    def run(
        self, decays: Sequence[Optional[float]], check: bool
    ) -> Union[bool, DeviceVerdict]:
        """Update the averages, unless a parameter holds NaN or Inf.

        Args:
            decays: Weight of the old averages in each set, in [0, 1]; None
                for a set that is not updated now: its buffers are copied all
                the same.
            check: Whether NaN or Inf in a parameter keeps the step out of the
                averages, and in a buffer, that buffer.

        Returns:
            Whether the step was finite.
        """
        skip = None
        given = [decay for decay in decays if decay is not None]
        if given and check and (self._sources or self._ranks):
            # a decay of 0 is a copy, which the flag cannot stop
            if self._can_defer and min(given) > 0 and self._sources:
                skip = _nonfinite_flag(self._sources)
                skip = self._ranks.maximum(skip) if self._ranks else skip
            elif not self._are_finite():
                return False
        for k, decay in enumerate(decays):
            if decay is not None:
                for sources, averages in self._groups:
                    _lerp(averages[k], sources, 1 - decay, skip)
        for i in self._direct:
            self._update_direct(i, decays, check)
        for gathered in self._others:
            if given or gathered.is_copied:
                gathered.update(decays, check, skip)
        return True if skip is None else DeviceVerdict(skip)

    def run_rule(self, rule: Rule, step: int, check: bool) -> bool:
        """Let a rule update every average, one by one: the slow path.

        Args:
            rule: Called with an average, its raw tensor and the step.
            step: The step, from 1.
            check: See :meth:`run`.

        Returns:
            Whether the step was finite.
        """
        if check and not self._are_finite():
            return False
        averaged = [
            i for i in self._owned if self._entries[i].role is Role.AVERAGED
        ]
        # the weights first: a rule may draw random numbers
        for i in sorted(
            averaged, key=lambda i: not self._entries[i].parameters
        ):
            entry = self._entries[i]
            raw = entry.raw.detach()
            if entry.parameters or not check or is_finite(raw):
                for averages in self._sets:
                    rule(averages[i], raw.to(averages[i]), step)
        return self.run([None] * len(self._sets), check) is True

    def _are_finite(self) -> bool:
        """Return whether the weights are finite, those of other ranks too."""
        finite = all_finite(self._sources)
        return self._ranks.all_agree(finite) if self._ranks else finite

    def _update_direct(
        self, i: int, decays: Sequence[Optional[float]], check: bool
    ) -> None:
        entry = self._entries[i]
        if check and entry.has_mean and not all_finite([entry.raw]):
            return
        for averages, decay in zip(self._sets, decays):
            if entry.role is Role.COPIED:
                averages[i].copy_(entry.raw)
            elif decay is not None:
                _lerp([averages[i]], [entry.raw], 1 - decay, None)

    def _gather(self, indices: Sequence[int]) -> List[_Gathered]:
        kinds: Dict[object, List[int]] = {}
        for i in indices:
            entry = self._entries[i]
            dtypes = entry.raw.dtype, self._sets[0][i].dtype
            key = entry.raw.device, dtypes, entry.role, entry.has_mean
            kinds.setdefault(key, []).append(i)
        return [
            _Gathered([self._entries[i] for i in kind], kind, self._sets)
            for kind in kinds.values()
        ]

    def _group(self) -> List[Tuple[List[Tensor], List[List[Tensor]]]]:
        """Put weights together that a multi-tensor call can take at once."""
        rows = [(g.buffer, g.flats) for g in self._small]
        for i in self._large:
            averages = [averages[i] for averages in self._sets]
            rows.append((self._entries[i].raw, averages))
        groups: Dict[object, Tuple[List[Tensor], List[List[Tensor]]]] = {}
        for source, averages in rows:
            key = source.device, source.dtype, averages[0].dtype
            empty: List[List[Tensor]] = [[] for _ in averages]
            sources, lists = groups.setdefault(key, ([], empty))
            sources.append(source)
            for average, row in zip(averages, lists):
                row.append(average)
        return list(groups.values())

    def _can_fuse(self) -> bool:
        pairs = [
            (average, source)
            for sources, averages in self._groups
            for average, source in zip(averages[0], sources)
        ]
        return all(
            average.dtype == source.dtype
            and average.stride() == source.stride()
            and _is_dense(source)
            and _trial(_try_fused, source.device, source.dtype)
            for average, source in pairs
        )


class _Gathered:
    """Tensors of one kind, side by side in one buffer and in one average.

    Args:
        entries: Their entries.
        indices: The numbers of these.
        sets: The averages; these become views of one tensor a set.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        indices: Sequence[int],
        sets: Sequence[Dict[int, Tensor]],
    ):
        self.entries = entries
        self.is_copied = entries[0].role is Role.COPIED
        self._has_mean = entries[0].has_mean
        self._sizes = [entry.raw.numel() for entry in entries]
        self.flats: List[Tensor] = []
        # what is made in inference mode cannot be written outside of it
        with torch.inference_mode(False), torch.no_grad():
            for averages in sets:
                flat = torch.cat([averages[i].reshape(-1) for i in indices])
                pinned = all(averages[i].is_pinned() for i in indices)
                flat = flat.pin_memory() if pinned else flat
                for i, part in zip(indices, torch.split(flat, self._sizes)):
                    averages[i] = part.view(averages[i].shape)
                self.flats.append(flat)
            device = entries[0].raw.device
            self.buffer = torch.empty_like(self.flats[0], device=device)
            self._parts = list(torch.split(self.buffer, self._sizes))
        # the tensors as they are joined; looked up by the next reading
        self.where: Optional[List[Tensor]] = None
        # which tensor each element belongs to; made when first asked for
        self._owners: Optional[Tensor] = None

    def read(self) -> None:
        """Read the tensors into the buffer."""
        if self.where is None:
            raws = [entry.raw.detach() for entry in self.entries]
            if not all(
                raw.is_contiguous() and raw.dtype == self.buffer.dtype
                for raw in raws
            ):
                parts = zip(self._parts, raws)
                copy_all([part.view(raw.shape) for part, raw in parts], raws)
                return
            self.where = [raw.view(-1) for raw in raws]
        # half the time of a copy of each
        torch.cat(self.where, out=self.buffer)

    def update(
        self,
        decays: Sequence[Optional[float]],
        check: bool,
        skip: Optional[Tensor],
    ) -> None:
        """Average what was read in each set, or copy it.

        A tensor that holds NaN or Inf stays, and no other: NaN in the
        statistics of one layer says nothing about the weights. What has no
        mean is copied bit for bit.
        """
        moves = None if skip is None else skip == 0
        away = self.buffer.is_cuda
        if (
            check
            and self._has_mean
            and (away or not all_finite([self.buffer]))
        ):
            # the host does not wait for what a GPU finds
            device = self.buffer.device
            finite = (
                _finite_each(self._parts)
                if away
                else torch.tensor(
                    [is_finite(part) for part in self._parts], device=device
                )
            )
            if self._owners is None:
                sizes = torch.tensor(self._sizes, device=device)
                numbers = torch.arange(len(self._sizes), device=device)
                self._owners = numbers.repeat_interleave(sizes)
            finite = finite[self._owners]
            moves = finite if moves is None else finite & moves
        for flat, decay in zip(self.flats, decays):
            if self.is_copied:
                decay = 0.0
            if decay is None:
                continue
            new = self.buffer
            near = flat.to(new.device, non_blocking=True)  # mostly itself
            if moves is not None:
                new = torch.lerp(near, new, 1 - decay) if decay else new
                near.copy_(_where(moves, new, near))
            elif decay:
                near.lerp_(new, 1 - decay)
            else:
                near.copy_(new)
            if near is not flat:
                flat.copy_(near, non_blocking=True)


def copy_all(targets: List[Tensor], sources: List[Tensor]) -> None:
    """Copy tensors in one call where torch has it (2.1)."""
    if hasattr(torch, '_foreach_copy_'):
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources):
        target.copy_(source)


class DeferredInterrupts:
    """Holds Ctrl-C back until the body is done, then lets it through.

    A swap that stops half-way would leave some raw weights in the model and
    some among the averages; an update that does, averages that are a step
    ahead of others. Only the main thread receives interrupts.
    """

    def __enter__(self) -> None:
        """Take the place of the handler, where there is one."""
        self._held: List[Tuple[Any, ...]] = []
        self._previous: Any = signal.getsignal(signal.SIGINT)
        here = threading.current_thread() is threading.main_thread()
        if here and callable(self._previous):
            signal.signal(signal.SIGINT, self._hold)
        else:
            self._previous = None

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        """Put the handler back, and call it if it was asked for."""
        if self._previous is None:
            return
        signal.signal(signal.SIGINT, self._previous)
        if self._held:
            self._previous(*self._held[0])

    def _hold(self, *received: Any) -> None:
        self._held.append(received)


class DeviceVerdict:
    """Whether a step was finite, on its way from a device to the host.

    Args:
        flag: A scalar on the device: 1 if it was not.
    """

    def __init__(self, flag: Tensor):
        self._event: Optional[torch.cuda.Event] = None
        self._flag = flag
        if flag.is_cuda:
            self._flag = torch.empty(
                (), dtype=flag.dtype, device='cpu', pin_memory=True
            )
            self._flag.copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(flag.device))

    def __bool__(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return not bool(self._flag)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether no element of any tensor is NaN or Inf.

    A sum shows both, in one reading at the speed of memory. One of finite but
    huge values may overflow, too: only then is every element looked at.

    Args:
        tensors: Floating point or complex tensors of any shape and device;
            on a GPU the answer costs a synchronisation.
    """
    away = []
    for tensor in tensors:
        if tensor.is_cuda:
            away.append(tensor)
            continue
        wide = torch.promote_types(
            # torch promotes and sums no 8-bit floats
            torch.float32 if tensor.element_size() == 1 else tensor.dtype,
            torch.float32,
        )
        if tensor.element_size() == 1:
            tensor = tensor.to(wide)
        if not cmath.isfinite(tensor.sum(dtype=wide).item()):
            return all(map(is_finite, tensors))
    away = [tensor for tensor in away if tensor.numel()]
    if away and bool(_nonfinite_flag(away)):
        return all(map(is_finite, tensors))
    return True


def _nonfinite_flag(tensors: Sequence[Tensor]) -> Tensor:
    """Return, on the device, 1 if any element is NaN or Inf, else 0."""
    kinds: Dict[object, List[Tensor]] = {}
    for tensor in tensors:
        key = tensor.device, tensor.dtype
        kinds.setdefault(key, []).append(tensor)
    device = tensors[0].device
    finite = [_finite_each(kind).all().to(device) for kind in kinds.values()]
    return (~torch.stack(finite).all()).to(torch.float32)


def _finite_each(tensors: List[Tensor]) -> Tensor:
    """Return, on the device, whether each tensor is free of NaN and Inf."""
    # the largest magnitude cannot overflow where the values do not; the sum
    # of squares can, but every torch has it
    if tensors[0].element_size() == 1:  # there are no norms of 8-bit floats
        tensors = [tensor.float() for tensor in tensors]
    first = tensors[0]
    largest = _trial(_try_largest, first.device, first.dtype)
    norms = torch._foreach_norm(tensors, math.inf if largest else 2.0)
    return torch.isfinite(torch.stack(list(norms)))


def _lerp(
    averages: List[Tensor],
    sources: List[Tensor],
    weight: float,
    skip: Optional[Tensor],
) -> None:
    """Apply ``avg += weight * (source - avg)`` to every pair."""
    device = sources[0].device
    if averages[0].device != device:
        # one after the other, so that a GPU needs room for one alone
        for average, source in zip(averages, sources):
            near = average.to(device, non_blocking=True)
            _lerp([near], [source], weight, skip)
            average.copy_(near, non_blocking=True)
    elif skip is not None:
        _fused_lerp(averages, sources, weight, skip)
    elif averages[0].dtype != sources[0].dtype:
        for average, source in zip(averages, sources):
            average.lerp_(source.to(average.dtype), weight)
    elif hasattr(torch, '_foreach_lerp_'):
        torch._foreach_lerp_(averages, sources, weight)
    elif averages[0].is_cuda and weight <= 0.5:
        # Not avg * d + w * raw: float32 rounds d = 0.9999 by up to 3e-8, which
        # is 3e-4 of w, and the average would not tend to the weights.
        scale = weight / (1 - weight)
        torch._foreach_add_(averages, sources, alpha=scale)
        torch._foreach_add_(averages, averages, alpha=-weight)
    else:
        for average, source in zip(averages, sources):
            average.lerp_(source, weight)


def _fused_lerp(
    averages: List[Tensor], raws: List[Tensor], weight: float, skip: Tensor
) -> None:
    """Apply ``avg -= weight * (avg - raw)`` in a call that a flag can stop.

    torch's fused SGD step does this when the raw tensors are its gradients,
    to be maximized, with a weight decay of 1. It reads memory as it lies: a
    pair has to have the same strides, without gaps.
    """
    torch._fused_sgd_(
        averages,
        raws,
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=weight,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=skip,
    )


def _trial(trial: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether what is not part of torch's stable interface works."""
    return bool(_remembered(trial, torch.device(device), dtype))


@functools.lru_cache(maxsize=None)
def _remembered(trial: Any, device: torch.device, dtype: torch.dtype) -> bool:
    with torch.no_grad(), torch.inference_mode(False):
        try:
            return bool(trial(dict(device=device, dtype=dtype)))
        except (AttributeError, RuntimeError, TypeError, NotImplementedError):
            return False


def _try_fused(kind: Any) -> bool:
    if kind['dtype'] not in (torch.float32, torch.float64):
        return False
    raw = torch.tensor([4.0, -2.0, 0.0], **kind)
    pair = [torch.ones(3, **kind), torch.ones(1, **kind)]
    raws = [raw, torch.full((1,), 5.0, **kind)]
    flag = torch.zeros((), device=kind['device'])
    _fused_lerp(pair, raws, 0.25, flag)
    _fused_lerp(pair, [raw * math.nan, raws[1]], 0.25, flag + 1)
    expected = torch.tensor([1.75, 0.25, 0.75], **kind)
    return bool((pair[0] == expected).all()) and pair[1].item() == 2.0


def _try_largest(kind: Any) -> bool:
    largest = torch.finfo(kind['dtype']).max
    values = (math.nan, math.inf, -math.inf, largest, -3.0)
    # long enough for vectorised code, which is another path
    row = [torch.tensor([0.5, value] * 64, **kind) for value in values]
    norms = torch._foreach_norm(row, math.inf)
    finite = [math.isfinite(norm) for norm in torch.stack(list(norms))]
    return finite == [False, False, False, True, True]


def _where(moves: Tensor, new: Tensor, old: Tensor) -> Tensor:
    if new.element_size() == 1:
        # torch.where knows no float8 before torch 2.5
        pair = new.view(torch.uint8), old.view(torch.uint8)
        return torch.where(moves, *pair).view(new.dtype)
    return torch.where(moves, new, old)


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor fills its memory, each element once."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
