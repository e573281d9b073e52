"""Files that a run is given: whose they are, and what is in them."""

import argparse
import io
import os

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.runner.checkpoint import _load_checkpoint

import mmdet_ema
from mmdet_ema import CheckpointError
from mmdet_ema.checkpoint.files import LOADS_SAFELY
from tests.damage import Call
from tests.for_mmengine.toy import (
    SAFELY,
    Run,
    ToyData,
    ToyModel,
    loader,
    same,
    state_of,
)

EMA = dict(type='EMAHook', decay=0.9, tau=2)
THEIRS = dict(type='MMEngineEMAHook', momentum=0.1)


@pytest.fixture(autouse=True)
def _safe(monkeypatch):
    monkeypatch.delenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', raising=False)


def edited(folder, **changes):
    """Write a file of one epoch, with some entries replaced."""
    Run(folder, EMA, max_epochs=1).train()
    path = folder / 'epoch_1.pth'
    saved = torch.load(path, weights_only=SAFELY)
    for key, value in changes.items():
        saved[key] = value
    torch.save(saved, path)
    return path, saved


def given(folder, path, resume, *hooks, **options):
    """Make a run that is given a file."""
    hooks = hooks or (EMA,)
    return Run(
        folder / 'given',
        *hooks,
        max_epochs=2,
        load_from=str(path),
        resume=resume,
        **options,
    )


def log_of(run):
    return next(run.work_dir.glob('*/*.log')).read_text()


class Untied(ToyModel):
    """Without tied weights, which mmengine's hook averages twice."""

    def __init__(self):
        super().__init__()
        self.tied.weight = torch.nn.Parameter(torch.ones(4, 4))


class Start(Hook):
    """Notes the weights that training starts from, before any step."""

    priority = 'LOWEST'

    def before_train(self, runner):
        self.state = state_of(runner.model)


@pytest.mark.parametrize('resume', [True, False])
@pytest.mark.parametrize('theirs', [(), (THEIRS,)], ids=['none', 'theirs'])
def test_files_of_the_framework_are_read(tmp_path, theirs, resume):
    """Whether they were written with its EMA hook or without one."""
    first = Run(tmp_path, *theirs, model=Untied(), max_epochs=1).train()
    path = tmp_path / 'epoch_1.pth'
    saved = torch.load(path, weights_only=False)
    start = Start()
    run = given(tmp_path, path, resume, EMA, start, model=Untied()).train()
    if resume:
        assert same(start.state, first.records[-1]) == []
    else:
        assert same(start.state, saved['state_dict']) == []
    assert len(run.records) == (4 if resume else 8)


def nested(mark):
    file = io.BytesIO()
    torch.save({'a': Call(os.mkdir, str(mark))}, file)
    return Call(torch.storage._load_from_bytes, file.getvalue())


PROGRAMS = {
    'mkdir': lambda mark: Call(os.mkdir, str(mark)),
    'system': lambda mark: Call(os.system, f'mkdir {mark}'),
    'eval': lambda mark: Call(eval, f'__import__("os").mkdir({str(mark)!r})'),
    'getattr': lambda mark: Call(getattr, mmdet_ema.WeightAverager, 'update'),
    'load': lambda mark: Call(torch.load, str(mark)),
    'archive': nested,
}


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('resume', [True, False], ids=['resume', 'load_from'])
@pytest.mark.parametrize('name', list(PROGRAMS))
def test_file_that_would_run_code_is_refused(tmp_path, name, resume, zipped):
    """One line names what it asks for; nothing ran, nothing changed."""
    mark, path = tmp_path / 'was_here', tmp_path / 'a.pth'
    saved = {'state_dict': ToyModel().state_dict(), 'meta': {}}
    saved['meta']['x'] = PROGRAMS[name](mark)
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    run = given(tmp_path, path, resume)
    with pytest.raises(CheckpointError, match='nothing of the file') as error:
        run.train()
    assert '\n' not in str(error.value)
    assert 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1' in str(error.value)
    assert not mark.exists()


