"""Looking into a file: shapes without data, and every kind of bad file."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmdet_ema.averaging import CheckpointError
from mmdet_ema.checkpoint import read_structure
from mmdet_ema.checkpoint.pickles import LOADS_SAFELY
from tests.averaging.models import FLOAT8, Mixed, run_python


@pytest.fixture(autouse=True)
def _safe(monkeypatch):
    monkeypatch.delenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', raising=False)


def content():
    return dict(
        meta=dict(epoch=3, time='now', lr=0.1),
        state_dict=Mixed().state_dict(),
        optimizer=dict(state={0: {'momentum': torch.ones(3)}}),
        empty=torch.zeros(0, 3),
    )


def write(path, value=None):
    torch.save(content() if value is None else value, path)
    return str(path)


def archive(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def legacy(value):
    return archive(value, _use_new_zipfile_serialization=False)


def zip_of(records):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return file.getvalue()


def message_of(path):
    """Return the one clear line with which a file is refused."""
    with pytest.raises(CheckpointError) as error:
        read_structure(path)
    message = str(error.value)
    assert repr(path) in message
    assert '\n' not in message
    assert message.endswith('.')
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__ or not error.value.__context__
    return message


def test_structure(tmp_path):
    """Shapes, dtypes and plain values are read, the data is not."""
    structure = read_structure(write(tmp_path / 'a.pth'))
    expected = content()
    assert list(expected) == list(structure)
    assert expected['meta'] == structure['meta']
    found = structure['state_dict']
    assert list(expected['state_dict']) == list(found)
    for name, value in expected['state_dict'].items():
        assert 'meta' == found[name].device.type
        assert value.shape == found[name].shape
        assert value.dtype == found[name].dtype
    assert (0, 3) == tuple(structure['empty'].shape)


def test_large_file(tmp_path):
    """A file larger than the memory to be had is read in parts."""
    path = write(tmp_path / 'a.pth', dict(w=torch.zeros(80_000_000)))
    code = """
