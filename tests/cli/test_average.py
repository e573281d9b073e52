"""``mmdet-ema average``: the file that it writes, and what it refuses."""

import json
import shutil
from glob import glob
from pathlib import Path

import pytest
import torch

from mmdet_ema.checkpoint import recipe
from mmdet_ema.checkpoint.average import average
from mmdet_ema.checkpoint.combination import read_files
from mmdet_ema.checkpoint.contents import read_contents
from mmdet_ema.checkpoint.diff import diff
from mmdet_ema.checkpoint.profiles import parse_profile
from mmdet_ema.cli.average import _HELP
from mmdet_ema.cli.main import main
from tests.checkpoint.walk import MAIN, Toy, Walk
from tests.toy import same


@pytest.fixture(scope='module')
def walk(tmp_path_factory):
    return Walk(tmp_path_factory.mktemp('walk'), posthoc=True, **MAIN)


def run(*arguments):
    """Run the command; return its exit status."""
    with pytest.raises(SystemExit) as error:
        main(['average', *map(str, arguments)])
    return error.value.code


@pytest.mark.parametrize(
    'profile', ['mean', 'ema:0.9985/50', 'wsm:1-sqrt', 'bema:0.2']
)
def test_file(walk, tmp_path, capsys, profile):
    """Weights and what tools ask for, and nothing that could run code."""
    out = tmp_path / 'out.pth'
    assert 0 == run(*walk.files, '-o', out, '--profile', profile)
    said = capsys.readouterr().out
    made = average(read_files(walk.files), parse_profile(profile))
    assert f'sum of absolute coefficients {made.absolute_sum:.3f}' in said
    if made.fit:
        assert f'error of the profile {made.fit.error:.2%}' in said
    content = torch.load(out, weights_only=True)
    assert {'state_dict', 'meta'} == set(content)
    assert [] == same(content['state_dict'], made.state_dict())
    Toy().load_state_dict(content['state_dict'])
    contents = read_contents(str(out))
    assert 'average' == contents.sets[contents.deployed].role
    tied = content['state_dict']
    pointers = {tied[f'{x}.weight'].data_ptr() for x in ('first', 'tied')}
    assert 1 == len(pointers)


@pytest.mark.parametrize(
    ('given', 'said'),
    [
        (('--profile', 'bema:0.2'), True),
        (('--coefficients=-1,2',), True),
        (('--coefficients', '0.5,0.5'), False),
        (('--profile', 'mean'), False),
    ],
)
def test_statistics_that_have_coefficients_of_their_own(
    walk, tmp_path, capsys, given, said
):
    """They are printed: a negative one is none of a variance."""
    files = walk.files[-2:]
    assert 0 == run(*files, '-o', tmp_path / 'out.pth', *given)
    printed = capsys.readouterr().out
    assert said == ('statistics' in printed.splitlines()[0])
    assert said == ('running statistics have their own' in printed)


