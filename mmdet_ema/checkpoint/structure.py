"""Look into a checkpoint file without reading its tensors."""

from __future__ import annotations

import inspect
import os
import pickle
import re
import zipfile
from typing import Any, Dict, Mapping

import torch

from mmdet_ema.core.errors import CheckpointError

_UNSAFE = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
# what torch 1.13 says to the opcode of a Python float
_NO_FLOATS = 'Unsupported operand 71'
_WRITE = 'give the path of a .pth file that a training run wrote'


def read_structure(path: str) -> Mapping[str, Any]:
    """Read a local checkpoint with tensors that have shapes but no data.

    Safe for untrusted files: nothing in them is executed
    (``weights_only=True``).

    Args:
        path: A file.

    Returns:
        The checkpoint, its tensors on the ``meta`` device. Empty for a file
        in torch's format before 1.6, which cannot be read in parts, and where
        ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` says to load unsafely, or torch
        is so old (1.13) that it refuses every file with a float in it.

    Raises:
        CheckpointError: If the file is missing, cut off, no checkpoint, or
            holds more than weights and plain values.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f'there is no file {path!r}; {_WRITE}.')
    if _is_legacy(path):
        if not _is_unsafe_chosen():
            _load(path, mmap=False)
        return {}
    if not _is_torch_zip(path):
        raise CheckpointError(_why_not(path))
    if _is_unsafe_chosen():
        return {}
    return _check_mapping(path, _load(path, mmap=True))


def _load(path: str, mmap: bool) -> Any:
    try:
        return torch.load(path, weights_only=True, **_lazily(mmap))
    except pickle.UnpicklingError as error:
        if _NO_FLOATS in str(error):
            return {}
        raise CheckpointError(
            f'{path!r} holds objects other than weights and plain values '
            f'({_cause(error)}), which could run code when read. If you trust '
            f'it, set the environment variable {_UNSAFE}=1.'
        ) from None
    except Exception as error:  # damaged bytes can raise anything
        raise CheckpointError(
            f'{path!r} is no readable checkpoint ({_cause(error)}); {_WRITE}.'
        ) from None


def _lazily(mmap: bool) -> Dict[str, Any]:
    """Return options that read no tensor; torch before 2.1 has none."""
    if 'mmap' not in inspect.signature(torch.load).parameters:
        return {'map_location': 'cpu'}
    return {'map_location': 'meta', 'mmap': mmap}


def _check_mapping(path: str, content: Any) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f'{path!r} holds a {type(content).__name__}, not a dict with a '
            f'state_dict; {_WRITE}.'
        )
    return content


def _is_unsafe_chosen() -> bool:
    """Return whether the user chose unsafe loading, as torch reads it."""
    return os.environ.get(_UNSAFE, '').lower() in ('1', 'y', 'yes', 'true')


def _is_torch_zip(path: str) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(n.endswith('/data.pkl') for n in archive.namelist())
    except Exception:  # damaged bytes can raise anything
        return False


def _is_legacy(path: str) -> bool:
    """Return whether a file starts with the magic number of old files."""
    with open(path, 'rb') as file:
        head = file.read(32)
    return b'\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19' in head


def _is_whole_zip(path: str) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except Exception:  # damaged bytes can raise anything
        return False


def _why_not(path: str) -> str:
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
        begins_as_zip = file.read(2) == b'PK'
    if begins_as_zip and not _is_whole_zip(path):
        return (
            f'{path!r} ({size} bytes) is cut off: its writer was stopped or '
            f'the copy is not complete; take an earlier checkpoint.'
        )
    return f'{path!r} ({size} bytes) is no checkpoint; {_WRITE}.'


def _cause(error: BaseException) -> str:
    """Return what is wrong; never torch's advice to load unsafely."""
    text = str(error)
    found = re.search(r'(?:GLOBAL|class|global:?) ([\w.]+\.[\w.]+)', text)
    if found:
        return found.group(1)
    lines = [x.strip() for x in text.splitlines() if x.strip()]
    told = [x for x in lines if 'weights_only' not in x and len(x) < 200]
    return (told or [type(error).__name__])[-1]
