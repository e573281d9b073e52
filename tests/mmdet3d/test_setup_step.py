"""The extra step of the set-up, without installing."""

import re

import pytest

from environments import commands, console, prepare, stamp, steps
from environments.generation import MMENGINE
from tests.environments.fakes import make_python


def lines(path):
    """Requirements of a file."""
    text = path.read_text(encoding='utf-8').splitlines()
    return [x for x in text if x.strip() and not x.startswith('#')]


def digests(root, *extras):
    """Digests of the steps of the default generation."""
    return prepare.digests(root, MMENGINE, make_python(), extras)


def make_steps(root, wanted):
    """The steps of the default generation."""
    return steps.Steps(root, MMENGINE, make_python(), wanted)


def test_every_line_is_pinned_once():
    """Every requirement is one exact version that no other file pins."""
    own = lines(MMENGINE.file('mmdet3d'))
    assert own
    assert all(re.fullmatch(r'[\w-]+==[\w.]+', line) for line in own)
    others = [*MMENGINE.package_files(), MMENGINE.file('openmmlab')]
    names = [x.partition('==')[0].lower() for x in own]
    for path in others:
        names += [x.partition('==')[0].lower() for x in lines(path)]
    assert sorted(set(names)) == sorted(names)


def test_extra_step_comes_last_and_only_where_asked(tmp_path):
    """The other steps and their digests stay as they are."""
    usual = digests(tmp_path)
    more = digests(tmp_path, 'mmdet3d')
    assert list(more) == [*usual, 'mmdet3d']
    assert {k: more[k] for k in usual} == usual


def test_unknown_extra_step(capsys):
    """An unknown name is refused in one line with those that there are."""
    assert prepare.main('mmseg') == 1
    error = capsys.readouterr().err
    assert "no extra step 'mmseg' (there is: mmdet3d)" in error
    assert error.count('\n') == 1


def test_step_installs_without_dependencies(tmp_path, monkeypatch):
    """No dependency is touched, and the step is recorded."""
    wanted = digests(tmp_path, 'mmdet3d')
    stamp_folder = tmp_path / '.venv'
    stamp_folder.mkdir()
    seen = []

    def note(command, **options):
        seen.append([str(word) for word in command])

    monkeypatch.setattr(commands, 'run', note)
    make_steps(tmp_path, wanted).do('mmdet3d')
    assert '--no-deps' in seen[0]
    assert str(MMENGINE.file('mmdet3d')) in seen[0]
    assert stamp.read(stamp_folder) == {'mmdet3d': wanted['mmdet3d']}


def test_step_that_fails_is_not_recorded(tmp_path, monkeypatch):
    """A failed installation is done again the next time."""
    (tmp_path / '.venv').mkdir()

    def fail(*arguments, **options):
        raise console.SetupError('no network')

    monkeypatch.setattr(commands, 'run', fail)
    wanted = digests(tmp_path, 'mmdet3d')
    with pytest.raises(console.SetupError, match='no network'):
        make_steps(tmp_path, wanted).do('mmdet3d')
    assert stamp.read(tmp_path / '.venv') == {}
