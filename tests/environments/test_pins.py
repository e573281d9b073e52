"""Tests of the requirement files and of the record of what is done."""

import json
import re

import pytest

from environments import pins, stamp
from environments.generation import GENERATIONS, MMENGINE
from tests.environments.fakes import WANTED, make_venv

OPENMMLAB = MMENGINE.file('openmmlab')
PIN_FILES = {
    generation.name: [
        *generation.package_files(),
        generation.file('openmmlab'),
    ]
    for generation in GENERATIONS.values()
}


class TestPins:
    """The requirement files."""

    @pytest.mark.parametrize(
        'file',
        [file for files in PIN_FILES.values() for file in files],
        ids=lambda file: f'{file.parent.name}-{file.stem}',
    )
    def test_every_line_is_pinned(self, file):
        """Every requirement is one exact version, with nothing else."""
        lines = file.read_text(encoding='utf-8').splitlines()
        wanted = [x for x in lines if x.strip() and not x.startswith('#')]
        assert wanted
        for line in wanted:
            assert re.fullmatch(r'[\w-]+==[\w.]+', line)

    @pytest.mark.parametrize('files', PIN_FILES.values(), ids=PIN_FILES)
    def test_no_package_is_pinned_twice(self, files):
        """No two files of an environment pin the same package."""
        text = '\n'.join(x.read_text(encoding='utf-8') for x in files)
        names = re.findall(r'^([\w-]+)==', text, re.MULTILINE)
        assert sorted(set(names)) == sorted(names)

    def test_pinned(self):
        """The version of a package is read from its line."""
        assert pins.pinned(OPENMMLAB, 'mmcv') == '2.1.0'

    def test_not_pinned(self):
        """A package that is not in the file is named in the error."""
        with pytest.raises(ValueError, match='no line "mmcv-full==VERSION"'):
            pins.pinned(OPENMMLAB, 'mmcv-full')

    def test_digest_changes(self, tmp_path, monkeypatch):
        """Contents, recipe, Python and place each change the digest."""
        file = tmp_path / 'pins.txt'
        digests = [pins.digest('3.11.7', [file], '/a')]
        file.write_text('torch==2.13.0\n')
        digests.append(pins.digest('3.11.7', [file], '/a'))
        digests.append(pins.digest('3.11.7', [file], '/b'))
        digests.append(pins.digest('3.11.99', [file], '/a'))
        monkeypatch.setattr(pins, 'RECIPE', pins.RECIPE + 1)
        digests.append(pins.digest('3.11.7', [file], '/a'))
        assert len(set(digests)) == 5
        assert pins.digest('3.11.7', [file], '/a') == digests[-1]


class TestStamp:
    """The record of what is done."""

    @pytest.mark.parametrize(
        ('done', 'expected'),
        [
            ({}, ['packages', 'openmmlab', 'project']),
            ({'packages': 'a'}, ['openmmlab', 'project']),
            ({**WANTED, 'openmmlab': 'old'}, ['openmmlab', 'project']),
            ({**WANTED, 'project': 'old'}, ['project']),
            (WANTED, []),
        ],
    )
    def test_pending(self, tmp_path, done, expected):
        """The first step that differs is done again, and all after it."""
        assert stamp.pending(make_venv(tmp_path, done), WANTED) == expected

    def test_environment_without_python(self, tmp_path):
        """Everything is done again where the base Python is gone."""
        venv = make_venv(tmp_path, WANTED)
        (venv / 'bin' / 'python').unlink()
        (venv / 'bin' / 'python').symlink_to(tmp_path / 'gone')
        assert stamp.pending(venv, WANTED) == list(WANTED)

    @pytest.mark.parametrize('text', ['', '{"packages": "a', '[]', '\0'])
    def test_broken_record(self, tmp_path, text):
        """A record that cannot be read counts as nothing done."""
        venv = make_venv(tmp_path, WANTED)
        (venv / stamp.NAME).write_text(text)
        assert stamp.read(venv) == {}

    def test_write_leaves_one_file(self, tmp_path):
        """The record is moved into place."""
        stamp.write(tmp_path, WANTED)
        assert [x.name for x in tmp_path.iterdir()] == [stamp.NAME]
        assert json.loads((tmp_path / stamp.NAME).read_text()) == WANTED

    def test_foreign(self, tmp_path):
        """An environment without our record is not ours."""
        venv = make_venv(tmp_path, {})
        assert not stamp.is_foreign(venv)
        (venv / stamp.NAME).unlink()
        assert stamp.is_foreign(venv)
