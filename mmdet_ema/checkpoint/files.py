"""Look into a checkpoint file before anything is loaded; write one whole.

Nothing in a file is run or built (:mod:`mmdet_ema.checkpoint.pickles`), and
every record is compared with its checksum, which torch does not look at.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
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
    Tuple,
    Type,
    Union,
)

import torch
from torch import Tensor

from mmdet_ema.checkpoint.pickles import (
    RefusedError,
    SafeUnpickler,
    Storage,
    is_unsafe_chosen,
    walk,
)
from mmdet_ema.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY = '.mmdet_ema'
"""Ends the name of a file that is being written."""

_WRITE = 'give the path of a .pth file that a training run wrote'
_LEGACY = 0x1950A86A20F9469CFC6C  # the number that files before torch 1.6 have


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
        found = look(path, None if is_unsafe_chosen() else SafeUnpickler)
    return found.content


@contextlib.contextmanager
def one_line(path: str) -> Iterator[None]:
    """Turn whatever damaged bytes raise into a CheckpointError of one line."""
    if os.path.isdir(path):
        raise CheckpointError(
            f'{path!r} is a folder; give a file: under DeepSpeedStrategy '
            f'the ema.pth in it.'
        )
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


def look(
    path: str, kind: Optional[Type[SafeUnpickler]], check: bool = True
) -> Found:
    """Look into a file that torch wrote; any exception if it is damaged.

    Args:
        path: The file.
        kind: Reads the pickle; None to look at checksums alone.
        check: Whether to compare every record with its CRC-32.
    """
    with open(path, 'rb') as file:
        start = file.read(40)
    if start.startswith(b'version https://git-lfs'):
        raise RefusedError(
            'is a pointer of Git LFS in the place of a file; fetch that by '
            'git lfs pull.'
        )
    if start.startswith(b'{'):
        raise RefusedError(
            'is JSON, as an index of the pieces of a checkpoint is; give the '
            'pieces.'
        )
    # of a file that was cut off at once there is less, or nothing
    is_zip = b'PK\3\4'.startswith(start[:4])
    find = _look_into_zip if is_zip else _look_into_old
    found = find(path, kind, check)
    if not isinstance(found.content, Mapping):
        raise RefusedError(
            f'holds a {type(found.content).__name__}, not a dict with a '
            f'state_dict; {_WRITE}.'
        )
    return found


def _look_into_zip(
    path: str, kind: Optional[Type[SafeUnpickler]], check: bool
) -> Found:
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
            if zlib.crc32(pickled) != records[structure].CRC:
                raise _not_as_written(structure)
            bad = archive.testzip() if check else None
        found, needed = Found({}, [], {}), False
        if kind is not None:
            reading, needed = kind(io.BytesIO(pickled)), kind.needs_records
            found = Found(reading.load(), reading.tensors, {})
        for tensor, storage, _ in found.tensors:
            record = records.get(f'{root}/data/{storage.key}')
            held = record.file_size if record else 0
            if held < storage.nbytes:
                raise RefusedError(
                    f'is damaged: it holds {held} of the {storage.nbytes} '
                    f'bytes of {_name_of(tensor, found.content)}. Take '
                    f'another checkpoint.'
                )
            if record and record.filename == bad:
                raise _not_as_written(_name_of(tensor, found.content))
            if record and needed and storage.key not in found.records:
                found.records[storage.key] = _place_of(archive, record)
        if bad is not None:
            raise _not_as_written(bad)
    return found


def _not_as_written(name: str) -> RefusedError:
    return RefusedError(
        f'is damaged: {name} is not what was written. Take another checkpoint.'
    )


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


def _look_into_old(
    path: str, kind: Optional[Type[SafeUnpickler]], check: bool
) -> Found:
    """Look into a file of torch before 1.6: five pickles, then the data."""
    with open(path, 'rb') as file:
        if kind is None:
            return Found({}, [], {})
        # torch would find a tar archive in a file that is one, too
        if SafeUnpickler(file).load() != _LEGACY or tarfile.is_tarfile(path):
            raise ValueError('it has another format')
        for _ in ('protocol', 'system'):
            SafeUnpickler(file).load()
        reading = kind(file)
        found = Found(reading.load(), reading.tensors, {})
        stored = {x.key: (tensor, x) for tensor, x, _ in found.tensors}
        for key in SafeUnpickler(file).load():
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


def _name_of(tensor: Tensor, content: Any) -> str:
    return next((k[1:] for k, v in walk(content) if v is tensor), 'a tensor')


def write_whole(
    path: str,
    content: Union[bytes, Callable[[BinaryIO], Any]],
    name_of: Optional[Callable[[str], str]] = None,
) -> None:
    """Write a file under a temporary name, and move it into place.

    A file of that name is replaced; a link is followed. Once this returns, the
    file is on the disk, not only in the memory of the machine. If there is no
    room, say, what was there before is as it was.

    Args:
        path: The file.
        content: Its content, or what writes that into an open file.
        name_of: Returns its path once it is written, by the temporary one.
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
    """Lock a file as long as this process has it open, if nobody else has.

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
