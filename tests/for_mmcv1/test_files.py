"""Files that only a run of mmcv 1.x is given."""

import os

import pytest
import torch

from mmdet_ema import CheckpointError
from tests.damage import Call
from tests.for_mmcv1.toy import EMA, Lines, Run, quiet

EPOCHS = dict(max_epochs=4)


def test_file_of_the_hooks_own_option_is_looked_into(tmp_path):
    """What would run code is refused there, too; nothing runs."""
    mark, path = tmp_path / 'was_here', tmp_path / 'a.pth'
    meta = dict(epoch=1, iter=4, x=Call(os.mkdir, str(mark)))
    torch.save(
        dict(state_dict=Run(tmp_path).model.state_dict(), meta=meta), path
    )
    run = Run(tmp_path, dict(EMA, resume_from=str(path)), runner=EPOCHS)
    with pytest.raises(CheckpointError, match=r'mkdir.*nothing of the file'):
        run.train()
    assert not mark.exists()


def test_run_without_the_hook_reads_as_mmcv_does(tmp_path):
    """What mmcv reads by itself is its own affair there."""
    Run(tmp_path).train()
    path = tmp_path / 'epoch_2.pth'
    saved = torch.load(path)
    saved['meta']['trap'] = Call(os.mkdir, str(tmp_path / 'was_here'))
    torch.save(saved, path)
    Run(tmp_path, runner=EPOCHS).train(resume=path)
    assert (tmp_path / 'was_here').exists()


def edited(folder, config):
    """Write a file of two epochs with the text of a config."""
    Run(folder, EMA).train()
    path = folder / 'epoch_2.pth'
    saved = torch.load(path)
    saved['meta']['config'] = config
    torch.save(saved, path)
    return path


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
