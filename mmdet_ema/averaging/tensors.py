"""The tensors of a model, each one once, and what is done with it.

Tied tensors (one memory under several names, as in RTMDet's shared head) are
one entry with several names, so that they are averaged, swapped and saved
once. Identity is address, shape and strides, not the Python object.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mmdet_ema.averaging import fsdp1
from mmdet_ema.averaging.shards import (
    as_sharded,
    is_sharded,
    local_part,
    part_of,
)
from mmdet_ema.averaging.zero import is_partitioned, master_part
from mmdet_ema.errors import OptionError

# Modules whose buffers have no meaningful mean, by name: torch moves them from
# package to package, and torchao has classes of its own.
_COPIED_MODULES = {
    'ObserverBase',  # quantization-aware training: ranges, histograms
    'FakeQuantizeBase',  # the same: scales
    '_SpectralNorm',  # vectors of length one
    '_Orthogonal',  # an orthogonal matrix
    'FakeSparsity',  # masks
    'FakeStructuredSparsity',
}
# The same for what older functions of torch.nn.utils hook into a module: the
# attribute that holds the name of the weight, endings of its buffers.
_COPIED_HOOKS = {
    'SpectralNorm': ('name', ('_u', '_v')),
    'BasePruningMethod': ('_tensor_name', ('_mask',)),
}
_Named = Tuple[str, Tensor, bool]


class Role(enum.Enum):
    """What the averager does with a tensor."""

    AVERAGED = 'averaged'
    """Trainable parameters, and float buffers unless told otherwise."""
    COPIED = 'copied'
    """Integer and boolean buffers; float buffers that are not averaged; what
    has no mean (:attr:`Entry.has_mean`) or is copied because the user says so.
    """
    SHARED = 'shared'
    """Frozen parameters, and buffers that repeat their memory (``expand``) or
    are not plain (:func:`is_plain`): average and raw are the same tensor."""


@dataclass
class Entry:
    """A unique tensor of the model.

    Attributes:
        raw: The live tensor, as the module owns it (any shape and dtype); of
            a sharded one, what this rank holds.
        role: What is done with it.
        names: Its names, in the order of the ``state_dict``.
        saved: Those of them that are in the ``state_dict``.
        parameters: The parameters among its owners; empty for a buffer.
        has_mean: Whether a mean of its values makes sense: not for integers,
            nor where NaN or Inf belongs in it, as in attention masks, nor for
            unit vectors, masks and the like.
        holds_nonfinite: Whether it has no mean because it held NaN or Inf when
            it was selected.
        is_part: Whether this rank holds a part of it alone.
        sharded: The DTensor, or the parameter that ZeRO-3 has partitioned,
            that ``raw`` is a part of, if any.
        master: What the optimizer steps, where ``raw`` is a rounded copy of
            it: that is averaged.
    """

    raw: Tensor
    role: Role
    names: Tuple[str, ...]
    saved: Tuple[str, ...]
    parameters: Tuple[nn.Parameter, ...] = ()
    has_mean: bool = True
    holds_nonfinite: bool = False
    is_part: bool = False
    sharded: Optional[Tensor] = None
    master: Optional[Tensor] = None

    @property
    def name(self) -> str:
        """First name, for messages."""
        return self.names[0]

    @property
    def stepped(self) -> Tensor:
        """What the optimizer steps."""
        return self.raw if self.master is None else self.master

    def as_in_model(self, part: Tensor) -> Tensor:
        """Return a tensor like ``raw`` as the model would own it."""
        return part if self.sharded is None else as_sharded(part, self.sharded)

    def part_of(self, given: Tensor) -> Tensor:
        """Return this rank's part of a tensor, which may be whole."""
        if self.sharded is None or is_sharded(given):
            return local_part(given)
        return part_of(given, self.sharded)


