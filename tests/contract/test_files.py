"""Files that a run is given: what is looked at before anything is loaded."""

import argparse
import io
import os

import pytest
import torch

import mmdet_ema
from mmdet_ema import CheckpointError
from mmdet_ema.checkpoint.pickles import LOADS_SAFELY
from tests.conftest import MMCV1
from tests.contract.toy import EMA, Run, Saved, ToyModel, same
from tests.damage import Call


@pytest.fixture(autouse=True)
def _safe(monkeypatch):
    monkeypatch.delenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', raising=False)


@pytest.fixture
def file(tmp_path):
    """A file of one epoch, to be edited and written again."""
    Run(tmp_path, EMA, epochs=1).train()
    return Saved(tmp_path / 'epoch_1.pth')


def nested(mark):
    inner = io.BytesIO()
    torch.save({'a': Call(os.mkdir, str(mark))}, inner)
    return Call(torch.storage._load_from_bytes, inner.getvalue())


PROGRAMS = {
    'mkdir': lambda mark: Call(os.mkdir, str(mark)),
    'system': lambda mark: Call(os.system, f'mkdir {mark}'),
    'eval': lambda mark: Call(eval, f'__import__("os").mkdir({str(mark)!r})'),
    'getattr': lambda mark: Call(getattr, mmdet_ema.WeightAverager, 'update'),
    'load': lambda mark: Call(torch.load, str(mark)),
    'archive': nested,
}


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('way', ['resume', 'load'])
@pytest.mark.parametrize('name', list(PROGRAMS))
def test_file_that_would_run_code_is_refused(tmp_path, name, way, zipped):
    """One line names what it asks for; nothing ran, nothing changed."""
    mark, path = tmp_path / 'was_here', tmp_path / 'a.pth'
    meta = dict(epoch=1, iter=4, x=PROGRAMS[name](mark))
    saved = dict(state_dict=ToyModel().state_dict(), meta=meta)
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    run = Run(tmp_path, EMA, **{way: path})
    text = run.refuse(
        CheckpointError, 'asks for .*nothing of the file was run'
    )
    assert 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1' in text
    assert not mark.exists()


def test_own_object_in_the_meta(file):
    """It is read where torch reads it by itself, else refused by name."""
    file.content['meta']['args'] = argparse.Namespace(lr=0.1)
    run = Run(file.path.parent, EMA, resume=file.write())
    if LOADS_SAFELY:
        run.refuse(CheckpointError, r'argparse\.Namespace')
    else:
        assert 4 == len(run.train().records)


@pytest.mark.parametrize(
    'text',
    ['import os\nos.mkdir({!r})', 'a = dict(b=__import__("os").mkdir({!r}))'],
)
def test_program_in_the_meta_is_not_run(file, text):
    """On resume a framework would run ``meta['config']``."""
    mark = file.path.parent / 'was_here'
    text = text.format(str(mark))
    file.content['meta']['config'] = text
    run = Run(file.path.parent, EMA, resume=file.write()).train()
    assert not mark.exists()
    if MMCV1:  # which writes the text of the config into each file
        assert text == run.load().content['meta']['config']
    else:
        assert "meta['config'] of the checkpoint is left out" in run.log


def test_weights_alone_are_fine_tuned(tmp_path):
    """A file may be a ``state_dict``, as backbones are published."""
    weights = {
        name: value + 1 if value.is_floating_point() else value
        for name, value in ToyModel().state_dict().items()
    }
    torch.save(weights, tmp_path / 'backbone.pth')
    run = Run(tmp_path, EMA, load=tmp_path / 'backbone.pth').train()
    assert [] == same(weights, run.start)


PLACES = {
    'meta': [None, [], {'epoch': 'x', 'iter': 4}, {'epoch': 1, 'iter': -4}],
    'optimizer': [None, [1], {}, {'state': {}, 'param_groups': 3}],
    'ema_state_dict': [[], {'steps': float('nan')}, {'steps': -1}, {3: 4}],
    'ema_meta': [[1], {'batch_size': 'x'}, {'num_updates': 1.5}],
    'state_dict': [None, [torch.ones(2)], {3: torch.ones(2)}],
}
if not MMCV1:
    PLACES['message_hub'] = [None, {}, {'log_scalars': []}]
    PLACES['param_schedulers'] = [3, [None]]


