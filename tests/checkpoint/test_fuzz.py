"""Damaged, made-up and malicious files: one line or a right file, no code.

Golden files are mutated (bytes, records, the pickle with its checksum put
right, values), contents are made up by Hypothesis. 200 cases, and 10,000 with
``MMDET_EMA_SLOW=1``.
"""

import io
import json
import os
import pickle
import random
import struct
import sys
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmdet_ema.checkpoint.convert import convert
from mmdet_ema.checkpoint.diff import diff
from mmdet_ema.checkpoint.extract import extract
from mmdet_ema.checkpoint.formats import FORMATS
from mmdet_ema.checkpoint.inspect import inspect
from mmdet_ema.errors import CheckpointError, OptionError
from tests.checkpoint.golden.small import HERE
from tests.damage import Call

SLOW = os.environ.get('MMDET_EMA_SLOW') == '1'
CASES = 10  # a test
SEEDS = range(800 if SLOW else 16)
EXAMPLES = 2000 if SLOW else 40
FILES = sorted(
    path
    for path in HERE.iterdir()
    if path.suffix in ('.pth', '.pt', '.ckpt', '.safetensors')
)
FOUND = [path for path in FILES if path.name.startswith('found_')]
WRITTEN = [
    name for name, form in FORMATS.items() if form.write and name != 'bevdet'
]
# what a file could do; the commands do none of it. pickle.find_class comes
# where pickle looks up a name for itself
CODE = {
    *(
        'pickle.find_class',
        'os.system',
        'os.exec',
        'os.fork',
        'os.posix_spawn',
    ),
    *('subprocess.Popen', 'socket.connect', 'shutil.rmtree', 'ctypes.dlopen'),
    *('os.mkdir', 'os.rmdir'),
}
_watched = []


def _watch(event, arguments):
    if _watched and event in CODE:
        _watched[-1].append((event, str(arguments)[:100]))


sys.addaudithook(_watch)


def judge(path, folder, draw):
    """Run the commands on a file; what they do wrong is an assertion."""
    out = folder / f'{draw.randrange(9)}_epoch_1.pth'
    to = draw.choice(WRITTEN)
    before = {p.name: p.stat().st_size for p in folder.iterdir()}
    others = [
        lambda: extract(str(path), str(out), safetensors=to == 'plain'),
        lambda: convert(str(path), str(out), to),
        lambda: diff(str(path), str(path)),
    ]
    for command in (
        lambda: json.dumps(inspect(str(path), quick=draw.random() < 0.5)),
        draw.choice(others),
    ):
        message = None
        _watched.append([])
        try:
            command()
        except (CheckpointError, OptionError) as error:
            message = str(error)
        finally:
            ran = _watched.pop()
        assert not ran
        if message is not None:
            assert '\n' not in message
            assert 20 < len(message) < 900
            after = {p.name: p.stat().st_size for p in folder.iterdir()}
            assert before == after
        if out.exists():
            # what was written is a file that can be read again
            inspect(str(out))
            out.unlink()


def mutated(draw):
    """Return a mutated golden file, and the end of its name."""
    path = draw.choice([x for x in FILES if x not in FOUND])
    data = path.read_bytes()
    kinds = [_bytes, _bytes, _records, _pickle, _pickle, _values, _values]
    if not data.startswith(b'PK'):
        kinds = [_bytes] if path.suffix != '.safetensors' else [_header]
    return draw.choice(kinds)(data, draw), path.suffix


def _bytes(data, draw):
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(max(len(data), 1))
        size = draw.choice([1, 1, 4, 64, 1024])
        kind = draw.choice(['flip', 'zero', 'double', 'drop', 'cut', 'noise'])
        piece = data[start : start + size]
        if kind == 'flip' and piece:
            data[start] ^= 1 << draw.randrange(8)
        elif kind == 'zero':
            data[start : start + size] = bytes(len(piece))
        elif kind == 'double':
            data[start:start] = piece
        elif kind == 'drop':
            del data[start : start + size]
        elif kind == 'cut':
            del data[start:]
        else:
            noise = bytes(draw.randrange(256) for _ in piece)
            data[start : start + size] = noise
    return bytes(data)


def _rezipped(data, change, how=zipfile.ZIP_STORED):
    file = io.BytesIO()
    old = zipfile.ZipFile(io.BytesIO(data))
    with zipfile.ZipFile(file, 'w', how) as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return file.getvalue()


