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


def test_applied_averages():
    """A checkpoint of a model that holds averages has the same roles."""
    model, averager = trained()
    expected = packed(model, averager)
    expected = copy.deepcopy(expected)
    with averager.applied():
        checkpoint = checkpoint_of(model)
        averages = dict(averager.named_averages(stored=True))
        raws = dict(averager.named_raws())
        pack(checkpoint, averages, raws, averager.num_steps, {})
        for part in ('state_dict', 'ema_state_dict'):
            for name, value in expected[part].items():
                assert torch.equal(value, checkpoint[part][name]), name


def test_tied_names_share_storage(tmp_path):
    """Names of one tensor share their storage in the file."""
    model, averager = trained()
    checkpoint = through_file(packed(model, averager), tmp_path)
    for part, prefix in (('state_dict', ''), ('ema_state_dict', 'module.')):
        first = checkpoint[part][f'{prefix}first.weight']
        tied = checkpoint[part][f'{prefix}tied.weight']
        assert first.data_ptr() == tied.data_ptr()
    weights, ema = checkpoint['state_dict'], checkpoint['ema_state_dict']
    apart = weights['first.weight'].data_ptr()
    assert apart != ema['module.first.weight'].data_ptr()


def test_frozen_tensors_are_stored_once(tmp_path):
    """A frozen tensor is one storage for its average and its raw value."""
    model, averager = trained()
    checkpoint = through_file(packed(model, averager), tmp_path)
    weights, ema = checkpoint['state_dict'], checkpoint['ema_state_dict']
    for name in ('frozen.weight', 'frozen.bias'):
        pointer = weights[name].data_ptr()
        assert pointer == ema[f'module.{name}'].data_ptr()


def test_size_of_the_file(tmp_path):
    """A file of a frozen model is not larger than without averages."""
    model = torch.nn.Linear(300, 300).requires_grad_(False)
    averager = WeightAverager(model)
    torch.save(checkpoint_of(model), tmp_path / 'plain.pth')
    torch.save(packed(model, averager), tmp_path / 'ema.pth')
    plain, ema = (
        (tmp_path / name).stat().st_size for name in ('plain.pth', 'ema.pth')
    )
    # Names and meta take a few kilobytes, the weights 350.
    assert ema < plain + 8000


def test_metadata_is_kept():
    """``_metadata`` of the ``state_dict`` survives packing and unpacking."""
    model, averager = trained()
    expected = model.state_dict()._metadata
    checkpoint = packed(model, averager)
    assert expected == checkpoint['state_dict']._metadata
    put_raw(checkpoint, unpack(checkpoint))
    assert expected == checkpoint['state_dict']._metadata
    assert isinstance(checkpoint['state_dict'], OrderedDict)


def test_other_values():
    """What is no tensor in the ``state_dict`` is kept in both halves."""
    checkpoint = dict(state_dict=OrderedDict(a=torch.ones(1), extra={'x': 1}))
    pack(checkpoint, {'a': torch.zeros(1)}, {}, 1, {})
    assert {'x': 1} == checkpoint['state_dict']['extra']
    part = unpack(checkpoint)
    assert {'x': 1} == part.raws['extra']
    assert ['a'] == list(part.tensors(part.raws))


def test_before_the_first_step():
    """Without averages both halves are the live weights, n is 0."""
    model = Mixed()
    checkpoint = checkpoint_of(model)
    pack(checkpoint, {}, {}, 0, {})
    part = unpack(checkpoint)
    assert 0 == part.steps
    for name, value in model.state_dict().items():
        assert torch.equal(value, part.raws[name])
        assert torch.equal(value, part.averages[name])


def test_no_gradient():
    """Packed tensors need no gradient."""
    model = Mixed()
    checkpoint = dict(state_dict=model.state_dict(keep_vars=True))
    pack(checkpoint, {}, {}, 0, {})
    halves = (checkpoint['state_dict'], checkpoint['ema_state_dict'])
    for half in halves:
        assert not any(value.requires_grad for value in half.values())


def test_put_raw():
    """The raw weights take the place of the averages, in the same order."""
    model, averager = trained()
    raws = state_of(model)
    checkpoint = packed(model, averager)
    order = list(checkpoint['state_dict'])
    put_raw(checkpoint, unpack(checkpoint))
    assert order == list(checkpoint['state_dict'])
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


def test_unpack_changes_nothing():
    """Unpacking leaves the checkpoint as it is."""
    model, averager = trained()
    checkpoint = packed(model, averager)
    keys = {k: list(v) for k, v in checkpoint.items()}
    part = unpack(checkpoint)
    part.averages.clear()
    part.raws.clear()
    part.meta.clear()
    assert keys == {k: list(v) for k, v in checkpoint.items()}


def test_no_ema_part():
    """A checkpoint without an EMA part is no error."""
    assert unpack(dict(state_dict={})) is None
    assert unpack({}) is None


def test_file_of_mmengine():
    """A file of mmengine's own hook is read; it has no ``ema_meta``."""
    checkpoint = dict(
        state_dict=dict(w=torch.ones(1)),
        ema_state_dict={
            'steps': torch.tensor(7),
            'module.w': torch.zeros(1),
        },
    )
    part = unpack(checkpoint)
    assert (7, {}) == (part.steps, part.meta)
    assert torch.equal(torch.zeros(1), part.raws['w'])
    assert torch.equal(torch.ones(1), part.averages['w'])


@pytest.mark.parametrize('ema', [{}, {'module.w': 1}, [1, 2], 'x', 3])
def test_no_steps(ema):
    """An EMA part without steps is refused, with what to do."""
    with pytest.raises(CheckpointError, match='load_from') as error:
        unpack(dict(state_dict={}, ema_state_dict=ema))
    assert "no 'steps'" in str(error.value)


@pytest.mark.parametrize('version', [2, 99, '1', None, 1.5])
def test_other_versions(version):
    """A newer or unknown version is refused, with what to do."""
    checkpoint = dict(
        state_dict={},
        ema_state_dict={'steps': 1},
        ema_meta={'format_version': version},
    )
    with pytest.raises(CheckpointError, match='install a newer') as error:
        unpack(checkpoint)
    assert f'format_version={version!r}' in str(error.value)


@pytest.mark.parametrize(
    'change',
    [
        dict(state_dict=None),
        dict(state_dict=[1]),
        dict(ema_state_dict={'steps': 'many'}),
        dict(ema_state_dict={'steps': torch.ones(2)}),
        dict(ema_state_dict={'steps': None}),
        dict(ema_meta=[1, 2]),
        dict(ema_meta='text'),
    ],
    ids=str,
)
def test_damaged(change):
    """Whatever is damaged, the error is one clear ``CheckpointError``."""
    checkpoint = dict(state_dict={}, ema_state_dict={'steps': 1}, ema_meta={})
    checkpoint.update(change)
    if checkpoint['state_dict'] is None:
        del checkpoint['state_dict']
    with pytest.raises(CheckpointError):
        unpack(checkpoint)
