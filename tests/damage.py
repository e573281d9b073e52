"""Damage a checkpoint in many ways, and judge what became of it."""

import io
import os
import random
import zipfile

import numpy as np
import torch

from mmdet_ema import CheckpointError

FILES = 10  # a test
# 200 files, and 2,000 where MMDET_EMA_SLOW=1 asks for them (a few minutes)
SEEDS = range(200 if os.environ.get('MMDET_EMA_SLOW') == '1' else 20)
BYTES = ('bits', 'zeroed', 'doubled', 'cut')
KINDS = (*BYTES, 'dropped', 'value', 'value', 'value')


class Call:
    """Asks for a function to be called when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def damaged(data, seed):
    """Return a damaged copy of a file, and the name of what was replaced.

    The name is empty where the file itself was damaged, not a value in it.
    """
    draw = random.Random(seed)
    kind = draw.choice(KINDS)
    if kind in BYTES:
        return _damage_bytes(bytearray(data), kind, draw), ''
    if kind == 'dropped':
        return _drop_record(data, draw), ''
    content = torch.load(io.BytesIO(data), **_UNSAFE)
    places = list(_places(content, ''))
    # as many counters and dicts as tensors
    tensors = [p for p in places if isinstance(p[0][p[1]], torch.Tensor)]
    others = [p for p in places if not isinstance(p[0][p[1]], torch.Tensor)]
    owner, key, name = draw.choice(draw.choice([tensors, others]))
    owner[key] = _other(owner[key], draw)
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue(), name


_UNSAFE = {'weights_only': False}


def _damage_bytes(data, kind, draw):
    if kind == 'bits':
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(data)
    start = draw.randrange(len(data))
    size = draw.choice([1, 16, 512, 4096])
    if kind == 'zeroed':
        data[start : start + size] = bytes(len(data[start : start + size]))
    elif kind == 'doubled':
        data[start:start] = data[start : start + size]
    else:
        del data[start:]
    return bytes(data)


def _drop_record(data, draw):
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        names = old.namelist()
        lost = draw.choice(names)
        with zipfile.ZipFile(file, 'w') as new:
            for name in names:
                if name != lost:
                    new.writestr(name, old.read(name))
    return file.getvalue()


def _places(value, name):
    """Everything in a checkpoint that can be replaced, with its name."""
    items = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, item in items:
        yield value, key, f'{name}.{key}'
        yield from _places(item, f'{name}.{key}')


def _other(value, draw):
    wrong = [None, [], [1.0], {}, 'text', np.zeros(2), float('nan'), -1, 2.5]
    if isinstance(value, torch.Tensor):
        floats = value.float()
        wrong += [
            floats.numpy(),
            floats.reshape(-1).tolist(),
            torch.zeros(7),
            torch.zeros(3, 5),
            floats.to_sparse(),
            torch.full_like(floats, float('nan')),
            torch.full_like(floats, float('inf')),
            torch.quantize_per_tensor(floats, 0.1, 0, torch.quint8),
        ]
        if value.is_floating_point():
            wrong.append(torch.full(value.shape, 3))
    return draw.choice(wrong)


def judge(load, model, expected, name, said):
    """Load a damaged file, and check that nothing goes wrong in silence.

    It is refused before the model changes, or right, or what is wrong in it
    is named.

    Args:
        load: Loads it into the model and returns the averages, or None.
        model: The model.
        expected: The right weights and averages, by name.
        name: What was replaced in the file.
        said: Returns what was logged and printed.
    """
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        averages = load()
    except CheckpointError as error:
        message = str(error)
        assert '\n' not in message
        assert 20 < len(message) < 700
        after = model.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before), name
        return
    found = zip(expected, (model.state_dict(), averages or {}))
    wrong = [
        key
        for right, half in found
        for key, value in half.items()
        if not torch.equal(right[key].to(value.dtype), value)
    ]
    text = said()
    if not wrong or 'no EMA part' in text:
        return
    # a value that a tensor may have, or a shape that fine-tuning may change;
    # a tied tensor has two names
    assert len(wrong) == 1 or set(wrong) == {'first.weight', 'tied.weight'}
    assert any(name.endswith(f'.{key}') for key in wrong), (name, wrong)
    assert any(key in text for key in wrong), (name, wrong)
