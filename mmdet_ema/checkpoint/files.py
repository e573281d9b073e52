"""Look into a checkpoint file before anything is loaded or changed.

Nothing in a file is run or built. ``torch.load(weights_only=True)`` would
do the same on a new torch, but not on those before 2.6, and it checks no
checksum.
"""

from __future__ import annotations

import _compat_pickle
import importlib
import io
import os
import pickle
import sys
import tarfile
import zipfile
from collections import OrderedDict
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Tuple

import torch
from torch import Tensor

from mmdet_ema.errors import CheckpointError

UNSAFE = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
LOADS_SAFELY = torch.torch_version.TorchVersion(torch.__version__) >= '2.6'
"""Whether ``torch.load`` has ``weights_only=True`` by default."""
STATISTICS = ('current', 'max', 'mean', 'min')
HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'

_WRITE = 'give the path of a .pth file that a training run wrote'
_LEGACY = 0x1950A86A20F9469CFC6C  # the number that files before torch 1.6 have
_STORAGES = {
    'Double': torch.float64,
    'Float': torch.float32,
    'Half': torch.float16,
    'BFloat16': torch.bfloat16,
    'Long': torch.int64,
    'Int': torch.int32,
    'Short': torch.int16,
    'Char': torch.int8,
    'Byte': torch.uint8,
    'Bool': torch.bool,
    'ComplexDouble': torch.complex128,
    'ComplexFloat': torch.complex64,
    'Untyped': torch.uint8,
    'QInt8': torch.int8,
    'QUInt8': torch.uint8,
    'QInt32': torch.int32,
    'QUInt4x2': torch.uint8,
    'QUInt2x4': torch.uint8,
}
# they are not built; a stand-in takes their place
_KNOWN = {
    HISTORY,
    'builtins.bytearray',
    'builtins.complex',
    'builtins.set',
    'collections.Counter',
    'numpy.dtype',
    'numpy.ndarray',
    *(
        f'numpy.{core}.multiarray.{name}'
        for core in ('core', '_core')
        for name in ('_reconstruct', 'scalar')
    ),
    'torch.Tensor',
    'torch._utils._rebuild_device_tensor_from_numpy',
    'torch.device',
    'torch.nn.parameter.Buffer',
    'torch.nn.parameter.Parameter',
    'torch.per_channel_affine',
    'torch.per_channel_affine_float_qparams',
    'torch.per_channel_symmetric',
    'torch.per_tensor_affine',
    'torch.per_tensor_symmetric',
    'torch.serialization._get_layout',
}
# and what an older torch reads besides, as it reads everything
_KNOWN_TO_PICKLE = {
    f'{module}.{name}'
    for module, names in {
        'addict.addict': ['Dict'],
        'builtins': [
            *('bool', 'bytes', 'dict', 'float', 'frozenset', 'int', 'list'),
            *('object', 'range', 'slice', 'str', 'tuple'),
        ],
        'collections': ['defaultdict', 'deque'],
        'datetime': ['date', 'datetime', 'time', 'timedelta', 'timezone'],
        'decimal': ['Decimal'],
        'fractions': ['Fraction'],
        'mmcv.utils.config': ['Config', 'ConfigDict'],
        'mmengine.config.config': ['ConfigDict'],
        'pathlib': ['PosixPath', 'PurePosixPath'],
        'uuid': ['UUID'],
    }.items()
    for name in names
}
_SHARDED = ('DTensor', '_rebuild_nested_tensor', '_rebuild_wrapper_subclass')
# with one of these, making an instance can run code of its class
_HOOKS = ('__setstate__', '__del__', '__getattr__', '__slots__')


