"""Read a pickle and build nothing: dicts, lists, plain values, meta tensors.

``torch.load(weights_only=True)`` would do the same on a new torch, but not on
those before 2.6.
"""

from __future__ import annotations

import _compat_pickle
import importlib
import os
import pickle
import pickletools
import sys
from collections import OrderedDict
from typing import (
    Any,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Set,
    Tuple,
)

import torch
from torch import Tensor

UNSAFE = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
LOADS_SAFELY = torch.torch_version.TorchVersion(torch.__version__) >= '2.6'
"""Whether ``torch.load`` has ``weights_only=True`` by default."""
HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
STATISTICS = ('current', 'max', 'mean', 'min')
# the dtypes of torch's storages; quantized values are looked at as integers
_DTYPES = {
    **dict.fromkeys(('Untyped', 'Byte', 'QUInt8'), torch.uint8),
    **dict.fromkeys(('QUInt4x2', 'QUInt2x4'), torch.uint8),
    **dict.fromkeys(('Char', 'QInt8'), torch.int8),
    **dict.fromkeys(('Int', 'QInt32'), torch.int32),
    **dict(Bool=torch.bool, Short=torch.int16, Long=torch.int64),
    **dict(Half=torch.float16, BFloat16=torch.bfloat16),
    **dict(Float=torch.float32, Double=torch.float64),
    **dict(ComplexFloat=torch.complex64, ComplexDouble=torch.complex128),
}
# what torch reads besides tensors; a stand-in takes its place
_KNOWN = f"""
    builtins.bytearray builtins.complex builtins.set collections.Counter
    {HISTORY} numpy.dtype numpy.ndarray
    numpy._core.multiarray._reconstruct numpy._core.multiarray.scalar
    numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar
    torch.Tensor torch.device torch.serialization._get_layout
    torch.nn.parameter.Buffer torch.nn.parameter.Parameter
    torch._utils._rebuild_device_tensor_from_numpy
"""
DATA = """
    addict.addict.Dict mmcv.utils.config.Config mmcv.utils.config.ConfigDict
    mmengine.config.config.ConfigDict
    builtins.bool builtins.bytes builtins.dict builtins.float
    builtins.frozenset builtins.int builtins.list builtins.object
    builtins.range builtins.slice builtins.str builtins.tuple
    collections.defaultdict collections.deque
    datetime.date datetime.datetime datetime.time datetime.timedelta
    datetime.timezone decimal.Decimal fractions.Fraction
    pathlib.PosixPath pathlib.PurePosixPath uuid.UUID
"""
"""What training scripts put into files besides that."""
if not LOADS_SAFELY:  # and reads everything
    _KNOWN += DATA
_SHARDED = ('DTensor', '_rebuild_nested_tensor', '_rebuild_wrapper_subclass')


class RefusedError(Exception):
    """The rest of a sentence about a file."""


class Storage(NamedTuple):
    """Memory that tensors of a file lie in."""

    key: str
    dtype: torch.dtype
    numel: int
    nbytes: int


class StandIn:
    """Takes the place of an object, and whatever is done to build it."""

    def __new__(cls, *args: Any) -> StandIn:
        """Refuse what would be run to build the object."""
        # a set would ask for their hash, a defaultdict would call them
        for _, value in walk(args):
            kind = value if isinstance(value, type) else type(value)
            if issubclass(kind, _Instance):
                raise RefusedError(_would_run(cls.__name__))
        return object.__new__(cls)

    def __init__(self, *args: Any):
        pass

    append = extend = __setitem__ = __setstate__ = __init__


class _Instance:
    """Stands in for what pickle makes without a class's code."""

    __hash__ = None  # type: ignore[assignment]  # it is no key of a dict

    def __init__(self, *args: Any):
        # pickle calls the class, instead of its __new__ alone
        raise RefusedError(_would_run(type(self).__name__))

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise RefusedError(_would_run(type(self).__name__))