import sys
from mmdet_ema.checkpoint import read_structure
from tests.memory import peak
before = peak()
shape = read_structure(sys.argv[1])['w'].shape
print(shape.numel(), peak() - before)
"""
    run = run_python(code, path, OMP_NUM_THREADS='1')
    os.remove(path)
    assert 0 == run.returncode, run.stderr
    size, grown = map(float, run.stdout.split()[-2:])
    assert 80_000_000 == size
    assert grown < 30


@pytest.mark.parametrize(
    'value',
    [
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.quint8),
        torch.quantize_per_channel(
            torch.eye(3), torch.ones(3), torch.arange(3), 0, torch.quint8
        ),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, dtype=torch.bfloat16),
        *(torch.ones(2).to(x) for x in FLOAT8[:1]),
        torch.nn.Parameter(torch.ones(2)),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.tensor(1.0).expand(4),
    ],
    ids=lambda value: f'{value.layout}-{value.dtype}-{tuple(value.shape)}',
)
def test_kinds_of_tensors(tmp_path, value):
    """Every kind of tensor that torch reads is read."""
    try:
        path = write(tmp_path / 'a.pth', dict(state_dict=dict(w=value)))
    except KeyError:
        pytest.skip(f'this torch cannot save {value.dtype}')
    found = read_structure(path)['state_dict']['w']
    assert value.shape == found.shape


@pytest.mark.parametrize('part', [1, 0.99, 0.5])
def test_legacy(tmp_path, part):
    """A file of torch before 1.6 is read too; one that is cut off is not."""
    path = tmp_path / 'a.pth'
    data = legacy(content())
    path.write_bytes(data[: int(len(data) * part)])
    if part < 1:
        message_of(str(path))
    else:
        found = read_structure(str(path))['state_dict']
        expected = content()['state_dict']
        assert [(k, v.shape) for k, v in expected.items()] == [
            (k, v.shape) for k, v in found.items()
        ]


@pytest.mark.parametrize('unsafe', ['0', '1'])
def test_missing(tmp_path, monkeypatch, unsafe):
    """A file that is not there is named, and so is a directory."""
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', unsafe)
    path = str(tmp_path / 'no' / 'a.pth')
    assert f'there is no file {path!r}' in message_of(path)
    assert 'is a folder; give a file' in message_of(str(tmp_path))


@pytest.mark.parametrize(
    ('data', 'said'),
    [
        (b'version https://git-lfs.github.com/spec/v1\n', 'by git lfs pull'),
        (b'{"weight_map": {}}', 'is JSON, as an index of the pieces'),
    ],
)
def test_text_in_the_place_of_a_checkpoint(tmp_path, data, said):
    """What it is, and where the weights are."""
    path = tmp_path / 'model.safetensors.index.json'
    path.write_bytes(data)
    assert said in message_of(str(path))


@pytest.mark.parametrize(
    'data',
    [
        b'not a checkpoint\n',
        b'<html>404</html>',
        b'\x89PNG\r\n\x1a\n' + bytes(100),
        bytes(1000),
        pickle.dumps({'state_dict': {}}),
        pickle.dumps([1, 2]),
        zip_of({'readme.txt': b'hello'}),
    ],
    ids=repr,
)
def test_other_files(tmp_path, data):
    """A file of another kind is no checkpoint."""
    path = tmp_path / 'a.pth'
    path.write_bytes(data)
    message = message_of(str(path))
    assert 'is no checkpoint' in message
    assert f'{len(data)} bytes' in message


@pytest.mark.parametrize('part', [0, 1, 4, 0.1, 0.5, 0.9, 0.999])
def test_cut_off(tmp_path, part):
    """A file that was cut off is called so, with what to do."""
    path, data = tmp_path / 'a.pth', archive(content())
    size = part if isinstance(part, int) else int(len(data) * part)
    path.write_bytes(data[:size])
    message = message_of(str(path))
    assert f'({size} bytes) is cut off' in message
    assert 'earlier checkpoint' in message


@pytest.mark.parametrize(
    'value', [[1, 2], torch.ones(2), 3, 'text', None, (1,)], ids=repr
)
def test_no_dict_at_the_top(tmp_path, value):
    """A file that holds no dict is refused with what it holds."""
    path = tmp_path / 'a.pth'
    torch.save(value, path)  # `write` has another value for None
    message = message_of(str(path))
    assert f'holds a {type(value).__name__}, not a dict' in message


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Own:
    """A class of somebody, whose code a file must not run."""


@pytest.mark.parametrize(
    'value', [{Own()}, defaultdict(Own)], ids=['set', 'factory']
)
def test_own_class_that_reading_may_run(tmp_path, value):
    """A set asks for a hash, a ``defaultdict`` calls: refused on any torch."""
    assert 'could run code' in message_of(write(tmp_path / 'a.pth', [value]))


@pytest.mark.parametrize(
    'wrap', [lambda t: {'a': t}, lambda t: [t], lambda t: t]
)
@pytest.mark.parametrize('dump', [archive, legacy, pickle.dumps])
def test_malicious_file(tmp_path, wrap, dump):
    """What a file of any kind asks to be called is named, and not called."""
    mark, path = tmp_path / 'was_here', tmp_path / 'a.pth'
    path.write_bytes(dump(wrap(Trap(mark))))
    assert 'mkdir' in message_of(str(path))
    assert not mark.exists()
    if dump is not pickle.dumps:
        torch.load(path, weights_only=False)
        assert mark.exists()


@pytest.mark.parametrize(
    'value', ['1', 'true', 'yes', 'y', '0', 'false', 'no', '']
)
def test_unsafe_by_choice(tmp_path, monkeypatch, value):
    """Where the user chose unsafe loading, as torch reads it, nothing is."""
    path = write(tmp_path / 'a.pth', dict(trap=zipfile.main))
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', value)
    if value in ('1', 'true', 'yes', 'y'):
        assert {} == read_structure(path)
        return
    if LOADS_SAFELY:
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path)
    message_of(path)


SMALL = archive(
    dict(meta=OrderedDict(epoch=3), state_dict=dict(w=torch.ones(2)))
)
PICKLE = SMALL.index(b'\x80\x02}')


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    flips=st.lists(
        st.tuples(
            st.integers(0, len(SMALL) - 1) | st.integers(PICKLE, PICKLE + 250),
            st.integers(1, 255),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_damaged_bytes(tmp_path, flips):
    """Wherever a file is damaged: it is read, or refused in one line."""
    data = bytearray(SMALL)
    for place, mask in flips:
        data[place] ^= mask
    path = tmp_path / 'a.pth'
    path.write_bytes(data)
    refused = ''
    try:
        read_structure(str(path))
    except CheckpointError as error:
        refused = str(error)
    assert not refused or repr(str(path)) in refused
    assert '\n' not in refused


@pytest.mark.parametrize('record', ['data.pkl', 'data/0', 'version'])
def test_record_with_another_checksum(tmp_path, record):
    """A flipped bit in any record is found; a tensor is named."""
    path = tmp_path / 'a.pth'
    write(path, dict(state_dict=dict(w=torch.arange(5.0))))
    with zipfile.ZipFile(path) as archive:
        held = archive.read(f'a/{record}')
    data = path.read_bytes()
    place = data.index(held) + len(held) - 1
    path.write_bytes(
        data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    )
    name = 'state_dict.w' if record == 'data/0' else f'a/{record}'
    assert f'{name} is not what was written' in message_of(str(path))


def test_file_without_checksums(tmp_path):
    """A writer can leave them out; such a file is read."""
    if not hasattr(torch.serialization, 'set_crc32_options'):
        pytest.skip('this torch always writes checksums')
    torch.serialization.set_crc32_options(False)
    try:
        path = write(tmp_path / 'a.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    assert list(content()) == list(read_structure(path))


def test_record_that_is_too_short(tmp_path):
    """A record with fewer bytes than its tensor needs is named."""
    path = write(tmp_path / 'a.pth', dict(state_dict=dict(w=torch.ones(5))))
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    records = {k: v[:-1] if '/data/' in k else v for k, v in records.items()}
    Path(path).write_bytes(zip_of(records))
    assert '19 of the 20 bytes of state_dict.w' in message_of(path)


def test_program_of_torchscript(tmp_path):
    """An archive of TorchScript is refused in words."""
    path = str(tmp_path / 'a.pth')
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)), path)
    assert 'TorchScript' in message_of(path)


def test_name_of_safetensors(tmp_path):
    """A file of safetensors is refused in words."""
    path = tmp_path / 'a.safetensors'
    path.write_bytes((2).to_bytes(8, 'little') + b'{}')
    assert 'safetensors' in message_of(str(path))


def test_nested_tensor(tmp_path):
    """A tensor that is not one block is refused with what to save."""
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    try:
        path = write(tmp_path / 'a.pth', dict(state_dict=dict(w=nested)))
    except RuntimeError:
        pytest.skip('this torch cannot save nested tensors')
    assert 'sharded or nested tensor' in message_of(path)
