"""Look into a checkpoint file before anything is loaded; write one whole.

Nothing in a file is run or built. ``torch.load(weights_only=True)`` would
do the same on a new torch, but not on those before 2.6, and it checks no
checksum.
"""

from __future__ import annotations

import _compat_pickle
import contextlib
import errno
import importlib
import io
import os
import pickle
import pickletools
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from typing import (
    Any,
    BinaryIO,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Set,
    Tuple,
    Type,
    Union,
)

import torch
from torch import Tensor

from mmdet_ema.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

UNSAFE = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
LOADS_SAFELY = torch.torch_version.TorchVersion(torch.__version__) >= '2.6'
"""Whether ``torch.load`` has ``weights_only=True`` by default."""
HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
STATISTICS = ('current', 'max', 'mean', 'min')
TEMPORARY = '.mmdet_ema'
"""Ends the name of a file that is being written."""

_WRITE = 'give the path of a .pth file that a training run wrote'
_LEGACY = 0x1950A86A20F9469CFC6C  # the number that files before torch 1.6 have
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


def read_structure(path: str) -> Mapping[str, Any]:
    """Check a local checkpoint, and return it without its data.

    Every record of the file is compared with its CRC-32, which torch writes
    and does not look at (torch before 1.6 wrote none).

    Returns:
        The checkpoint, with its tensors on the ``meta`` device and stand-ins
        for objects. Empty where ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` says to
        load unsafely.

    Raises:
        CheckpointError: If the file is missing, damaged or not a checkpoint,
            or if reading it could run code.
    """
    with one_line(path):
        if path.endswith('.safetensors'):
            raise RefusedError(
                'is a file of safetensors, which the framework does not '
                'read; save its tensors with torch.save.'
            )
        found = look(path, Look)
    return found.content


@contextlib.contextmanager
def one_line(path: str) -> Iterator[None]:
    """Turn whatever damaged bytes raise in the body into one line.

    Raises:
        CheckpointError: Instead of any exception in the body.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f'there is no file {path!r}; {_WRITE}.')
    try:
        yield
    except RefusedError as refused:
        raise CheckpointError(f'{path!r} {refused}') from None
    except CheckpointError as error:
        text = ' '.join(str(error).split())
        text = text if path in text else f'{path!r}: {text}'
        raise CheckpointError(text) from None
    except Exception as error:  # damaged bytes can raise anything
        cause = (str(error).strip().splitlines() or [''])[0][:200]
        cause = cause.rstrip('.') or type(error).__name__
        raise CheckpointError(
            f'{path!r} ({os.path.getsize(path)} bytes) is damaged, or is no '
            f'checkpoint ({cause}); {_WRITE}.'
        ) from None


class Found(NamedTuple):
    """What was found in a file.

    Attributes:
        content: The checkpoint, with its tensors on the ``meta`` device.
        tensors: Each with its storage, and where it starts in that.
        records: Where the bytes of a storage are, by its key: the offset in
            the file, or the bytes themselves where they are compressed.
    """

    content: Mapping[str, Any]
    tensors: List[Tuple[Tensor, Storage, int]]
    records: Dict[str, Union[int, bytes]]


def look(path: str, kind: Type[Look], check: bool = True) -> Found:
    """Look into a file that torch wrote.

    Args:
        path: The file.
        kind: Reads the pickle.
        check: Whether to compare every record with its CRC-32.

    Raises:
        Exception: Of any kind if the file is damaged; :func:`one_line`.
    """
    with open(path, 'rb') as file:
        is_zip = file.read(4) == b'PK\3\4'
    find = _look_into_zip if is_zip else _look_into_old
    found = find(path, kind, check)
    if not isinstance(found.content, Mapping):
        raise RefusedError(
            f'holds a {type(found.content).__name__}, not a dict with a '
            f'state_dict; {_WRITE}.'
        )
    return found


def write_whole(
    path: str,
    content: Union[bytes, Callable[[BinaryIO], Any]],
    name_of: Optional[Callable[[str], str]] = None,
) -> None:
    """Write a file under a temporary name, and move it into place.

    A file of that name is replaced; a link is followed. Once this returns, the
    file is on the disk, not only in the memory of the machine.

    Args:
        path: The file.
        content: Its content, or what writes that into an open file.
        name_of: Returns its path once it is written, by the temporary one.
            Defaults to ``path``.

    Raises:
        OSError: If there is no room, say: what was there before is as it was.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    if not os.path.isdir(folder):
        os.makedirs(folder, exist_ok=True)
    # hidden, so that nothing that looks for checkpoints finds it
    temporary = os.path.join(folder, f'.{name}.{os.getpid()}{TEMPORARY}')
    try:
        with open(temporary, 'wb') as file:
            lock(file)
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            sync(file.fileno())
            if name_of is not None:
                path = os.path.realpath(name_of(temporary))
            os.replace(temporary, path)
    except OSError as error:
        size = len(content) if isinstance(content, bytes) else 0
        raise _not_written(error, path, size) from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    sync_folder(folder)


