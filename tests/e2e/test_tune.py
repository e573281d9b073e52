"""``mmdet-ema tune``, on a real detector."""

import os
import re
import subprocess
import sys

import pytest
import torch

from mmdet_ema.cli.main import main
from tests.e2e.conftest import environment, load

pytestmark = pytest.mark.e2e

SETTINGS = """
custom_imports = dict(imports=['mmdet_ema', 'tests.e2e.confidence'])
val_evaluator = dict(_delete_=True, type='Confidence', scale=100)
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(max_keep_ckpts=-1))
_base_.custom_hooks[0] = dict(
    type='EMAHook', decay=0.95, tau=1.5, posthoc=True,
    averages=dict(fast=dict(decay=0.75, tau=1)))
"""
METRIC = 'digits/mAP'


@pytest.fixture(scope='module')
def run(tools):
    """A training of 16 steps: its config and work folder."""
    config = tools.config('tuned', SETTINGS)
    work_dir = tools.folder / 'tuned'
    tools.run('train', config, work_dir)
    return config, work_dir


@pytest.fixture(scope='module')
def tuned(tools, run):
    """What the command printed, and the file that it wrote."""
    out = tools.folder / 'best.pth'
    words = ('--windows', '1.5,2,4,6', '-o', out)
    return tools.cli('tune', *run, *words), out


def rows(text):
    """The metrics of a table by what they are of."""
    found = {}
    table, _, _ = text.partition('* the best one')
    for line in table.splitlines():
        cells = line.lstrip('* ').replace(' (deployed)', '').split()
        if line[:2] in ('* ', '  '):
            name = cells[0] if cells[0] != 'window' else f'window {cells[1]}'
            found[name] = [float(x) for x in cells[4:]]
    return found


def test_table(tools, run, tuned):
    """It has what mmdet's own tool finds, for each set of the last file."""
    config, work_dir = run
    text, _ = tuned
    found = rows(text)
    last = work_dir / 'epoch_4.pth'
    for name in ('raw', 'fast'):
        option = f'custom_hooks.0.evaluate={name}'
        metrics = tools.test(config, last, f'tune_{name}', option)
        assert f'{metrics[METRIC]:.4f}' == f'{found[name][0]:.4f}'
    assert (work_dir / 'tune.png').stat().st_size > 5000
    # what the training wrote is as it was
    assert config.name in os.listdir(work_dir)
    assert 'custom_hooks' in (work_dir / config.name).read_text()


def test_file(tools, run, tuned):
    """The best weights deploy, and ``average`` repeats them bit for bit."""
    config, _ = run
    text, out = tuned
    found = rows(text)
    best = max(value for value, *_ in found.values())
    metrics = tools.test(config, out, 'tune_best')
    assert f'{best:.4f}' == f'{metrics[METRIC]:.4f}'
    again = tools.folder / 'again.pth'
    tools.cli('average', '--recipe', out, '-o', again)
    assert out.read_bytes() == again.read_bytes()


def test_refused_windows(tuned):
    """They are listed, with the reason and what to record."""
    text, _ = tuned
    refused = re.findall(r'refused: window (\S+): (.*)', text)
    made = [name for name in rows(text) if name.startswith('window')]
    assert 4 == len(refused) + len(made)
    assert all('error of the profile' in reason for _, reason in refused)
    assert bool(refused) == ('next time: ' in text)


def test_two_ranks(tools, run, tuned):
    """They print one table, the same as one rank does."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    words = ['--nproc_per_node', '2', '-m', 'mmdet_ema', 'tune', *run]
    words += ['--windows', '1.5,2,4,6', '--launcher', 'pytorch']
    done = subprocess.run(
        [*command, *map(str, words)],
        cwd=tools.folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    alone = rows(tuned[0])
    # scores are added up in another order
    assert alone.keys() == rows(done.stdout).keys()
    for name, values in rows(done.stdout).items():
        assert values == pytest.approx(alone[name], abs=2e-4)
    assert 1 == done.stdout.count('the best one')


def test_run_that_had_no_averages_at_first(tools, run):
    """Its files without averages are left out; without any it is refused."""
    config, work_dir = run
    folder = tools.folder / 'late'
    folder.mkdir()
    for name in ('epoch_2.pth', 'epoch_4.pth'):
        content = load(work_dir / name)
        if name == 'epoch_2.pth':
            content = dict(state_dict=content['state_dict'], meta={})
        torch.save(content, folder / name)
    words = ('tune', config, folder, '--windows', '2,4')
    text = tools.cli(*words)
    left = folder / 'epoch_2.pth'
    assert f'{left} has no averages yet: it is left out' in text
    # of a decay that was changed nothing is used, and that is said
    content['ema_meta']['changed_at'] = 12
    torch.save(content, folder / 'epoch_4.pth')
    text = tools.cli(*words)
    assert 'a decay was changed after step 12' in text
    (folder / 'epoch_4.pth').unlink()
    text = tools.cli(*words, status=1)
    assert 'has averages that tell their steps' in text


def test_recalibrate(tools, run):
    """Statistics of training data give a column of their own, and a file."""
    out, again = (tools.folder / f'{x}.pth' for x in ('recal', 'recal_again'))
    words = ('--windows', '2,4', '--recalibrate', 2, '-o', out)
    text = tools.cli('tune', *run, *words, '--metric', METRIC)
    assert all(2 == len(values) for values in rows(text).values())
    assert any(a != b for a, b in rows(text).values())
    tools.cli('average', '--recipe', out, '-o', again)
    left, right = (load(x)['state_dict'] for x in (out, again))
    assert all(torch.equal(x, right[name]) for name, x in left.items())


@pytest.mark.parametrize(
    ('words', 'status', 'said'),
    [
        (['none.py', '{run}'], 2, "there is no config file 'none.py'"),
        (['{config}', '{folder}/digits'], 1, 'holds no epoch_N.pth'),
        (['{config}', '{run}', '-o', '-'], 2, 'has the table; name a file'),
        (['{config}', '{run}', '--windows', 'few'], 2, '--windows few'),
        (['{config}', '{run}', '--windows', '2,99'], 2, 'use 1 to 16'),
        (['{config}', '{run}', '--recalibrate', '-1'], 2, 'out of range'),
        (['{config}', '{run}', '-o', '{config}'], 1, 'exists already'),
        (['{config}', '{run}', '--cfg-options', 'a'], 2, 'is no KEY=VALUE'),
        (
            ['{config}', '{run}', '--cfg-options', 'val_cfg=None'],
            2,
            'has no val_cfg',
        ),
        (['{config}', '{run}', '--metric', 'map'], 2, 'use one of digits/mAP'),
    ],
)
def test_refusals(tools, run, words, status, said, capsys):
    """One line says what is wrong, and what to do."""
    config, work_dir = run
    names = dict(config=config, run=work_dir, folder=tools.folder)
    words = [word.format(**names) for word in words]
    with pytest.raises(SystemExit) as error:
        main(['tune', *words])
    assert status == error.value.code
    lines = capsys.readouterr().err.splitlines()
    (line,) = [x for x in lines if 'error: ' in x]
    assert said in line