def select(
    model: nn.Module,
    update_buffers: bool = True,
    copied: Sequence[str] = (),
) -> List[Entry]:
    """List the unique tensors of a model with what is to be done with them.

    Buffers that the ``state_dict`` leaves out (``persistent=False``) are left
    alone: they are constants or can be computed again.

    Args:
        model: The model; nothing in it is changed or copied.
        update_buffers: Whether float buffers are averaged. Defaults to True.
        copied: Patterns of names that are copied, not averaged; ``*`` stands
            for any text. Defaults to ().

    Returns:
        The entries, in the order of the ``state_dict``.

    Raises:
        OptionError: If FSDP1 has made something of a tensor that cannot be
            averaged, or copied, as it is.
        ValueError: If a parameter has no shape yet (a lazy module) or is
            sparse, or two tensors overlap in part.
    """
    groups: Dict[object, List[_Named]] = {}
    wrappers = [x for x in model.modules() if fsdp1.is_fsdp1(x)]
    cut = set(map(id, fsdp1.cut_parameters(wrappers)))
    for named in (
        _named_pieces(model, copied) if wrappers else _named_tensors(model)
    ):
        groups.setdefault(_identity(named[1]), []).append(named)
    meanless = set(map(id, _buffers_without_mean(model)))
    entries = []
    for group in groups.values():
        has_mean = not any(
            id(tensor) in meanless or _matches(name, copied)
            for name, tensor, _ in group
        )
        is_cut = any(id(tensor) in cut for _, tensor, _ in group)
        entry = _make_entry(group, update_buffers, has_mean, is_cut)
        entries.append(entry)
    _refuse_overlaps([e for e in entries if e.role is not Role.SHARED])
    return entries


def average_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a tensor of ``dtype`` is averaged.

    In half precision an average stands still: with 8 bits of mantissa
    ``avg + 2e-4 * (raw - avg)`` rounds back to ``avg``.

    Args:
        dtype: dtype of the raw tensor.

    Returns:
        float32 for float16, bfloat16 and 8-bit floats, else ``dtype``.
    """
    narrow = dtype.is_floating_point and torch.finfo(dtype).bits < 32
    return torch.float32 if narrow else dtype


def count_roles(entries: Sequence[Entry]) -> Dict[str, int]:
    """Count tensors per role, and under 'bytes' what their averages take.

    Args:
        entries: The entries of a model.
    """
    counts = Counter(entry.role.value for entry in entries)
    size = 0
    for entry in entries:
        dtype = entry.raw.dtype
        if entry.role is Role.AVERAGED:
            dtype = average_dtype(dtype)
        if entry.role is not Role.SHARED:
            width = torch.empty((), dtype=dtype).element_size()
            size += entry.raw.numel() * width
    return {**{role.value: counts[role.value] for role in Role}, 'bytes': size}


def unmatched(entries: Sequence[Entry], copied: Sequence[str]) -> List[str]:
    """Return the patterns of ``copied`` that match no name."""
    names = [name for entry in entries for name in entry.names]
    return [x for x in copied if not any(fnmatchcase(n, x) for n in names)]


def no_match(pattern: str) -> str:
    """Say that a pattern of ``copied`` matches nothing."""
    return (
        f'copied={[pattern]}: no parameter or buffer of the model has such a '
        f"name; give a name of its state_dict, '*' stands for any text."
    )


def is_finite(tensor: Tensor) -> bool:
    """Return whether a float tensor holds neither NaN nor Inf."""
    tensor = values_of(tensor)
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # torch.isfinite knows no 8-bit floats
    return bool(torch.isfinite(tensor).all())


def values_of(tensor: Tensor) -> Tensor:
    """Return what a sparse or quantized tensor stores; else the tensor."""
    if tensor.is_quantized:
        return tensor.dequantize()
    if tensor.layout is torch.strided:
        return tensor
    return tensor._values() if tensor.is_sparse else tensor.values()


def is_plain(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor lie in its memory as they are.

    Not those of sparse and quantized ones, nor of a conjugate or a negative
    that torch has not computed yet.
    """
    return tensor.layout is torch.strided and not (
        tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    )


