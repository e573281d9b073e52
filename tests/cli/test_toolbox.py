"""The commands for files: what they print, their exit status, their help."""

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from mmdet_ema.cli.main import _OF_FILES, _parser, main
from tests.averaging.models import ROOT
from tests.checkpoint.golden.small import HERE

FORMATS = ('d2go.pth', 'mmdet_ema.pth', 'timm.pth')


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with the files that the examples name."""
    (tmp_path / 'work_dirs' / 'a').mkdir(parents=True)
    ours = HERE / 'mmdet_ema.pth'
    for name in ('epoch_11.pth', 'epoch_12.pth', 'work_dirs/a/epoch_12.pth'):
        shutil.copy(ours, tmp_path / name)
    shutil.copy(HERE / 'd2go.pth', tmp_path / 'd2go.pth')
    monkeypatch.chdir(tmp_path)
    assert run('extract epoch_12.pth -o ema.pth') == 0
    shutil.copy('ema.pth', 'published.pth')
    shutil.copy('ema.pth', 'a.pth')
    assert run('extract epoch_12.pth -o b.safetensors') == 0
    return tmp_path


def run(line):
    """Run a command in this process; return its exit status."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    return stop.value.code


def examples():
    """The examples in ``--help`` of the commands that read and write files."""
    (commands,) = (
        x.choices
        for x in _parser()._actions
        if hasattr(x, 'choices') and isinstance(x.choices, dict)
    )
    for name in ('inspect', 'extract', 'convert', 'diff'):
        text = commands[name].epilog.partition('examples:\n')[2]
        lines = [x.strip() for x in text.splitlines() if x.strip()]
        assert lines, f'{name} has no examples'
        yield from lines


class Full:
    """A file on a disk that is full."""

    room = 2

    def write(self, data):
        self.room -= 1
        if self.room <= 0:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return len(data)

    def flush(self):
        pass


@pytest.mark.parametrize('options', ['', '--safetensors'])
def test_no_room(options, monkeypatch, capsys):
    """It is one line, although torch hides what the file said."""
    full = types.SimpleNamespace(buffer=Full())
    monkeypatch.setattr(sys, 'stdout', full)
    assert run(f'extract epoch_12.pth -o - {options}') == 1
    error = capsys.readouterr().err
    assert 'No space left on device' in error
    assert error.count('\n') == 1


def test_device_is_not_replaced(capsys):
    """A file in the place of /dev/null would stop much else."""
    os.mkfifo('pipe')
    assert run('extract epoch_12.pth -o pipe --force') == 1
    assert 'is a device or a pipe' in capsys.readouterr().err
    assert not os.path.isfile('pipe')


def test_a_format_is_none_of_safetensors(capsys):
    """A file of torch by that name would be read by nobody."""
    assert run('convert epoch_12.pth -o x.safetensors --to timm') == 2
    assert 'for one set of weights as safetensors' in capsys.readouterr().err
    assert not os.path.exists('x.safetensors')


def test_hash_of_the_standard_output(capsys):
    """It has no name that a hash could be a part of."""
    assert run('extract epoch_12.pth -o - --hash') == 2
    assert '--hash goes into the name' in capsys.readouterr().err


@pytest.mark.parametrize('line', examples())
def test_examples_of_the_help_run(line, capsysbinary):
    """Each does what it says, on files of those names."""
    if 'png' in line:
        pytest.importorskip('matplotlib')
    words = line.split(' | ')[0].split(' > ')[0]
    start, _, words = words.partition(' ')
    assert start == 'mmdet-ema'
    out = re.search(r'-o (\S+)', words)
    if out and os.path.exists(out[1]):
        words += ' --force'
    words = words.replace('work_dirs/a/*.pth', 'work_dirs/a/epoch_12.pth')
    capsysbinary.readouterr()
    expected = 1 if '--against' in words else 0
    assert run(words) == expected
    said = capsysbinary.readouterr()
    if out and out[1] == '-':
        Path('piped.pth').write_bytes(said.out)
        assert b'wrote' in said.err
        assert run('diff piped.pth ema.pth') == 0
    elif out:
        assert os.path.exists(out[1]) or '--hash' in words
    else:
        assert said.out


def test_inspect_says_what_is_there(capsys):
    """One file in full, several in a table, and where roles are unknown."""
    assert run('inspect epoch_12.pth') == 0
    text = capsys.readouterr().out
    for words in (
        'mmdet_ema, written by mmdet_ema',
        'roles: ema_meta says so',
        'ema: schedule exponential(decay=0.9, tau=3.0)',
        'tied: first.weight = tied.weight',
        "the framework's own tools load: ema",
        'distance from raw by module: first ',
    ):
        assert words in text
    torch.save({'state_dict': {'a': torch.zeros(1)}}, 'plain.pth')
    assert run('inspect plain.pth') == 0
    assert 'cannot be known whether raw or averages' in capsys.readouterr().out
    assert run('inspect epoch_12.pth d2go.pth ema.pth') == 0
    text = capsys.readouterr().out
    assert all(x in text for x in ('epoch_12.pth', 'd2go.pth', 'ema.pth'))
    assert 'd2go.pth: d2go does not save n.' in text