def test_examples_of_the_help(tmp_path, monkeypatch, capsys):
    """They run as they are; for those with a CONFIG see ``test_help.py``."""
    folder = tmp_path / 'work_dirs' / 'a'
    folder.mkdir(parents=True)
    Walk(folder, posthoc=True, decay=0.999, tau=500)
    for file in folder.glob('iter_*.pth'):
        file.rename(file.with_name(file.name.replace('iter', 'epoch')))
    files = sorted(folder.glob('epoch_*.pth'))
    for name, file in zip(('a.pth', 'b.pth'), files):
        shutil.copy(file, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    lines = [x.strip() for x in _HELP.partition('examples:')[2].splitlines()]
    done = 0
    for line in filter(None, lines):
        if 'CONFIG' in line:
            continue
        words = line.replace('--recipe e.pth', '--recipe c.pth').split()
        program, command, *arguments = [
            name
            for word in words
            for name in (sorted(glob(word)) if '*' in word else [word])
        ]
        assert ('mmdet-ema', 'average') == (program, command)
        assert 0 == run(*arguments, '--force'), capsys.readouterr().err
        done += 1
    assert 4 == done
    same_bytes = Path('same_as_e.pth').read_bytes()
    assert Path('c.pth').read_bytes() == same_bytes


def test_safetensors(walk, tmp_path):
    """By its name, as that of extract; it is read again, and repeated."""
    out, same_out = (tmp_path / f'{x}.safetensors' for x in 'ab')
    pth = tmp_path / 'a.pth'
    for path in (out, pth):
        assert 0 == run(*walk.files, '-o', path, '--profile', 'ema:0.9985/50')
    assert not diff(str(out), str(pth)).differences
    assert 'average' == read_contents(str(out)).sets['ema'].role
    assert 0 == run('--recipe', out, '-o', same_out)
    assert out.read_bytes() == same_out.read_bytes()


def test_recipe(walk, tmp_path, capsys):
    """What is repeated has the same bytes: by the file, or as text."""
    out, again = tmp_path / 'out.pth', tmp_path / 'again.pth'
    options = ('--profile', 'ema:0.9985/50')
    assert 0 == run(*walk.files, '-o', out, *options)
    made = recipe.read(str(out))
    assert 'average' == made['command']
    assert 'ema:0.9985/50' == made['options']['profile']
    assert 0 < float(made['options']['error']) < 0.1
    names = [x['path'] for x in made['inputs']]
    assert {*names} <= {*walk.files, f'{walk.folder}/ema_start.pt'}
    (tmp_path / 'r.json').write_text(json.dumps(made))
    (tmp_path / 'r.yaml').write_text(json.dumps(made))
    pytest.importorskip('yaml')
    for source in (out, tmp_path / 'r.json', tmp_path / 'r.yaml'):
        assert 0 == run('--recipe', source, '-o', again, '--force')
        assert out.read_bytes() == again.read_bytes()
    paths = [x['path'] for x in made['inputs']]
    moved = [shutil.copy(x, tmp_path / f'{i}') for i, x in enumerate(paths)]
    assert 0 == run(*moved[::-1], '--recipe', out, '-o', again, '--force')
    assert out.read_bytes() == again.read_bytes()
    capsys.readouterr()
    twice = [moved[0], *moved[:-1]]
    assert 1 == run(*twice, '--recipe', out, '-o', again, '--force')
    assert f"is what '{paths[-1]}' was" in capsys.readouterr().err
    gone = {**made['inputs'][0], 'path': 'gone.pth'}
    others = {**made, 'inputs': [gone, *made['inputs'][1:]]}
    (tmp_path / 'r.json').write_text(json.dumps(others))
    assert 1 == run('--recipe', tmp_path / 'r.json', '-o', again, '--force')
    assert "'gone.pth', which the recipe is made of, is not there" in (
        capsys.readouterr().err
    )
    assert 2 == run('--recipe', out, '-o', again, '--force', '--start', 'x')
    assert '--recipe says all options; leave out --start' in (
        capsys.readouterr().err
    )
    made['inputs'][0]['sha256'] = 'f' * 64
    (tmp_path / 'r.json').write_text(json.dumps(made))
    capsys.readouterr()
    assert 1 == run('--recipe', tmp_path / 'r.json', '-o', tmp_path / 'no')
    assert 'is not the file that the recipe was made with' in (
        capsys.readouterr().err
    )
    assert not (tmp_path / 'no').exists()


@pytest.mark.parametrize(
    'change',
    [
        lambda x: x.pop('terms'),
        lambda x: x.update(terms=[[0, 'ema']]),
        lambda x: x.update(terms=[[99, 'ema', 1, 1]]),
        lambda x: x.update(terms=[[0, 'other', 1, 1]]),
        lambda x: x.update(lead=[0]),
        lambda x: x.update(lead=None),
        lambda x: x.update(terms=[]),
        lambda x: x.update(terms=[[0, 'ema', 'nan', '1']]),
        lambda x: x.update(terms=[[0, 'ema', '0.5', '1']]),
    ],
)
def test_damaged_recipe(walk, tmp_path, capsys, change):
    """A recipe without terms that can be repeated is refused."""
    made = average(read_files(walk.files), parse_profile('mean')).recipe({})
    change(made['options'])
    (tmp_path / 'r.json').write_text(json.dumps(made))
    assert 1 == run('--recipe', tmp_path / 'r.json', '-o', tmp_path / 'no')
    error = capsys.readouterr().err
    assert 1 == error.count('\n')
    assert error.startswith('mmdet-ema: error: ')
    assert not (tmp_path / 'no').exists()


@pytest.mark.parametrize(
    ('options', 'status', 'match'),
    [
        (['--profile', 'ema:0.5'], 1, 'cannot be made of these files: error'),
        (['--profile', 'lawa:99'], 1, 'needs 99 files of a run, 10 are given'),
        (['--profile', 'men'], 2, "profile='men' is not known; use 'mean',"),
        (['--profile', ''], 2, "profile='' is not known; use 'mean',"),
        (['--profile', 'soup:greedy'], 2, 'give --config CONFIG'),
        ([], 2, 'what is to be made? Give --profile, as --profile mean'),
        (['--coefficients', '0.2,x'], 2, ":0.2,x' cannot be read; use 'mean'"),
        (['--coefficients', '0.2'], 2, '1 coefficients are given for 10'),
        (
            ['--profile', 'mean', '--batches', '3'],
            2,
            'no effect without --rec',
        ),
        (['--profile', 'mean', '--metric', 'x'], 2, '--metric has no effect'),
        (
            ['--profile', 'mean', '--recalibrate', 'c.py', '--batches', '0'],
            2,
            '--batches 0 is out of range; use at least 1',
        ),
    ],
    ids=str,
)
def test_refused(walk, tmp_path, capsys, options, status, match):
    """One line, and no file."""
    out = tmp_path / 'out.pth'
    assert status == run(*walk.files, '-o', out, *options)
    error = capsys.readouterr().err
    assert match in error
    assert 1 == error.count('\n')
    assert [] == list(tmp_path.iterdir())


def test_no_files(tmp_path, capsys):
    """No file, one that is not there, one that is there already."""
    out = tmp_path / 'out.pth'
    assert 2 == run('-o', out, '--profile', 'mean')
    assert 'give a FILE, or --recipe' in capsys.readouterr().err
    assert 1 == run(tmp_path / 'x.pth', '-o', out, '--profile', 'mean')
    assert 'there is no file' in capsys.readouterr().err
    out.write_text('mine')
    assert 1 == run(tmp_path / 'x.pth', '-o', out, '--profile', 'mean')
    assert 'exists already; use --force' in capsys.readouterr().err
    assert 'mine' == out.read_text()