def writable(tensor: Tensor) -> bool:
    """Return whether values can be written into each element by itself.

    Not where elements share their memory (``expand``).
    """
    return is_plain(tensor) and _span(tensor)[2] >= tensor.numel()


def is_same(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same, in the dtype of the first."""
    if tensor.shape != other.shape:
        return False
    if tensor.layout is not torch.strided:
        tensor, other = tensor.to_dense(), other.to_dense()
    tensor, other = values_of(tensor), values_of(other)
    other = other.to(tensor)
    if tensor.element_size() == 1:  # torch compares no 8-bit floats
        tensor, other = tensor.float(), other.float()
    return torch.allclose(tensor, other, rtol=0, atol=0, equal_nan=True)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _buffers_without_mean(model: nn.Module) -> Iterator[Optional[Tensor]]:
    for module in model.modules():
        if _COPIED_MODULES & _classes(module):
            yield from module._buffers.values()
        for hook in module._forward_pre_hooks.values():
            for name in _classes(hook) & _COPIED_HOOKS.keys():
                attribute, endings = _COPIED_HOOKS[name]
                weight = getattr(hook, attribute, None)
                for ending in endings:
                    yield module._buffers.get(f'{weight}{ending}')


def _classes(thing: object) -> Set[str]:
    return {kind.__name__ for kind in type(thing).__mro__}


def _named_tensors(model: nn.Module) -> Iterator[_Named]:
    """Yield saved tensors that the model owns, then its other parameters.

    A model's ``state_dict`` may hold tensors that nobody trains, made by a
    hook: what lives in no storage of the model is left alone. Unless all that
    have names of the model's tensors are copies, as of a ``state_dict`` in
    half precision: these stand for the model's.
    """
    owned = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    state = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }
    made = {k: t for k, t in state.items() if _storage(t) not in owned}
    if made:
        own = dict(_own_tensors(model))
        pairs = [(t, own[name]) for name, t in made.items() if name in own]
        copies = all(is_same(t.detach(), mine.detach()) for t, mine in pairs)
        for name in made:
            if copies and name in own:
                state[name] = own[name]
            else:
                del state[name]
    for name, tensor in state.items():
        yield name, tensor, True
    known = set(map(id, state.values()))
    for name, tensor in model.named_parameters():
        if id(tensor) not in known:
            yield name, tensor, False


def _own_tensors(model: nn.Module) -> Iterator[Tuple[str, Tensor]]:
    """Yield the model's own tensors, tied ones under all of their names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for owner in (module._parameters, module._buffers):
            for name, tensor in owner.items():
                if tensor is not None:
                    yield f'{path}.{name}' if path else name, tensor


def _named_pieces(model: nn.Module, copied: Sequence[str]) -> Iterator[_Named]:
    """Yield what this rank holds of a model that FSDP1 has sharded."""
    for piece in fsdp1.pieces(model):
        dtype = piece.tensor.dtype
        if piece.tensor.requires_grad and average_dtype(dtype) != dtype:
            raise OptionError(
                f'{piece.name} is trained in {dtype} by '
                f'FullyShardedDataParallel, which could not save its average '
                f'of float32; leave the model in float32, and give '
                f'mixed_precision=MixedPrecision(param_dtype={dtype}).'
            )
        yield piece.name, piece.tensor, True
        for name in piece.inside:
            if _matches(name, copied):
                raise OptionError(
                    f'copied={[*copied]} names {name}, which '
                    f'FullyShardedDataParallel has made a part of '
                    f'{piece.name}; give it use_orig_params=True.'
                )
            yield name, piece.tensor, False


def _make_entry(
    group: Sequence[_Named], update_buffers: bool, has_mean: bool, is_cut: bool
) -> Entry:
    for name, tensor, _ in group:
        if is_lazy(tensor):
            raise ValueError(
                f'{name} has no shape yet (a lazy module); run one forward '
                f'pass before the average is made.'
            )
    tensors = [tensor for _, tensor, _ in group]
    # of several owners, one that trains: it follows its own ``.data``
    owner = next((t for t in tensors if t.requires_grad), tensors[0])
    raw = local_part(owner)
    owners = {id(t): t for t in tensors if isinstance(t, nn.Parameter)}
    entry = Entry(
        raw,
        Role.COPIED,
        tuple(name for name, _, _ in group),
        tuple(name for name, _, saved in group if saved),
        tuple(owners.values()),
        has_mean,
        is_part=is_cut or raw is not owner,
        sharded=owner if raw is not owner else None,
    )
    if is_partitioned(owner):
        entry.master = master_part(owner, raw)
    frozen = owners and not any(p.requires_grad for p in owners.values())
    if frozen or not writable(raw):
        if owners and not (frozen or is_plain(raw)):
            raise ValueError(
                f'{entry.name} is trained and sparse, or a conjugate that is '
                f'still to be computed: it cannot be averaged; make it a '
                f'dense tensor of its own, or freeze it.'
            )
        entry.role, entry.has_mean = Role.SHARED, bool(owners)
        return entry
    if not (raw.is_floating_point() or raw.is_complex()):
        entry.has_mean = False
    elif has_mean and not entry.is_part:  # a rank sees only its part
        entry.holds_nonfinite = not is_finite(raw.detach())
        entry.has_mean = not entry.holds_nonfinite
    if entry.has_mean and (owners or update_buffers):
        entry.role = Role.AVERAGED
    return entry


def _refuse_overlaps(entries: Sequence[Entry]) -> None:
    """Refuse tensors that share a part of their memory with another."""
    spaces: Dict[object, List[Entry]] = {}
    for entry in entries:
        if entry.raw.numel() and entry.raw.data_ptr():
            spaces.setdefault(entry.raw.device, []).append(entry)
    for space in spaces.values():
        space.sort(key=lambda entry: entry.raw.data_ptr())
        near: List[Entry] = []
        stop = 0
        for entry in space:
            start, end, _ = _span(entry.raw)
            if start >= stop:
                near = []
            for other in near:
                # spans of columns of one matrix meet, its elements do not
                if _share_elements(other.raw, entry.raw):
                    raise OptionError(
                        f'{other.name} and {entry.name} share a part of their '
                        f'memory, and no average of one fits the other; clone '
                        f'one of them, or make them one tensor.'
                    )
            near.append(entry)
            stop = max(stop, end)


def _share_elements(left: Tensor, right: Tensor) -> bool:
    spans = _span(left), _span(right)
    start = min(span[0] for span in spans)
    stop = max(span[1] for span in spans)
    # by bytes, as one may be a view of the other in another dtype
    seen = torch.zeros(stop - start, dtype=torch.bool)
    views = []
    for x in (left, right):
        size = x.element_size()
        strides = [stride * size for stride in x.stride()]
        views.append(
            seen.as_strided(
                (*x.shape, size), (*strides, 1), x.data_ptr() - start
            )
        )
    views[0].fill_(True)
    return bool(views[1].any())


def _span(tensor: Tensor) -> Tuple[int, int, int]:
    """Return start and end of a tensor's memory in bytes, and in elements."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start, 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    return start, start + (last + 1) * tensor.element_size(), last + 1


def _identity(owner: Tensor) -> object:
    tensor = local_part(owner)
    if not _has_address(tensor):
        return id(owner)
    where = tensor.device, tensor.dtype, tensor.data_ptr()
    return where, tensor.shape, tensor.stride()


def _has_address(tensor: Tensor) -> bool:
    if is_lazy(tensor) or not is_plain(tensor):
        return False
    return bool(tensor.numel() and tensor.data_ptr())


def _storage(owner: Tensor) -> object:
    tensor = local_part(owner)
    if not _has_address(tensor):
        return id(owner)
    # torch before 2.0 has no untyped_storage()
    return getattr(tensor, 'untyped_storage', tensor.storage)().data_ptr()
