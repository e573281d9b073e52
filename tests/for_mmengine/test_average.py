"""``mmdet-ema average`` with the data, model and metrics of a config."""

import pytest
import torch

from mmdet_ema.checkpoint.contents import read_contents
from mmdet_ema.cli.main import main
from tests.contract.toy import assert_estimated
from tests.for_mmengine.toy import Run, Samples, ToyModel
from tests.toy import outputs

CONFIG = """
from mmengine.dataset import DefaultSampler, default_collate
from mmengine.optim import OptimWrapper
from torch.optim import SGD

from tests.for_mmengine.toy import Score, ToyData, ToyModel

def loader(size, seed):
    return dict(
        dataset=dict(type=ToyData, size=size, seed=seed),
        batch_size=4,
        sampler=dict(type=DefaultSampler, shuffle=False),
        collate_fn=dict(type=default_collate),
        num_workers=0,
    )

model = dict(type=ToyModel)
train_dataloader = loader(16, 0)
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(
    type=OptimWrapper, optimizer=dict(type=SGD, lr=0.1)
)
val_dataloader = loader(4, 1)
val_cfg = dict()
val_evaluator = dict(type=Score)
del loader
"""
HOOK = dict(type='EMAHook', decay=0.9, tau=3)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Files of three epochs, and a config."""
    folder = tmp_path_factory.mktemp('run')
    checkpoint = dict(type='CheckpointHook', interval=1)
    hooks = dict(checkpoint=checkpoint)
    Run(folder, HOOK, max_epochs=3, hooks=hooks).train()
    (folder / 'config.py').write_text(CONFIG)
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as error:
        main(['average', *map(str, arguments)])
    return error.value.code


def files_of(folder):
    return [folder / f'epoch_{n}.pth' for n in (1, 2, 3)]


def score(state):
    """What the metric of the toy returns, without a runner."""
    model = ToyModel()
    model.load_state_dict(state)
    with torch.no_grad():
        inputs = torch.from_numpy(Samples(4, 1).inputs)
        return float(outputs(model.eval(), inputs).double().sum())


def mean(states):
    return {
        key: sum(x[key].double() for x in states).div(len(states)).to(y.dtype)
        if y.is_floating_point()
        else y
        for key, y in states[-1].items()
    }


def test_greedy_soup(folder, tmp_path, capsys):
    """The files whose mean is best, one after the other, by the config."""
    out = tmp_path / 'soup.pth'
    options = ['--profile', 'soup:greedy', '--config', folder / 'config.py']
    assert 0 == run(*files_of(folder), '-o', out, *options)
    states = [
        read_contents(str(x)).sets['ema'].tensors for x in files_of(folder)
    ]
    best = sorted(states, key=score, reverse=True)
    chosen = best[:1]
    for state in best[1:]:
        if score(mean([*chosen, state])) >= score(mean(chosen)):
            chosen.append(state)
    found = torch.load(out, map_location='cpu')['state_dict']
    assert score(found) == pytest.approx(score(mean(chosen)), rel=1e-6)
    said = capsys.readouterr().out
    assert f'soup of {len(chosen)} of 3: {score(found):.4f}' in said
    for path, state in zip(files_of(folder), states):
        assert f'{path}: {score(state):.4f}' in said
    # a soup is no worse than its best file
    assert score(found) >= max(map(score, states)) - 1e-6


def test_metric(folder, tmp_path, capsys):
    """A metric that the config does not have is refused, with those it has."""
    options = ['--profile', 'soup:greedy', '--config', folder / 'config.py']
    out = tmp_path / 'soup.pth'
    status = run(*files_of(folder), '-o', out, *options, '--metric', 'scor')
    assert 2 == status
    assert "'scor' is not one of the validation; use one of score. Did " in (
        capsys.readouterr().err
    )
    assert not out.exists()
    options[-1] = folder / 'no.py'
    assert 2 == run(*files_of(folder), '-o', out, *options)
    assert 'there is no config file' in capsys.readouterr().err


def test_recalibrate(folder, tmp_path):
    """Statistics of the averaged weights, from the training data."""
    out, again = tmp_path / 'out.pth', tmp_path / 'again.pth'
    plain = tmp_path / 'plain.pth'
    profile = ['--profile', 'mean']
    assert 0 == run(*files_of(folder), '-o', plain, *profile)
    options = ['--recalibrate', folder / 'config.py', '--batches', 3]
    assert 0 == run(*files_of(folder), '-o', out, *profile, *options)
    found, before = (
        torch.load(x, map_location='cpu')['state_dict'] for x in (out, plain)
    )
    assert_estimated(found, Samples(16, 0).inputs[:12])
    changed = {k for k in found if not torch.equal(found[k], before[k])}
    assert changed == {'norm.running_mean', 'norm.running_var'}
    assert 0 == run('--recipe', out, '-o', again)
    assert out.read_bytes() == again.read_bytes()