def lock(file: Any) -> bool:
    """Lock a file as long as this process has it open.

    Returns:
        False if another process has locked it, or if that cannot be known.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sync_folder(folder: str) -> None:
    """Bring the names in a folder to the disk."""
    if os.name != 'posix':
        return  # it cannot be opened there
    handle = os.open(folder, os.O_RDONLY)
    try:
        sync(handle)
    finally:
        os.close(handle)


def sync(handle: int) -> None:
    """Bring an open file to the disk."""
    try:
        os.fsync(handle)
    except OSError as error:
        # some file systems have no such thing
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def _not_written(error: OSError, path: str, size: int) -> OSError:
    """Say what an error while a file was written means for a run."""
    reason = f'{path} was not written: {error.strerror or error}'
    remedy = ''
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(os.path.dirname(path)).free
        needed = f'{size / 2**20:.1f} MiB needed, ' if size else ''
        reason += f' ({needed}{free / 2**20:.1f} MiB free)'
        remedy = ' Make room, and resume.'
    said = f'{reason}. The files before it are as they were.{remedy}'
    return OSError(error.errno, said)


class RefusedError(Exception):
    """The rest of a sentence about a file."""


def _look_into_zip(path: str, kind: Type[Look], check: bool) -> Found:
    if not zipfile.is_zipfile(path):
        raise RefusedError(
            f'({os.path.getsize(path)} bytes) is cut off or no checkpoint: '
            f'its writer was stopped, or the copy is not complete; take an '
            f'earlier checkpoint.'
        )
    # a file can be made so that two readers find two archives in it: what is
    # looked at is what torch will read
    reader = torch._C.PyTorchFileReader(path)
    if 'constants.pkl' in reader.get_all_records():
        raise RefusedError(
            f'is a TorchScript archive, which holds a program; {_WRITE}.'
        )
    pickled = reader.get_record('data.pkl')
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: info for info in archive.infolist()}
        root = next(iter(records)).split('/')[0]
        structure, bad = f'{root}/data.pkl', None
        # torch can leave out all checksums (set_crc32_options)
        if any(info.CRC for info in records.values()):
            is_same = zlib.crc32(pickled) == records[structure].CRC
            bad = structure if not is_same else None
            if is_same and check:
                bad = archive.testzip()
        found, named = Found({}, [], {}), bad
        if bad != structure and not is_unsafe_chosen():
            reading = kind(io.BytesIO(pickled))
            found = Found(reading.load(), reading.tensors, {})
            for tensor, storage, _ in found.tensors:
                record = f'{root}/data/{storage.key}'
                held = records[record].file_size if record in records else 0
                if held < storage.nbytes:
                    raise RefusedError(
                        f'is damaged: it holds {held} of the '
                        f'{storage.nbytes} bytes of '
                        f'{_name_of(tensor, found.content)}. Take another '
                        f'checkpoint.'
                    )
                if record == named:
                    named = _name_of(tensor, found.content)
        if bad is not None:
            raise RefusedError(
                f'is damaged: {named} is not what was written. Take another '
                f'checkpoint.'
            )
        keys = {storage.key for _, storage, _ in found.tensors}
        for key in keys if kind.needs_records else ():
            info = records.get(f'{root}/data/{key}')
            if info is not None:
                found.records[key] = _place_of(archive, info)
    return found


def _place_of(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> Union[int, bytes]:
    """Return the offset of a record, or what is in it if it is compressed."""
    if info.compress_type != zipfile.ZIP_STORED:
        return archive.read(info)
    with archive.open(info):  # checks the header that stands before it
        pass
    file: Any = archive.fp
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack('<HH', file.read(4))
    return int(info.header_offset + 30 + name + extra)


def _look_into_old(path: str, kind: Type[Look], check: bool) -> Found:
    """Look into a file of torch before 1.6: five pickles, then the data."""
    with open(path, 'rb') as file:
        if is_unsafe_chosen():
            return Found({}, [], {})
        # torch would find a tar archive in a file that is one, too
        if Look(file).load() != _LEGACY or tarfile.is_tarfile(path):
            raise ValueError('it has another format')
        for _ in ('protocol', 'system'):
            Look(file).load()
        reading = kind(file)
        found = Found(reading.load(), reading.tensors, {})
        stored = {x.key: (tensor, x) for tensor, x, _ in found.tensors}
        for key in Look(file).load():
            tensor, storage = stored[key]
            numel = int.from_bytes(file.read(8), 'little')
            found.records[key] = file.tell()
            end = file.seek(storage.nbytes, os.SEEK_CUR)
            if numel != storage.numel or end > os.path.getsize(path):
                raise RefusedError(
                    f'is cut off or damaged at '
                    f'{_name_of(tensor, found.content)}; take another '
                    f'checkpoint.'
                )
    return found


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
        for _, value in _walk(args):
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


class Look(pickle.Unpickler):
    """Reads a pickle and builds dicts, lists, plain values, meta tensors."""

    needs_records = False

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
        # torch writes names of Python 2
        module, name = _compat_pickle.NAME_MAPPING.get(
            (module, name),
            (_compat_pickle.IMPORT_MAPPING.get(module, module), name),
        )
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
        self.tensors.append((tensor, storage, start))
        return tensor


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
        f'asks for {name[:200]!r} when it is read, which is not a part of '
        f'weights or plain values and could run code; nothing of the file '
        f'was run. If you trust it, set the environment variable {UNSAFE}=1, '
        f'or use --unsafe of mmdet-ema.'
    )


def _name_of(tensor: Tensor, content: Any) -> str:
    return next((k[1:] for k, v in _walk(content) if v is tensor), 'a tensor')


def _walk(
    value: Any, name: str = '', seen: Optional[Set[int]] = None
) -> Iterator[Tuple[str, Any]]:
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
            yield from _walk(item, f'{name}.{key}', seen)