def read_structure(path: str) -> Mapping[str, Any]:
    """Check a local checkpoint, and return it without its data.

    Every record of the file is compared with its CRC-32, which torch writes
    and does not look at (torch before 1.6 wrote none).

    Args:
        path: A file.

    Returns:
        The checkpoint, with its tensors on the ``meta`` device and stand-ins
        for objects. Empty where ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` says to
        load unsafely.

    Raises:
        CheckpointError: If the file is missing, damaged or not a checkpoint,
            or if reading it could run code.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f'there is no file {path!r}; {_WRITE}.')
    try:
        with open(path, 'rb') as file:
            is_zip = file.read(4) == b'PK\3\4'
        content = _in_archive(path) if is_zip else _in_legacy_file(path)
    except CheckpointError:
        raise
    except _RefusedError as refused:
        raise CheckpointError(f'{path!r} {refused}') from None
    except Exception as error:  # damaged bytes can raise anything
        cause = (str(error).strip().splitlines() or [''])[0][:200]
        cause = cause.rstrip('.') or type(error).__name__
        raise CheckpointError(
            f'{path!r} is damaged, or no checkpoint ({cause}); {_WRITE}.'
        ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f'{path!r} holds a {type(content).__name__}, not a dict with a '
            f'state_dict; {_WRITE}.'
        )
    return content


class _RefusedError(Exception):
    """The rest of a sentence about a file."""


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * torch.empty((), dtype=self.dtype).element_size()


class _StandIn:
    """Takes the place of an object, and whatever is done to build it."""

    def __new__(cls, *args: Any) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


class _NotCalled(type):
    def __call__(cls, *args: Any) -> Any:
        raise _RefusedError(_would_run(cls.__name__))


class _Plain(metaclass=_NotCalled):
    """Stands in for an instance that pickle makes without its class's code.

    Its class is not called and no value, it is no key of a dict, and its
    state is a dict.
    """

    __hash__ = None  # type: ignore[assignment]

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise _RefusedError(_would_run(type(self).__name__))
        for value in state.values():
            _refuse_class(value)


def _refuse_class(value: Any) -> None:
    if isinstance(value, _NotCalled):
        raise _RefusedError(_would_run(value.__name__))


class _Look(pickle.Unpickler):
    """Reads a pickle and builds dicts, lists, plain values, meta tensors."""

    def __init__(self, file: Any):
        super().__init__(file, encoding='utf-8')
        self.tensors: List[Tuple[Tensor, _Storage]] = []

    def read(self) -> Any:
        content = self.load()
        for _, value in _walk(content, ''):
            _refuse_class(value)
        return content

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel = pid[:5]
        if kind != 'storage' or not isinstance(dtype, torch.dtype):
            raise _RefusedError(_would_run(f'a persistent {kind}'))
        return _Storage(dtype, str(key), int(numel))

    def find_class(self, module: str, name: str) -> Any:
        # torch writes names of Python 2; what is made here is new for every
        # file, which so cannot change ours
        module, name = _compat_pickle.NAME_MAPPING.get(
            (module, name),
            (_compat_pickle.IMPORT_MAPPING.get(module, module), name),
        )
        full = f'{module}.{name}'
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
        storage = name[: -len('Storage')] if name.endswith('Storage') else ''
        if module in ('torch', 'torch.storage') and storage in _STORAGES:
            return _STORAGES[storage]
        dtype = getattr(torch, name, None) if module == 'torch' else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if name in _SHARDED:
            raise _RefusedError(
                f'holds a sharded or nested tensor ({full}); save the whole '
                f'tensors (full_tensor()) and give that file.'
            )
        if full in _KNOWN or full in _allowed_by_user():
            return self._known(module, name)
        if not LOADS_SAFELY:
            if full in _KNOWN_TO_PICKLE:
                return self._known(module, name)
            if _is_harmless(module, name):
                return _NotCalled(full, (_Plain,), {})
        raise _RefusedError(_would_run(full))

    def _known(self, module: str, name: str) -> Any:
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            package = module.split('.')[0]
            version = getattr(sys.modules.get(package), '__version__', 'none')
            raise _RefusedError(
                f'needs {module}.{name}, which the installed {package} '
                f'({version}) does not have; read it where it was written, '
                f'or install another {package}.'
            ) from None
        return type(f'{module}.{name}', (_StandIn,), {})

    def _statistic(self, owner: Any, name: Any) -> Any:
        """Be ``getattr`` for the statistics of a history, and no more."""
        if getattr(owner, '__name__', '') == HISTORY and name in STATISTICS:
            return _StandIn()
        raise _RefusedError(_would_run('builtins.getattr'))

    def _tensor(
        self, storage: _Storage, start: int, size: Any, stride: Any, *more: Any
    ) -> Tensor:
        # v3 stores untyped bytes, and the dtype beside
        dtypes = [x for x in more if isinstance(x, torch.dtype)]
        dtype = dtypes[0] if dtypes else storage.dtype
        tensor = _meta(dtype, tuple(size), tuple(stride))
        last = start + sum((n - 1) * s for n, s in zip(size, stride))
        room = storage.nbytes // tensor.element_size()
        if 0 not in size and not 0 <= start <= last < room:
            raise ValueError(
                f'a tensor of shape {tuple(size)} is larger than its storage'
            )
        self.tensors.append((tensor, storage))
        return tensor


def _meta(dtype: torch.dtype, size: Any, stride: Any, *more: Any) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device='meta')


def _first(value: Any, *more: Any) -> Any:
    return value


def _sparse(layout: Any, data: Any) -> Tensor:
    place = next(i for i, x in enumerate(data) if isinstance(x, tuple))
    dtype = data[place - 1].dtype
    return torch.empty(data[place], dtype=dtype, device='meta')


def _would_run(name: str) -> str:
    return (
        f'asks for {name[:200]!r} when it is read, which is not a part of '
        f'weights or plain values and could run code; nothing of the file '
        f'was run. If you trust it, set the environment variable {UNSAFE}=1.'
    )


def _allowed_by_user() -> Iterator[str]:
    """Give the names that were allow-listed in torch."""
    if LOADS_SAFELY:
        for item in torch.serialization.get_safe_globals():
            if isinstance(item, tuple):
                yield item[1]
            else:
                yield f'{item.__module__}.{getattr(item, "__qualname__", "")}'


def _is_harmless(module: str, name: str) -> bool:
    """Return whether pickle makes an instance without running its class.

    The module is imported already, and the instance gets its ``__dict__``.
    """
    kind: Any = getattr(sys.modules.get(module), '__dict__', {}).get(name)
    is_class = isinstance(kind, type)
    return (
        is_class
        and kind.__new__ is object.__new__
        and kind.__getattribute__ is object.__getattribute__
        and not any(hasattr(kind, hook) for hook in _HOOKS)
    )


def _is_unsafe_chosen() -> bool:
    """Return whether the user chose unsafe loading, as torch reads it.

    Torch before 2.6 does not know the variable, and loads unsafely anyway.
    """
    return os.environ.get(UNSAFE, '').lower() in ('1', 'y', 'yes', 'true')


def _in_archive(path: str) -> Any:
    size = os.path.getsize(path)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f'{path!r} ({size} bytes) is cut off or no checkpoint: its writer '
            f'was stopped, or the copy is not complete; take an earlier '
            f'checkpoint.'
        )
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        root = names[0].split('/')[0] if names else ''
        pickled = f'{root}/data.pkl'
        if pickled not in names:
            raise CheckpointError(_not_one(path))
        if f'{root}/constants.pkl' in names:
            raise CheckpointError(
                f'{path!r} is a TorchScript archive, which holds a program; '
                f'{_WRITE}.'
            )
        records = {info.filename: info for info in archive.infolist()}
        # torch can leave out all checksums (set_crc32_options)
        checked = any(info.CRC for info in records.values())
        if checked:
            _check(archive, records[pickled], path)
        data = archive.open(records[pickled])
        if not checked:
            data._expected_crc = None  # type: ignore[attr-defined]
        with data:
            content_pickle = data.read()
        # a file can be made so that two readers find two archives in it
        reader = torch._C.PyTorchFileReader(path)
        if reader.get_record('data.pkl') != content_pickle:
            raise CheckpointError(
                f'{path!r} has two structures; it is damaged, or made to '
                f'deceive. Take another checkpoint.'
            )
        content: Any = {}
        tensors: List[Tuple[Tensor, _Storage]] = []
        if not _is_unsafe_chosen():
            look = _Look(io.BytesIO(content_pickle))
            content, tensors = look.read(), look.tensors
        stored: Dict[str, Tuple[Tensor, _Storage]] = {}
        for tensor, storage in tensors:
            stored.setdefault(f'{root}/data/{storage.key}', (tensor, storage))
        for record, (tensor, storage) in stored.items():
            info = records.get(record)
            if info is None or info.file_size < storage.nbytes:
                held = 'no' if info is None else str(info.file_size)
                raise CheckpointError(
                    f'{path!r} is damaged: it holds {held} of the '
                    f'{storage.nbytes} bytes of {_name_of(content, tensor)}. '
                    f'Take another checkpoint.'
                )
        for record, info in records.items() if checked else ():
            holder = stored[record][0] if record in stored else None
            _check(archive, info, path, content, holder)
    return content


def _check(
    archive: Any, info: Any, path: str, content: Any = None, tensor: Any = None
) -> None:
    """Compare a record with its checksum; zipfile does so at its end."""
    try:
        with archive.open(info) as record:
            while record.read(2**20):
                pass
    except Exception as error:  # damaged bytes can raise anything
        what = info.filename if tensor is None else _name_of(content, tensor)
        raise CheckpointError(
            f'{path!r} is damaged: {what} is not what was written '
            f'({type(error).__name__}). Take another checkpoint.'
        ) from None


def _name_of(content: Any, tensor: Tensor) -> str:
    for name, value in _walk(content, ''):
        if value is tensor:
            return name[1:]
    return 'a tensor'


def _walk(value: Any, name: str) -> Iterator[Tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f'{name}.{key}')
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from _walk(item, f'{name}.{place}')
    else:
        yield name, value


def _in_legacy_file(path: str) -> Any:
    """Look into a file of torch before 1.6: five pickles, then the data.

    It has no checksums.
    """
    with open(path, 'rb') as file:
        try:
            # torch would find a tar archive in a file that is one, too
            with tarfile.open(fileobj=file, mode='r:') as archive:
                is_tar = bool(archive.getnames())
        except tarfile.TarError:
            is_tar = False
        if is_tar:
            raise CheckpointError(
                f'{path!r} is a tar archive, as torch before 0.1.10 wrote; '
                f'load it with an old torch and save it again.'
            )
        file.seek(0)
        if _is_unsafe_chosen():
            return {}
        try:
            magic = _Look(file).load()
        except _RefusedError:
            raise
        except Exception:  # any bytes at all
            magic = None
        if type(magic) is not int or magic != _LEGACY:
            raise CheckpointError(_not_one(path))
        for _ in ('protocol', 'system'):
            _Look(file).load()
        look = _Look(file)
        content = look.read()
        stored = {storage.key: (t, storage) for t, storage in look.tensors}
        for key in _Look(file).load():
            tensor, storage = stored[key]
            numel = int.from_bytes(file.read(8), 'little')
            begin = file.tell()
            end = file.seek(begin + storage.nbytes)
            if numel != storage.numel or end > os.path.getsize(path):
                raise CheckpointError(
                    f'{path!r} is cut off or damaged at '
                    f'{_name_of(content, tensor)}; take another checkpoint.'
                )
    return content


def _not_one(path: str) -> str:
    if path.endswith('.safetensors'):
        return (
            f'{path!r} is a file of safetensors, which the framework does '
            f'not read; save its tensors with torch.save.'
        )
    return (
        f'{path!r} ({os.path.getsize(path)} bytes) is no checkpoint; {_WRITE}.'
    )
