"""Write a file that the toolbox made: whole or not at all, and streamed.

Tensors go from the file that they are mapped from to the new one; no copy of
the weights is made in memory.
"""

from __future__ import annotations

import json
import os
import sys
from collections import OrderedDict
from typing import (
    Any,
    BinaryIO,
    Callable,
    Dict,
    List,
    Mapping,
    Optional,
    Tuple,
)

import torch
from torch import Tensor

from mmdet_ema.checkpoint.files import write_whole
from mmdet_ema.checkpoint.mapped import DTYPES, TIED
from mmdet_ema.checkpoint.portable import foreign
from mmdet_ema.checkpoint.recipe import sha256_of
from mmdet_ema.errors import CheckpointError

STDOUT = '-'
_BLOCK = 2**24
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save(
    content: Any,
    path: str,
    *,
    force: bool = False,
    add_hash: bool = False,
) -> str:
    """Write what ``torch.load(weights_only=True)`` reads.

    Args:
        content: Plain values and tensors; see :func:`plain`.
        path: The file, or ``'-'`` for the standard output.
        force: Whether to replace a file of that name. Defaults to False.
        add_hash: Whether to end the name with the first 8 digits of the
            file's SHA-256, as ``torch.hub`` and ``publish_model.py`` do.
            Defaults to False.

    Returns:
        The path of the file.
    """
    # equal texts as one object: pickle writes these in another way, and a
    # recipe has to give the same bytes
    content = _plain(content, '', [], {})
    return _write(
        lambda file: _torch_save(content, file), path, force, add_hash
    )


class _Patient:
    """A file whose error waits until torch has written the rest.

    Its writer hides what the file said behind an error of its own, and that
    of torch 1.13 ends the process.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: Optional[OSError] = None

    def write(self, data: bytes) -> int:
        try:
            if self.error is None:
                self._file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        pass  # who opened the file does


def _torch_save(content: Any, file: BinaryIO) -> None:
    patient: Any = _Patient(file)
    torch.save(content, patient)
    if patient.error is not None:
        raise patient.error


def save_safetensors(
    tensors: Mapping[str, Tensor],
    path: str,
    metadata: Mapping[str, str],
    *,
    force: bool = False,
    add_hash: bool = False,
) -> str:
    """Write a file of safetensors; the options are those of :func:`save`.

    That format knows no tied tensors: each is written once, under its first
    name, and the metadata has the other ones.
    """
    first: Dict[int, str] = {}
    tied: Dict[str, str] = {}
    for name, tensor in tensors.items():
        known = first.setdefault(id(tensor), name)
        if known != name:
            tied[name] = known
    written = {name: tensors[name] for name in first.values()}
    header: Dict[str, Any] = {'__metadata__': dict(metadata)}
    end = 0
    for name, tensor in written.items():
        if tensor.dtype not in _NAMES:
            raise CheckpointError(
                f'{name} is of {tensor.dtype}, which safetensors does not '
                f'know; use --dtype, or write a .pth file.'
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            'dtype': _NAMES[tensor.dtype],
            'shape': list(tensor.shape),
            'data_offsets': [start, end],
        }
    if tied:
        header['__metadata__'][TIED] = json.dumps(tied)
    text = json.dumps(header, ensure_ascii=False).encode('utf-8')
    text += b' ' * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, 'little') + text)
        for tensor in written.values():
            flat = tensor.detach().reshape(-1).contiguous()
            if flat.numel():
                values: Any = flat.view(torch.uint8).numpy()
                data = memoryview(values)
                for start in range(0, len(data), _BLOCK):
                    file.write(data[start : start + _BLOCK])

    return _write(write, path, force, add_hash)


def plain(content: Mapping[str, Any]) -> Tuple[Dict[str, Any], List[str]]:
    """Return what can be saved of a content, and the names of what cannot.

    Objects that were not read, and of classes that ``weights_only=True`` does
    not know, are left out.
    """
    lost: List[str] = []
    kept: Dict[str, Any] = _plain(content, '', lost, {})
    return kept, lost


def _plain(
    value: Any, name: str, lost: List[str], done: Dict[Any, Any]
) -> Any:
    if type(value) is str:
        return done.setdefault(value, value)
    if id(value) in done:
        return done[id(value)]
    result: Any = value
    if isinstance(value, Mapping):
        # dicts of other classes (configs) are dicts as well
        result = OrderedDict() if type(value) is OrderedDict else {}
        done[id(value)] = result
        if type(value) is OrderedDict:  # its _metadata
            own = _plain(value.__dict__, name, lost, done)
            result.__dict__.update(own)
        for key, item in value.items():
            inner = f'{name}.{key}' if name else str(key)
            if foreign(key):
                lost.append(inner)
                continue
            kept = _plain(item, inner, lost, done)
            if kept is not _LOST:
                result[_plain(key, inner, lost, done)] = kept
    elif type(value) in (list, tuple):
        items = [
            _plain(x, f'{name}.{i}', lost, done) for i, x in enumerate(value)
        ]
        # an index would name another entry if one were left out
        whole = not any(item is _LOST for item in items)
        result = type(value)(items) if whole else _LOST
        done[id(value)] = result
    elif foreign(value) or getattr(value, 'is_meta', False):
        lost.append(name)
        result = _LOST
    return result


_LOST = object()


def _write(
    write: Callable[[BinaryIO], None], path: str, force: bool, add_hash: bool
) -> str:
    if path == STDOUT:
        write(sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return path
    check_free(path, force)

    def with_hash(temporary: str) -> str:
        nonlocal path
        root, end = os.path.splitext(path)
        path = f'{root}-{sha256_of(temporary)[:8]}{end}'
        check_free(path, force)
        return path

    write_whole(path, write, with_hash if add_hash else None)
    return path


def check_free(path: str, force: bool) -> None:
    """Refuse a path that cannot be written, or that would replace a file."""
    if path == STDOUT:
        return
    folder = os.path.dirname(path) or '.'
    if not os.path.isdir(folder):
        raise CheckpointError(
            f'{path!r} cannot be written: there is no folder {folder!r}; '
            f'make it.'
        )
    if os.path.isdir(path):
        raise CheckpointError(f'{path!r} is a folder; name a file in it.')
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(
            f'{path!r} is a device or a pipe, which no file can replace; '
            f'name a file, or - for the standard output.'
        )
    if os.path.exists(path) and not force:
        raise CheckpointError(
            f'{path!r} exists already; use --force to replace it, or write '
            f'to another path.'
        )
