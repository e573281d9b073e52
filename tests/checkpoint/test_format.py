"""Where raw and average weights are in a checkpoint."""

import copy
from collections import OrderedDict

import pytest
import torch

from mmdet_ema.averaging import CheckpointError, WeightAverager
from mmdet_ema.checkpoint import pack, put_raw, unpack
from tests.averaging.models import Mixed, averages_of, perturb, state_of


def checkpoint_of(model):
    """Make what a framework is about to write."""
    return dict(
        meta=dict(epoch=3), state_dict=model.state_dict(), optimizer={}
    )


def trained():
    """Return a model and an averager whose averages differ from it."""
    model = Mixed()
    averager = WeightAverager(model, 'constant', decay=0.5)
    for step in range(3):
        perturb(model, torch.Generator().manual_seed(step))
        averager.update()
    return model, averager


def packed(model, averager, **meta):
    """Pack a checkpoint of the model as the hook does."""
    checkpoint = checkpoint_of(model)
    averages = dict(averager.named_averages(stored=True))
    pack(checkpoint, averages, {}, averager.num_steps, meta)
    return checkpoint


def through_file(checkpoint, tmp_path):
    """Write a checkpoint and read it, as untrusted input."""
    torch.save(checkpoint, tmp_path / 'a.pth')
    return torch.load(tmp_path / 'a.pth', weights_only=True)


def test_keys():
    """The keys are those of mmengine's own hook, and ``ema_meta``."""
    model, averager = trained()
    checkpoint = packed(model, averager, schedule='x')
    names = list(model.state_dict())
    assert names == list(checkpoint['state_dict'])
    ema = checkpoint['ema_state_dict']
    assert ['steps', *(f'module.{name}' for name in names)] == list(ema)
    assert torch.equal(torch.tensor(3), ema['steps'])
    assert torch.int64 == ema['steps'].dtype
    assert checkpoint['ema_meta'] == dict(
        format_version=1,
        roles=dict(state_dict='average', ema_state_dict='raw'),
        steps=3,
        schedule='x',
    )
    assert dict(epoch=3) == checkpoint['meta']


def test_round_trip(tmp_path):
    """What is packed comes back from a file, bit for bit."""
    model, averager = trained()
    raws, averages = state_of(model), averages_of(averager)
    checkpoint = through_file(packed(model, averager), tmp_path)
    part = unpack(checkpoint)
    assert 3 == part.steps
    assert list(averages) != []
    for name, raw in raws.items():
        assert torch.equal(raw, part.raws[name])
        assert raw.dtype == part.raws[name].dtype
        assert torch.equal(averages[name], part.averages[name])
    assert set(raws) == set(part.raws) == set(part.averages)
    assert 1 == part.meta['format_version']


def test_shared_tensors_are_stored_once(tmp_path):
    """Names of one tensor share storage; both halves, if it is frozen."""
    model, averager = trained()
    checkpoint = through_file(packed(model, averager), tmp_path)
    weights = checkpoint['state_dict']
    raws = unpack(checkpoint).raws
    places = {name: x.data_ptr() for name, x in weights.items()}
    raw_places = {name: x.data_ptr() for name, x in raws.items()}
    for half in (places, raw_places):
        assert half['first.weight'] == half['tied.weight']
    assert places['first.weight'] != raw_places['first.weight']
    for name in ('frozen.weight', 'frozen.bias'):
        assert places[name] == raw_places[name]


def test_other_values():
    """What is no tensor in the ``state_dict`` is kept in both halves."""
    checkpoint = dict(state_dict=OrderedDict(a=torch.ones(1), extra={'x': 1}))
    pack(checkpoint, {'a': torch.zeros(1)}, {}, 1, {})
    assert {'x': 1} == checkpoint['state_dict']['extra']
    part = unpack(checkpoint)
    assert {'x': 1} == part.raws['extra']
    assert ['a'] == list(part.tensors(part.raws))


def test_before_the_first_step():
    """Both halves are the live weights, without a gradient; n is 0."""
    model = Mixed()
    checkpoint = dict(state_dict=model.state_dict(keep_vars=True))
    pack(checkpoint, {}, {}, 0, {})
    part = unpack(checkpoint)
    assert 0 == part.steps
    for name, value in model.state_dict().items():
        for half in (part.raws, part.averages):
            assert torch.equal(value, half[name])
            assert not half[name].requires_grad


def test_put_raw():
    """The raw weights take the place of the averages, in the same order."""
    model, averager = trained()
    raws = state_of(model)
    checkpoint = packed(model, averager)
    order = list(checkpoint['state_dict'])
    metadata = model.state_dict()._metadata
    put_raw(checkpoint, unpack(checkpoint))
    assert order == list(checkpoint['state_dict'])
    assert metadata == checkpoint['state_dict']._metadata
    for name, raw in raws.items():
        assert torch.equal(raw, checkpoint['state_dict'][name])
    model.load_state_dict(checkpoint['state_dict'])


def test_put_raw_refuses_what_has_no_raw_value():
    """A name without a raw value is named; nothing is changed."""
    checkpoint = dict(
        state_dict=dict(a=1, b=2), ema_state_dict={'steps': 1, 'module.a': 3}
    )
    with pytest.raises(CheckpointError, match=r'1 tensors \(b\)'):
        put_raw(checkpoint, unpack(checkpoint))
    assert dict(a=1, b=2) == checkpoint['state_dict']


def test_file_of_mmengine():
    """A file of mmengine's own hook has no ``ema_meta``; others no part."""
    assert unpack(dict(state_dict={})) is None
    assert unpack({}) is None
    checkpoint = dict(
        state_dict=dict(w=torch.ones(1)),
        ema_state_dict={
            'steps': torch.tensor(7),
            'module.w': torch.zeros(1),
        },
    )
    before = copy.deepcopy(checkpoint)
    part = unpack(checkpoint)
    assert before == checkpoint  # tensors of one element compare
    assert (7, {}) == (part.steps, part.meta)
    assert torch.equal(torch.zeros(1), part.raws['w'])
    assert torch.equal(torch.ones(1), part.averages['w'])


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        *(
            (
                'ema_meta',
                {'format_version': version},
                f'format_version={version!r}.*install a newer',
            )
            for version in (2, 99, '1', None, 1.5)
        ),
        ('ema_meta', {'roles': {'state_dict': 'raw'}}, 'roles=.*newer one'),
        ('ema_meta', {'batch_size': 'x'}, "batch_size='x'"),
        ('ema_meta', [1, 2], 'ema_meta .* is a list'),
        ('ema_meta', 'text', 'ema_meta .* is a str'),
        ('state_dict', None, 'state_dict .* is a NoneType'),
        ('state_dict', [1], 'state_dict .* is a list'),
        ('state_dict', {3: 1}, 'has the name 3'),
        *(
            ('ema_state_dict', ema, "no 'steps'.*load_from")
            for ema in ({}, {'module.w': 1}, [1, 2], 'x', 3)
        ),
        ('ema_state_dict', {'steps': 'many'}, "steps='many'"),
        ('ema_state_dict', {'steps': torch.ones(2)}, 'steps=tensor'),
        ('ema_state_dict', {'steps': None}, 'steps=None'),
    ],
)
def test_damaged(key, value, message):
    """Whatever is wrong, the error is one clear ``CheckpointError``."""
    checkpoint = dict(state_dict={}, ema_state_dict={'steps': 1}, ema_meta={})
    checkpoint[key] = value
    with pytest.raises(CheckpointError, match=message) as error:
        unpack(checkpoint)
    assert '\n' not in str(error.value)