def _records(data, draw):
    names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    bad, kind = draw.choice(names), draw.randrange(4)

    def change(name, content):
        if name != bad:
            return content
        return [None, b'', content[: len(content) // 2], content * 2][kind]

    how = draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    return _rezipped(data, change, how)


def _pickle(data, draw):
    def change(name, content):
        return _bytes(content, draw) if name.endswith('.pkl') else content

    return _rezipped(data, change)


def _header(data, draw):
    (size,) = struct.unpack('<Q', data[:8])
    header = json.loads(data[8 : 8 + size])
    name = draw.choice([*header])
    wrong = [None, 3, [], {}, 'x', {'dtype': 'F32'}, {**header}]
    entry = header[name]
    if draw.random() < 0.7 and 'dtype' in entry:
        key = draw.choice([*entry])
        value = draw.choice([-1, 2**70, 'F8', [-1], [2**40, 2**40], [0, 3]])
        header[name] = {**entry, key: value}
    else:
        header[name] = draw.choice(wrong)
    text = json.dumps(header).encode()
    text = struct.pack('<Q', len(text)) + text + data[8 + size :]
    return text if draw.random() < 0.7 else _bytes(data, draw)


def _values(data, draw):
    try:
        content = torch.load(io.BytesIO(data), **_ANY, pickle_module=_Plain)
    except Exception:
        return _bytes(data, draw)
    places = list(_places(content))
    for _ in range(draw.randint(1, 3)):
        owner, key = draw.choice(places)
        if draw.random() < 0.2:
            owner.pop(key, None)
        elif draw.random() < 0.1:
            owner[draw.choice([3, '', 'ema_', None])] = _other(draw)
        else:
            owner[key] = _other(draw)
    file = io.BytesIO()
    try:
        torch.save(content, file)
    except Exception:  # what was there before may not be
        return _bytes(data, draw)
    return file.getvalue()


_ANY = {'weights_only': False}


class _Plain:
    """Reads files of ours, and none that asks for a function."""

    __name__ = 'plain'
    load, loads = staticmethod(pickle.load), staticmethod(pickle.loads)

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if name == 'open':
                raise ValueError('not here')
            return super().find_class(module, name)


def _places(value):
    for key, item in [*value.items()] if isinstance(value, dict) else []:
        yield value, key
        yield from _places(item)


def _other(draw):
    floats = torch.zeros(2, 3)
    return draw.choice(
        [
            *(None, [], {}, 'text', -1, 2.5, float('nan'), 10**30, b'x'),
            *(floats, floats.to_sparse(), torch.zeros(0), torch.tensor(7)),
            torch.quantize_per_tensor(floats, 0.1, 0, torch.quint8),
            *(floats.half(), floats.to(torch.complex64), floats[:, 1]),
            torch.full((3,), float('nan')),
            *({'a': floats}, {3: floats}, {'module.a': floats, 'a': floats}),
            Call(os.system, 'touch ran'),
            Call(open, 'ran', 'w'),
            *(torch.nn.Linear(1, 1), object(), {1, 2}, slice(3)),
        ]
    )


@pytest.mark.parametrize('seed', SEEDS)
def test_mutated_files(seed, tmp_path, monkeypatch):
    """Each is refused in one line, or made into a file that can be read."""
    monkeypatch.chdir(tmp_path)
    for number in range(CASES):
        draw = random.Random(seed * CASES + number)
        data, end = mutated(draw)
        path = tmp_path / f'epoch_1{end}'
        path.write_bytes(data)
        judge(path, tmp_path, draw)
        path.unlink()


@pytest.mark.parametrize('file', FOUND, ids=lambda path: path.name)
def test_what_was_found_stays_mended(file, tmp_path):
    """Files that once gave something else than one line."""
    for seed in range(3):
        judge(file, tmp_path, random.Random(seed))


tensors = st.sampled_from(
    [
        *(torch.zeros(2, 3), torch.ones(3), torch.tensor(5), torch.zeros(0)),
        *(torch.ones(2, 3).half(), torch.arange(6).reshape(2, 3).t()),
    ]
)
names = st.sampled_from(
    [
        *('a.weight', 'a.bias', 'a_b.c', 'a.b_c', 'ema_a_weight', 'ema_a_b_c'),
        *('module.a.weight', 'n_averaged', 'steps', 'updates', 'step'),
        *('online_model.a', 'ema_model.a', 'initted', '', 'a\n\x1b[2J'),
    ]
)
leaves = st.one_of(
    *(tensors, st.none(), st.integers(), st.floats(), st.text(max_size=5)),
)
weights = st.dictionaries(names, st.one_of(tensors, leaves), max_size=5)
keys = st.sampled_from(
    [
        *('state_dict', 'ema_state_dict', 'ema_meta', 'ema_averages', 'meta'),
        *('model', 'ema', 'model_ema', 'ema_state', 'state_dict_ema'),
        *('current_model_state', 'averaging_state', 'updates', 'start_epoch'),
        *('optimizer', 'step', 'initted', 'n_averaged', 'epoch'),
    ]
)
values = st.recursive(
    st.one_of(leaves, weights),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(names, keys), inner, max_size=4),
    ),
    max_leaves=8,
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[*HealthCheck],
    database=None,
)
@given(
    content=st.dictionaries(keys, st.one_of(weights, values), max_size=6),
    seed=st.integers(0, 10**6),
)
def test_made_up_contents(content, seed, tmp_path_factory):
    """Known keys with anything under them."""
    folder = tmp_path_factory.mktemp('made_up')
    path = folder / 'epoch_1.pth'
    torch.save(content, path)
    judge(path, folder, random.Random(seed))


@pytest.mark.parametrize(
    'value',
    [
        Call(os.system, 'touch ran'),
        Call(eval, '__import__("os").system("touch ran")'),
        Call(exec, 'open("ran", "w")'),
        Call(open, 'ran', 'w'),
        Call(getattr, torch.Tensor, 'backward'),
        Call(__import__, 'os'),
        Call(pickle.loads, pickle.dumps(Call(os.system, 'touch ran'))),
        Call(torch.load, 'epoch_1.pth'),
    ],
    ids=range(8),
)
@pytest.mark.parametrize('old', [False, True])
def test_code_is_not_run(value, old, tmp_path, monkeypatch):
    """Wherever it stands: the file is refused, and nothing has happened."""
    monkeypatch.chdir(tmp_path)
    for content in (
        {'state_dict': {'a': torch.zeros(1)}, 'x': value},
        {'state_dict': {'a': torch.zeros(1), 'b': value}},
        {'state_dict': {'a': torch.zeros(1)}, 'meta': {'x': [value]}},
    ):
        torch.save(content, 'a.pth', _use_new_zipfile_serialization=not old)
        with pytest.raises(CheckpointError, match='nothing of the file was'):
            extract('a.pth', 'out.pth')
        assert os.listdir() == ['a.pth']
