"""Files that a run of mmcv 1.x is given: what is looked at before."""

import argparse
import os

import pytest
import torch

from mmdet_ema import CheckpointError
from tests.damage import Call
from tests.for_mmcv1.toy import EMA, Lines, Run, quiet, same, state_of

EPOCHS = dict(max_epochs=4)


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('way', ['resume', 'load', 'hook'])
def test_file_that_would_run_code_is_refused(tmp_path, way, zipped):
    """For resume, ``load_from`` and the hook's own word; nothing runs."""
    mark, path = tmp_path / 'was_here', tmp_path / 'a.pth'
    trap = Call(os.mkdir, str(mark))
    state = Run(tmp_path).model.state_dict()
    saved = dict(state_dict=state, meta=dict(epoch=1, iter=4, x=trap))
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    hook = dict(EMA, resume_from=str(path)) if way == 'hook' else EMA
    run = Run(tmp_path, hook, runner=EPOCHS)
    before = state_of(run.model)
    with pytest.raises(CheckpointError, match=r'mkdir.*nothing of the file'):
        run.train(**({} if way == 'hook' else {way: path}))
    assert not mark.exists()
    assert [] == same(before, run.model.state_dict())


def test_run_without_the_hook_reads_as_mmcv_does(tmp_path):
    """What mmcv reads by itself is its own affair there."""
    Run(tmp_path).train()
    path = tmp_path / 'epoch_2.pth'
    saved = torch.load(path)
    saved['meta']['trap'] = Call(os.mkdir, str(tmp_path / 'was_here'))
    torch.save(saved, path)
    Run(tmp_path, runner=EPOCHS).train(resume=path)
    assert (tmp_path / 'was_here').exists()


def edited(folder, **meta):
    """Write a file of two epochs with more in its meta."""
    Run(folder, EMA).train()
    path = folder / 'epoch_2.pth'
    saved = torch.load(path)
    saved['meta'].update(meta)
    torch.save(saved, path)
    return path


def test_own_objects_in_the_meta_are_read(tmp_path):
    """An instance that pickle makes without its class's code is fine."""
    path = edited(tmp_path, args=argparse.Namespace(lr=0.1))
    run = Run(tmp_path, EMA, runner=EPOCHS).train(resume=path)
    assert 8 == len(run.records)


@pytest.mark.parametrize(
    'text',
    ['import os\nos.mkdir({!r})', 'a = dict(b=__import__("os").mkdir({!r}))'],
)
def test_program_in_the_meta_is_not_run(tmp_path, text):
    """On resume mmcv runs the text of a config; a program is left out."""
    text = text.format(str(tmp_path / 'was_here'))
    path = edited(tmp_path, config=text)
    run = Run(tmp_path, EMA, runner=EPOCHS).train(resume=path)
    assert not (tmp_path / 'was_here').exists()
    assert text == run.load('epoch_4.pth')['meta']['config']


def test_config_of_plain_values_is_left_to_mmcv(tmp_path):
    """With two GPUs before and one now, mmcv counts the iterations anew."""
    path = edited(tmp_path, config="a = dict(b=[-1, 'x'])\ngpu_ids = [0, 1]")
    run = Run(tmp_path, EMA, runner=EPOCHS)
    run.runner.resume(str(path))
    assert 16 == run.runner.iter


@pytest.mark.parametrize('depth', [90, 300, 20_000])
def test_nested_brackets_in_a_config(tmp_path, depth):
    """Text that Python cannot parse says nothing, and stops no resume."""
    text = f'a = {"(" * depth}1{")" * depth}'
    path = edited(tmp_path, config=text)
    run = Run(tmp_path, EMA, runner=EPOCHS).train(resume=path)
    assert 8 == len(run.records)


@pytest.mark.parametrize('other', ['same', 'relative', 'link'])
def test_file_that_is_given_twice_is_one(tmp_path, other, monkeypatch):
    """``--resume-from`` and the hook's word may name one file."""
    Run(tmp_path, EMA).train()
    path = tmp_path / 'epoch_2.pth'
    monkeypatch.chdir(tmp_path)
    names = dict(
        same=str(path),
        relative='epoch_2.pth',
        link=str(tmp_path / 'latest.pth'),
    )
    lines = Lines()
    hook = dict(EMA, resume_from=names[other])
    run = Run(tmp_path, hook, runner=EPOCHS, logger=quiet(lines))
    run.train(resume=path)
    assert 8 == len(run.records)
    assert [] == [x for x in lines.lines if 'another checkpoint' in x]


def test_another_file_is_still_told(tmp_path):
    """The hook's word has no effect in a run that resumed from elsewhere."""
    Run(tmp_path, EMA).train()
    lines = Lines()
    hook = dict(EMA, resume_from=str(tmp_path / 'epoch_1.pth'))
    run = Run(tmp_path, hook, runner=EPOCHS, logger=quiet(lines))
    run.train(resume=tmp_path / 'epoch_2.pth')
    assert [x for x in lines.lines if 'another checkpoint' in x]


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
        run = Run(
            folder,
            EMA,
            checkpoint=dict(interval=1, max_keep_ckpts=1),
            evaluation=dict(save_best='score', rule='less', interval=1),
        )
        if full.fails:
            with pytest.raises(FullError):
                run.train()
        else:
            run.train()
        names = {path.name for path in folder.glob(f'{kind}epoch_*.pth*')}
        epoch = 1 if full.fails else 2
        assert names == {f'{kind}epoch_{epoch}.pth'}
        assert run.load(*names)['meta']['epoch'] == epoch