def test_own_object_in_a_file(tmp_path):
    """It is read where torch reads it by itself, else refused by name."""
    namespace = argparse.Namespace(lr=0.1)
    path, _ = edited(tmp_path, args=namespace)
    run = given(tmp_path, path, True)
    if LOADS_SAFELY:
        with pytest.raises(CheckpointError, match=r'argparse\.Namespace'):
            run.train()
    else:
        assert len(run.train().records) == 4


def test_weights_alone_are_fine_tuned(tmp_path):
    """A file may be a ``state_dict``, as backbones are published."""
    path = tmp_path / 'backbone.pth'
    weights = Run(tmp_path / 'a', EMA).model.state_dict()
    weights = {
        k: v + 1 if v.is_floating_point() else v for k, v in weights.items()
    }
    torch.save(weights, path)
    start = Start()
    given(tmp_path, path, False, EMA, start).train()
    assert same(start.state, weights) == []


def test_program_in_the_meta_is_not_run(tmp_path):
    """On resume mmengine would run ``meta['config']``; it writes none."""
    path, saved = edited(tmp_path)
    mark = tmp_path / 'was_here'
    saved['meta']['config'] = f'import os\nos.mkdir({str(mark)!r})\n'
    torch.save(saved, path)
    run = given(tmp_path, path, True).train()
    assert not mark.exists()
    assert "meta['config'] of the checkpoint is left out" in log_of(run)


def test_metainfo_of_the_data_set_comes_back(tmp_path):
    """Whoever reads the file gets what the data set gave, arrays too."""
    data = ToyData(16, 0)
    sigmas = np.array([0.1, 0.2])
    data.metainfo = dict(
        classes=('a', 'b'),
        palette=[(1, 2, 3)],
        sigmas=sigmas,
        extra=ConfigDict(a=dict(b=1)),
    )
    train = dict(loader(), dataset=data)
    Run(tmp_path, EMA, max_epochs=1, train_dataloader=train).train()
    path = str(tmp_path / 'epoch_1.pth')
    found = _load_checkpoint(path)['meta']['dataset_meta']
    assert isinstance(found['sigmas'], np.ndarray)
    assert found.pop('sigmas').tolist() == sigmas.tolist()
    assert found == dict(
        classes=('a', 'b'), palette=[(1, 2, 3)], extra=dict(a=dict(b=1))
    )
    run = given(tmp_path, path, True, train_dataloader=train).train()
    assert len(run.records) == 4


WRONG = {
    'meta': [None, [], {'epoch': 'x', 'iter': 4}, {'epoch': 1, 'iter': -4}],
    'optimizer': [None, [1], {}, {'state': {}, 'param_groups': 3}],
    'message_hub': [None, {}, {'log_scalars': []}],
    'param_schedulers': [3, [None]],
    'ema_state_dict': [[], {'steps': float('nan')}, {'steps': -1}, {3: 4}],
    'ema_meta': [[1], {'batch_size': 'x'}, {'num_updates': 1.5}],
    'state_dict': [None, [torch.ones(2)], {3: torch.ones(2)}],
}


@pytest.mark.parametrize(
    ('key', 'value'), [(k, v) for k, values in WRONG.items() for v in values]
)
def test_wrong_values_are_refused_before_the_model_changes(
    tmp_path, key, value
):
    """Each is named in one line; the weights are what they were."""
    path, _ = edited(tmp_path, **{key: value})
    run = given(tmp_path, path, True)
    run.model.load_state_dict(run.model.state_dict())
    loaded = []
    load = run.model._load_from_state_dict
    run.model._load_from_state_dict = lambda *a: loaded.append(load(*a))
    with pytest.raises(CheckpointError) as error:
        run.train()
    assert '\n' not in str(error.value)
    assert not loaded