class SafeUnpickler(pickle.Unpickler):
    """Reads a pickle and builds dicts, lists, plain values, meta tensors."""

    needs_records = False  # which may be compressed, and large

    def __init__(self, file: Any):
        super().__init__(file, encoding='utf-8')
        self._file = file
        self.tensors: List[Tuple[Tensor, Storage, int]] = []

    def load(self) -> Any:
        """Read the pickle, unless it would fill the memory."""
        start = self._file.tell()
        place: Any
        for code, place, position in pickletools.genops(self._file):
            # a table of that size is made; each entry of it takes a byte
            if code.name in ('PUT', 'LONG_BINPUT') and place > position:
                raise ValueError('its pickle counts wrong')
        self._file.seek(start)
        return super().load()

    def persistent_load(self, pid: Any) -> Storage:
        """Return what the file says of a storage."""
        kind, dtype, key, _, numel = pid[:5]
        if kind != 'storage' or not isinstance(dtype, torch.dtype):
            raise RefusedError(_would_run(f'a persistent {kind}'))
        size = torch.empty((), dtype=dtype).element_size()
        return Storage(str(key), dtype, int(numel), int(numel) * size)

    def find_class(self, module: str, name: str) -> Any:
        """Return a function of ours in the place of what is asked for."""
        module, name = name_today(module, name)
        full = f'{module}.{name}'
        # new for every file, which so cannot change ours
        found: Dict[str, Any] = {
            '_codecs.encode': lambda text, _: text.encode('latin1'),
            'builtins.getattr': self._statistic,
            'collections.OrderedDict': OrderedDict,
            'torch.Size': tuple,
            'torch._tensor._rebuild_from_type_v2': lambda f, t, x, s: f(*x),
            'torch._utils._rebuild_device_tensor_from_cpu_tensor': _first,
            'torch._utils._rebuild_meta_tensor_no_storage': _meta,
            'torch._utils._rebuild_parameter': _first,
            'torch._utils._rebuild_parameter_with_state': _first,
            'torch._utils._rebuild_qtensor': self._tensor,
            'torch._utils._rebuild_sparse_csr_tensor': _sparse,
            'torch._utils._rebuild_sparse_tensor': _sparse,
            'torch._utils._rebuild_tensor': self._tensor,
            'torch._utils._rebuild_tensor_v2': self._tensor,
            'torch._utils._rebuild_tensor_v3': self._tensor,
        }
        if full in found:
            return found[full]
        if module in ('torch', 'torch.storage'):
            if name.endswith('Storage') and name[:-7] in _DTYPES:
                return _DTYPES[name[:-7]]
            value = getattr(torch, name, None)
            if isinstance(value, (torch.dtype, torch.qscheme)):
                return value
        if name in _SHARDED:
            raise RefusedError(
                f'holds a sharded or nested tensor ({full}); save the whole '
                f'tensors (full_tensor()) and give that file.'
            )
        if full in self.known():
            try:
                getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError):
                raise RefusedError(
                    f'needs {full}, which is not installed here; read it '
                    f'where it was written.'
                ) from None
            return type(full, (StandIn,), {})
        if not LOADS_SAFELY and _is_harmless(module, name):
            return type(full, (_Instance,), {})
        raise RefusedError(_would_run(full))

    @staticmethod
    def known() -> List[str]:
        """Return what torch reads besides tensors."""
        if not LOADS_SAFELY:
            return _KNOWN.split()
        allowed = (
            x[1]
            if isinstance(x, tuple)
            else f'{x.__module__}.{x.__qualname__}'
            for x in torch.serialization.get_safe_globals()
        )
        return [*_KNOWN.split(), *allowed]

    def _statistic(self, owner: Any, name: Any) -> Any:
        """Be ``getattr`` for the statistics of a history, and no more."""
        if getattr(owner, '__name__', '') == HISTORY and name in STATISTICS:
            return StandIn()
        raise RefusedError(_would_run('builtins.getattr'))

    def _tensor(
        self, storage: Storage, start: int, size: Any, stride: Any, *more: Any
    ) -> Tensor:
        # v3 stores untyped bytes, and the dtype apart
        dtypes = [x for x in more if isinstance(x, torch.dtype)]
        tensor = _meta(dtypes[0] if dtypes else storage.dtype, size, stride)
        last = start + sum((n - 1) * s for n, s in zip(size, stride))
        room = storage.nbytes // tensor.element_size()
        if 0 not in size and not 0 <= start <= last < room:
            raise ValueError(
                f'a tensor of shape {tuple(size)} is larger than its storage'
            )
        # views that torch marks instead of computing them
        marks: Any = next((x for x in more if type(x) is dict), {})
        if marks.get('conj') is True:
            tensor = tensor.conj()
        if marks.get('neg') is True:
            tensor = torch._neg_view(tensor)
        self.tensors.append((tensor, storage, start))
        return tensor


def name_today(module: str, name: str) -> Tuple[str, str]:
    """Return the name in Python 3: torch writes those of Python 2."""
    return _compat_pickle.NAME_MAPPING.get(
        (module, name),
        (_compat_pickle.IMPORT_MAPPING.get(module, module), name),
    )


def _meta(dtype: torch.dtype, size: Any, stride: Any, *more: Any) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device='meta')


def _first(value: Any, *more: Any) -> Any:
    return value


def _sparse(layout: Any, data: Any) -> Tensor:
    # indices of one or two kinds, values, shape
    place = next(i for i, x in enumerate(data) if isinstance(x, tuple))
    dtype = data[place - 1].dtype
    return torch.empty(data[place], dtype=dtype, device='meta')


def _is_harmless(module: str, name: str) -> bool:
    """Return whether pickle makes an instance without running its class.

    The module is imported already, and the instance gets its ``__dict__``.
    """
    kind: Any = getattr(sys.modules.get(module), '__dict__', {}).get(name)
    is_class = isinstance(kind, type)
    hooks = ('__setstate__', '__del__', '__getattr__', '__slots__')
    return (
        is_class
        and kind.__new__ is object.__new__
        and kind.__getattribute__ is object.__getattribute__
        and not any(hasattr(kind, hook) for hook in hooks)
    )


def is_unsafe_chosen() -> bool:
    """Return whether the user lets every file run code."""
    # as torch reads it; before 2.6 it does not know the variable
    return os.environ.get(UNSAFE, '').lower() in ('1', 'y', 'yes', 'true')


def _would_run(name: str) -> str:
    return (
        f'asks for {name!r:.200} when it is read, which is not a part of '
        f'weights or plain values and could run code; nothing of the file '
        f'was run. If you trust it, set the environment variable {UNSAFE}=1, '
        f'or use --unsafe of mmdet-ema.'
    )


def walk(
    value: Any, name: str = '', seen: Optional[Set[int]] = None
) -> Iterator[Tuple[str, Any]]:
    """Yield what is in dicts, lists and tuples, with its place as a name."""
    # what is there in several places is looked at in one: a small file can
    # hold 2 ** 30 of them
    seen = set() if seen is None else seen
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield name, value
        return
    if id(value) not in seen:
        seen.add(id(value))
        for key, item in items:
            yield from walk(item, f'{name}.{key}', seen)