@pytest.mark.parametrize(
    ('key', 'value'), [(k, v) for k, values in PLACES.items() for v in values]
)
def test_wrong_values_are_refused(file, key, value):
    """Each is named in one line; the weights are what they were."""
    where = file.part if key.startswith('ema_') else file.content
    where[key] = value
    run = Run(file.path.parent, EMA, resume=file.write())
    run.refuse(CheckpointError, 'checkpoint|state')


@pytest.mark.parametrize('way', ['resume', 'load'])
def test_record_that_is_not_what_was_written_is_named(file, way):
    """A reader of torch takes such a file; the checksum tells."""
    raw = file.averages['head.weight'].numpy().tobytes()
    data = file.path.read_bytes()
    assert 1 == data.count(raw)
    file.path.write_bytes(data.replace(raw, raw[:-1] + bytes([raw[-1] ^ 1])))
    Saved(file.path)
    run = Run(file.path.parent, EMA, **{way: file.path})
    run.refuse(CheckpointError, r'state_dict\.head\.weight')


def test_average_that_is_not_finite_starts_again(file):
    """It is named, and starts from the raw weights."""
    file.averages['head.weight'][0, 0] = float('nan')
    run = Run(file.path.parent, EMA)
    averages = run.read(file.write(), resume=True)
    assert torch.equal(averages['head.weight'], file.raws['head.weight'])
    assert torch.equal(averages['head.bias'], file.averages['head.bias'])
    line = 'averages of the checkpoint hold NaN or Inf in head.weight'
    assert line in run.log


@pytest.mark.parametrize(
    ('half', 'name', 'way', 'line'),
    [
        ('raws', 'head.bias', 'resume', 'raw weights of the checkpoint'),
        ('averages', 'head.bias', 'load', 'weights of the checkpoint'),
        ('averages', 'norm.running_var', 'load', 'weights of the checkpoint'),
    ],
)
def test_weights_that_are_not_finite_are_named(file, half, name, way, line):
    """Training starts from them, with a warning that names the first."""
    getattr(file, half)[name][0] = float('inf')
    run = Run(file.path.parent, EMA, **{way: file.write()}).train()
    assert f'{line} hold NaN or Inf in {name}' in run.log


def test_vector_for_a_counter_is_refused(file):
    """Torch would load the first number of it."""
    file.averages['norm.num_batches_tracked'] = torch.zeros(7)
    run = Run(file.path.parent, EMA, load=file.write())
    run.refuse(CheckpointError, r'num_batches.*shape \(7,\)')


def test_file_without_optimizer_resumes_with_a_warning(file):
    """A run can be told to write such files, and frameworks take them."""
    del file.content['optimizer']
    run = Run(file.path.parent, EMA, resume=file.write()).train()
    assert 4 == len(run.records)
    assert 'no state of the optimizer' in run.log


class FullError(Exception):
    """The disk has no room."""


@pytest.mark.parametrize('kind', ['best_score_', ''], ids=['best', 'last'])
@pytest.mark.parametrize('fails', [True, False], ids=['full', 'room'])
def test_no_file_is_lost_or_half_written(tmp_path, monkeypatch, kind, fails):
    """The old file stays until the new one is whole, and then goes."""
    move = os.replace

    def full(path, target):
        if fails and target.endswith(f'/{kind}epoch_2.pth'):
            raise FullError
        move(path, target)

    monkeypatch.setattr(os, 'replace', full)
    run = Run(tmp_path, EMA, keep=1, best='score', rule='less')
    if fails:
        with pytest.raises(FullError):
            run.train()
    else:
        run.train()
    epoch = 1 if fails else 2
    (left,) = tmp_path.glob(f'{kind}epoch_*.pth*')
    assert f'{kind}epoch_{epoch}.pth' == left.name
    assert epoch == Saved(left).content['meta']['epoch']