@pytest.mark.parametrize('resume', [True, False])
def test_record_that_is_not_what_was_written_is_named(tmp_path, resume):
    """A reader of torch takes such a file; the checksum tells."""
    path, saved = edited(tmp_path)
    raw = saved['state_dict']['head.weight'].numpy().tobytes()
    data = path.read_bytes()
    assert data.count(raw) == 1
    path.write_bytes(data.replace(raw, raw[:-1] + bytes([raw[-1] ^ 1])))
    torch.load(path, weights_only=SAFELY)
    with pytest.raises(CheckpointError, match=r'state_dict\.head\.weight'):
        given(tmp_path, path, resume).train()


def test_average_that_is_not_finite_starts_again(tmp_path):
    """It is named, and starts from the raw weights; raw ones are named."""
    path, saved = edited(tmp_path)
    saved['state_dict']['head.weight'][0, 0] = float('nan')
    raws = saved['ema_state_dict']
    torch.save(saved, path)
    run = given(tmp_path, path, True)
    runner = run.runner
    assert runner.train_loop  # it is made when it is asked for
    runner.call_hook('before_run')
    runner.load_or_resume()
    runner.call_hook('before_train')
    averages = dict(run.hook._life.averager.named_averages())
    assert torch.equal(averages['head.weight'], raws['module.head.weight'])
    assert torch.equal(averages['head.bias'], saved['state_dict']['head.bias'])
    assert (
        'averages of the checkpoint hold NaN or Inf in head.weight'
        in log_of(run)
    )


@pytest.mark.parametrize(
    ('half', 'name', 'resume', 'line'),
    [
        ('ema_state_dict', 'head.bias', True, 'raw weights of the checkpoint'),
        ('state_dict', 'head.bias', False, 'weights of the checkpoint'),
        ('state_dict', 'norm.running_var', False, 'weights of the checkpoint'),
    ],
)
def test_weights_that_are_not_finite_are_named(
    tmp_path, half, name, resume, line
):
    """Training starts from them, with a warning that names the first."""
    path, saved = edited(tmp_path)
    prefix = 'module.' if half == 'ema_state_dict' else ''
    saved[half][prefix + name][0] = float('inf')
    torch.save(saved, path)
    run = given(tmp_path, path, resume).train()
    assert f'{line} hold NaN or Inf in {name}' in log_of(run)


def test_vector_for_a_counter_is_refused(tmp_path):
    """Torch would load the first number of it."""
    path, saved = edited(tmp_path)
    saved['state_dict']['norm.num_batches_tracked'] = torch.zeros(7)
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=r'num_batches.*shape \(7,\)'):
        given(tmp_path, path, False).train()


def test_file_without_optimizer_resumes_with_a_warning(tmp_path):
    """``save_optimizer=False`` writes such files, and mmengine takes them."""
    path, saved = edited(tmp_path)
    del saved['optimizer']
    torch.save(saved, path)
    run = given(tmp_path, path, True).train()
    assert len(run.records) == 4
    assert 'no state of the optimizer' in log_of(run)


class FullError(Exception):
    """The disk has no room."""


@pytest.mark.parametrize('kind', ['best_score_', ''], ids=['best', 'last'])
def test_no_file_is_lost_or_half_written(tmp_path, monkeypatch, kind):
    """The old file stays until the new one is whole, and then goes."""
    move = os.replace

    def full(path, target):
        if full.fails and target.endswith(f'/{kind}epoch_2.pth'):
            raise FullError
        move(path, target)

    monkeypatch.setattr(os, 'replace', full)
    for full.fails in (True, False):
        folder = tmp_path / str(full.fails)
        checkpoint = dict(
            type='CheckpointHook',
            interval=1,
            max_keep_ckpts=1,
            save_best='score',
            rule='less',
        )
        hooks = dict(checkpoint=checkpoint)
        run = Run(folder, EMA, max_epochs=2, hooks=hooks)
        if full.fails:
            with pytest.raises(FullError):
                run.train()
        else:
            run.train()
        names = {path.name for path in folder.glob(f'{kind}epoch_*.pth*')}
        epoch = 1 if full.fails else 2
        assert names == {f'{kind}epoch_{epoch}.pth'}
        assert run.load(*names)['meta']['epoch'] == epoch