def test_names_do_nothing_to_the_terminal(capsys):
    """A file may call its tensors anything."""
    weights = {'a\n\x1b[2J.[red]b': torch.tensor([float('nan')])}
    torch.save({'state_dict': weights}, 'odd.pth')
    assert run('inspect odd.pth') == 0
    assert run('diff odd.pth ema.pth') == 1
    text = capsys.readouterr().out
    assert '\x1b[2J' not in text
    assert 'a??[2J.[red]b' in text


def test_tables_without_rich(capsys, monkeypatch):
    """The same cells, in plain lines."""
    monkeypatch.setitem(sys.modules, 'rich.console', None)
    assert run('inspect epoch_12.pth d2go.pth') == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ['file', 'weights', 'role']
    assert re.match(r'epoch_12\.pth +raw +raw ', lines[1])


def test_bad_files_among_good_ones(capsys):
    """Each gets its line, the others are reported, the status is 1."""
    Path('bad.pth').write_text('bad')
    assert run('inspect bad.pth epoch_12.pth nowhere.pth --json') == 1
    text = capsys.readouterr()
    assert [x['path'] for x in json.loads(text.out)] == ['epoch_12.pth']
    lines = text.err.splitlines()
    assert len(lines) == 2
    assert all(x.startswith('mmdet-ema: error: ') for x in lines)


def test_differences_are_a_status(capsys):
    """0 where nothing differs, 1 where something does, with a table."""
    assert run('diff epoch_11.pth epoch_12.pth') == 0
    text = capsys.readouterr().out
    assert '0 differences in 30 tensors; compared: raw, ema, fast' in text
    assert run('diff epoch_12.pth ema.pth --weights raw --against ema') == 1
    assert 'head.weight' in capsys.readouterr().out
    assert run('diff epoch_12.pth d2go.pth --json') == 1
    assert json.loads(capsys.readouterr().out)['unpaired'] == [
        "fast (only in 'epoch_12.pth')"
    ]


@pytest.mark.parametrize(
    ('line', 'status', 'message'),
    [
        ('extract epoch_12.pth -o ema.pth', 1, 'exists already'),
        ('extract epoch_12.pth -o x.pth --weights slow', 1, 'named .slow.'),
        ('extract epoch_12.pth', 2, 'required: -o'),
        ('extract -o x.pth', 2, 'give a FILE, or --recipe'),
        ('extract epoch_12.pth -o x.pth --dtype int8', 2, 'not known'),
        ('extract epoch_12.pth -o x.pth --recipe nowhere.json', 1, 'no rec'),
        (
            'extract --recipe ema.pth -o x.pth --weights raw',
            *(2, 'leave out --weights'),
        ),
        ('convert --recipe ema.pth -o x.pth', 2, "made by 'extract'"),
        ('convert epoch_12.pth -o x.pth', 2, 'give --to FORMAT'),
        ('convert epoch_12.pth -o x.pth --to tim', 2, "Did you mean 'timm'"),
        ('convert epoch_12.pth -o x.pth --to yolov5', 2, 'is not known'),
        ('convert epoch_12.pth -o x.pth --to bevdet', 1, 'epoch_N.pth'),
        ('convert epoch_12.pth -o - --to bevdet', 1, 'two files'),
        ('inspect', 2, 'required: FILE'),
        ('inspect ema.pth --plot x.png', 2, 'no file has both'),
        ('diff epoch_12.pth', 2, 'required: B'),
    ],
)
def test_what_is_refused(line, status, message, folder, capsys):
    """One line, the right status, and no file."""
    before = sorted(folder.iterdir())
    assert run(line) == status
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert 'Traceback' not in error
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize('count', [0, 2])
def test_recipe_of_another_number_of_files(count, folder, capsys):
    """A recipe that was edited by hand is refused in one line."""
    inputs = [{'path': 'epoch_12.pth', 'sha256': ''}] * count
    recipe = dict(command='extract', version='0', inputs=inputs, options={})
    (folder / 'recipe.json').write_text(json.dumps(recipe))
    assert run('extract --recipe recipe.json -o x.pth') == 2
    assert f'is of {count} files, and extract reads one' in (
        capsys.readouterr().err
    )
    assert not (folder / 'x.pth').exists()


def test_what_is_lost_is_said(capsys):
    """By convert, for each thing that the format cannot hold."""
    assert run('convert epoch_12.pth -o x.pth --to timm') == 0
    text = capsys.readouterr().out
    assert text.startswith('wrote x.pth: mmdet_ema -> timm, with raw, ema\n')
    for words in (
        'weights fast',
        'n, which is 7',
        'the schedule',
        'optimizer',
    ):
        assert re.search(f'^lost: .*{words}', text, re.M)


def test_help_answers_at_once():
    """No command imports torch before it runs."""
    for name in _OF_FILES:
        done = subprocess.run(
            [sys.executable, '-c', SCRIPT, name, '--help'],
            capture_output=True,
            text=True,
            env={**os.environ, 'PYTHONPATH': str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        assert 'examples:' in done.stdout


# what pip's script of the command does
SCRIPT = """
import sys
from mmdet_ema_cli import main
sys.argv[0] = 'mmdet-ema'
try:
    main()
except SystemExit as stop:
    assert not {'torch', 'numpy', 'rich'} & sys.modules.keys()
    assert not stop.code
"""
