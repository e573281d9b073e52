"""Read a file without a framework: its tensors are mapped, not copied.

Nothing in a file is run or built, on any version of torch. Tensors get their
bytes from the file when somebody looks at them. NumPy's scalars and arrays
become numbers and lists; other objects are kept as stand-ins, which cannot be
saved.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from typing import Any, Dict, List, Mapping, Tuple, Union

import torch
from torch import Tensor

from mmdet_ema.checkpoint.files import Found, look, one_line
from mmdet_ema.checkpoint.pickles import (
    DATA,
    RefusedError,
    SafeUnpickler,
    StandIn,
    is_unsafe_chosen,
    name_today,
)
from mmdet_ema.checkpoint.recipe import KEY

# metadata of a safetensors file, as JSON
TIED = 'mmdet_ema_tied'
"""Further names of tensors, each with the one that is in the file."""
META = 'mmdet_ema_meta'
"""``meta``, as a file of torch has it."""

# of these nothing is built; a run would have to
_DATA = {
    *(*DATA.split(), 'argparse.Namespace', 'mmengine.config.config.Config'),
    *('pathlib.Path', 'pathlib.PurePath', 'pathlib.WindowsPath'),
    *('easydict.EasyDict', 'types.SimpleNamespace', 'yacs.config.CfgNode'),
    *('omegaconf.base.ContainerMetadata', 'omegaconf.base.Metadata'),
    *('omegaconf.dictconfig.DictConfig', 'omegaconf.listconfig.ListConfig'),
    *('omegaconf.nodes.AnyNode', 'omegaconf.nodes.BooleanNode'),
    *('omegaconf.nodes.FloatNode', 'omegaconf.nodes.IntegerNode'),
    *('omegaconf.nodes.StringNode', 'typing.Any'),
}
_MODULES_OF_YOLO = ('models.', 'ultralytics.', 'utils.')
_CODES = {
    **{'b1': '?', 'i1': 'b', 'i2': 'h', 'i4': 'i', 'i8': 'q'},
    **{'u1': 'B', 'u2': 'H', 'u4': 'I', 'u8': 'Q'},
    **{'f2': 'e', 'f4': 'f', 'f8': 'd'},
}
# safetensors' names of dtypes; torch before 2.1 has no 8-bit floats
DTYPES: Dict[str, torch.dtype] = {
    name: getattr(torch, dtype)
    for name, dtype in {
        'BOOL': 'bool',
        **{'U8': 'uint8', 'I8': 'int8', 'I16': 'int16', 'I32': 'int32'},
        **{'I64': 'int64', 'F16': 'float16', 'BF16': 'bfloat16'},
        **{'F32': 'float32', 'F64': 'float64'},
        **{'F8_E4M3': 'float8_e4m3fn', 'F8_E5M2': 'float8_e5m2'},
        **{'U16': 'uint16', 'U32': 'uint32', 'U64': 'uint64'},
        'C64': 'complex64',
    }.items()
    if hasattr(torch, dtype)
}
_LONGEST_HEADER = 100_000_000  # that safetensors itself reads


def read_file(
    path: str, *, check: bool = True, unsafe: bool = False
) -> Mapping[str, Any]:
    """Return what is in a local file; its tensors are mapped from it.

    Args:
        path: A file that torch or safetensors wrote.
        check: Whether to compare every record with its CRC-32, which reads
            the whole file. Defaults to True.
        unsafe: Whether to run what the file asks for, by ``torch.load``.
            Defaults to False.
    """
    with one_line(path):
        with open(path, 'rb') as file:
            start = file.read(9)
        if path.endswith('.safetensors') or start[8:] == b'{':
            return _read_safetensors(path)
        if not unsafe and not is_unsafe_chosen():
            return _fill(look(path, _Unpickler, check), path)
        look(path, None, check)  # its checksums
        options: Dict[str, Any] = dict(map_location='cpu', weights_only=False)
        content = torch.load(path, **options)
        if not isinstance(content, Mapping):
            raise RefusedError(
                f'holds a {type(content).__name__}, not a dict with weights.'
            )
        return content


class _Dtype(StandIn):
    """A ``numpy.dtype``: kind, size and order of bytes."""

    kind, order = '', '<'

    def __init__(self, kind: str = '', *args: Any):
        self.kind = kind

    def __setstate__(self, state: Any) -> None:
        self.order = '>' if state[1] == '>' else '<'

    def read(self, data: bytes) -> List[Any]:
        code = _CODES[self.kind]
        count = len(data) // struct.calcsize(code)
        return [*struct.unpack(f'{self.order}{count}{code}', data)]


class _Array(StandIn):
    """A ``numpy.ndarray``: nested lists in the end."""

    value: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if isinstance(dtype, _Dtype) and dtype.kind in _CODES:
            if not isinstance(data, bytes) or (fortran and len(shape) > 1):
                return
            flat = dtype.read(data)
            if len(flat) != math.prod(shape):
                raise ValueError('an array is not of the size that it says')
            for size in reversed(shape[1:]):
                if not size:
                    return
                starts = range(0, len(flat), size)
                flat = [flat[i : i + size] for i in starts]
            self.value = flat if shape else flat[0]


class _Unpickler(SafeUnpickler):
    """Builds what can be saved again; classes need not be installed."""

    needs_records = True

    def find_class(self, module: str, name: str) -> Any:
        module, name = name_today(module, name)
        full = f'{module}.{name}'
        if full == 'numpy.dtype':
            return _Dtype
        if module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
            if name == 'scalar':
                return _scalar
            if name == '_reconstruct':
                return _Array
        if full == 'torch._utils._rebuild_qtensor':
            return _quantized
        # getattr is one, and is looked at below
        known = module != 'builtins' and full in self.known()
        if known or full in _DATA:
            return type(full, (StandIn,), {})
        if module.startswith(_MODULES_OF_YOLO):
            raise RefusedError(
                f'is a pickle of the classes of YOLOv5 or ultralytics '
                f'({full}), which only their own code reads; in their '
                f'environment run ck = torch.load(FILE, weights_only=False); '
                f"torch.save({{'state_dict': (ck['ema'] or ck['model'])"
                f".float().state_dict()}}, 'weights.pth') and give that file."
            )
        return super().find_class(module, name)


def _quantized(storage: Any, start: int, size: Any, *more: Any) -> Tensor:
    # its integers alone would be other weights
    return torch.empty(size, dtype=torch.uint8, device='meta')


def _scalar(dtype: Any, data: Any = b'') -> Any:
    if isinstance(dtype, _Dtype) and dtype.kind in _CODES:
        (number,) = dtype.read(data)
        return number
    return StandIn()


def _fill(found: Found, path: str) -> Mapping[str, Any]:
    """Give the tensors of what was found their bytes, in place."""
    data = _map(path)
    bases: Dict[str, Tensor] = {}
    filled: Dict[int, Tensor] = {}
    for tensor, storage, start in found.tensors:
        if storage.key not in bases:
            record = found.records[storage.key]
            bases[storage.key] = _bytes_at(data, record, storage.nbytes)
        base = bases[storage.key]
        size = tensor.element_size()
        flat = base[: len(base) // size * size].view(tensor.dtype)
        values = flat.as_strided(tensor.shape, tensor.stride(), start)
        if tensor.is_conj():
            values = values.conj().resolve_conj()
        filled[id(tensor)] = -values if tensor.is_neg() else values
    content: Mapping[str, Any] = _replaced(found.content, filled, {})
    return content


def _replaced(
    value: Any, filled: Mapping[int, Tensor], seen: Dict[int, Any]
) -> Any:
    if isinstance(value, Tensor):
        return filled.get(id(value), value)
    if isinstance(value, _Array):
        return value if value.value is None else value.value
    if not isinstance(value, (dict, list, tuple)) or id(value) in seen:
        return seen.get(id(value), value)
    seen[id(value)] = value
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _replaced(item, filled, seen)
    elif isinstance(value, list):
        value[:] = [_replaced(item, filled, seen) for item in value]
    else:
        result = tuple(_replaced(item, filled, seen) for item in value)
        seen[id(value)] = result
        return result
    return value


def _map(path: str) -> Any:
    """Map a file; what is written there stays in memory."""
    with open(path, 'rb') as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _bytes_at(data: Any, record: Union[int, bytes], nbytes: int) -> Tensor:
    """Return bytes as a tensor with a storage of its own."""
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    if isinstance(record, int):
        if record % 8 == 0:
            return torch.frombuffer(
                data, dtype=torch.uint8, count=nbytes, offset=record
            )
        # numbers that stand at odd addresses cannot be computed with
        record = data[record : record + nbytes]
    return torch.frombuffer(
        bytearray(record), dtype=torch.uint8, count=nbytes
    ).clone()


def _read_safetensors(path: str) -> Mapping[str, Any]:
    size = os.path.getsize(path)
    data = _map(path)
    length = int.from_bytes(data[:8], 'little')
    if length > min(size - 8, _LONGEST_HEADER):
        raise RefusedError(
            f'({size} bytes) is cut off or damaged; take another file.'
        )
    header = json.loads(bytes(data[8 : 8 + length]).decode('utf-8'))
    metadata = header.pop('__metadata__', {})
    weights = {
        name: _entry(data, entry, 8 + length, size, name)
        for name, entry in header.items()
    }
    # safetensors' save_model() notes them one by one
    ties = {**metadata, **json.loads(metadata.get(TIED, '{}'))}
    for name, other in ties.items():
        if name not in weights and other in weights:
            weights[name] = weights[other]
    meta = dict(json.loads(metadata.get(META, '{}')))
    if KEY in metadata:
        meta[KEY] = dict(json.loads(metadata[KEY]))
    return {'state_dict': weights, 'meta': meta}


def _entry(data: Any, entry: Any, start: int, size: int, name: str) -> Tensor:
    if entry['dtype'] not in DTYPES:
        raise RefusedError(
            f'holds {name[:200]!r} as {entry["dtype"]!r:.40}, which this '
            f'torch does not know; use a newer one.'
        )
    dtype = DTYPES[entry['dtype']]
    shape: Tuple[int, ...] = tuple(map(int, entry['shape']))
    first, last = map(int, entry['data_offsets'])
    width = torch.empty((), dtype=dtype).element_size()
    wanted = math.prod(shape) * width
    inside = 0 <= first <= last <= size - start
    if min(shape, default=0) < 0 or last - first != wanted or not inside:
        raise RefusedError(
            f'is cut off or damaged at {name[:200]}; take another file.'
        )
    flat = _bytes_at(data, start + first, wanted)
    return flat.view(dtype).view(shape)
