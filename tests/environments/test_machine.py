"""Tests of what the machine and its Python must have."""

import sys
from pathlib import Path

import pytest

from environments import console, facts, interpreter, machine
from environments.generation import MMCV1, MMENGINE
from tests.environments.fakes import make_python


class TestInterpreter:
    """The Python that an environment is made with."""

    def test_of_the_default_environment(self):
        """The default environment is made with the Python that runs."""
        found = interpreter.find(MMENGINE)
        assert found.version == '.'.join(map(str, sys.version_info[:3]))
        assert Path(found.headers, 'Python.h').name == 'Python.h'
        assert found.packages == {}

    def test_of_mmcv1(self, monkeypatch):
        """The environment of mmcv 1.x asks the Python that is named."""
        monkeypatch.setenv('PYTHON_MMCV1', sys.executable)
        found = interpreter.find(MMCV1)
        assert found.version == interpreter.find(MMENGINE).version
        version, folder = found.packages['torch']
        assert version == found.package_version('torch')
        assert Path(folder, '__init__.py').is_file()

    @pytest.mark.parametrize(
        ('release', 'expected'),
        [
            ({'ID': 'debian', 'VERSION_ID': '12'}, 'debian12'),
            ({'ID': 'arch'}, 'arch'),
            (OSError('no os-release'), ''),
        ],
    )
    def test_system(self, monkeypatch, release, expected):
        """The system is told with its version, where it has one."""

        def tell():
            if isinstance(release, OSError):
                raise release
            return release

        monkeypatch.setattr(facts.platform, 'freedesktop_os_release', tell)
        assert interpreter.find(MMENGINE).system == expected

    @pytest.mark.parametrize('path', ['/no/python', '/bin/true', '/bin/false'])
    def test_that_is_none(self, monkeypatch, path):
        """What does not answer is named, with how to get what is needed."""
        monkeypatch.setenv('PYTHON_MMCV1', path)
        with pytest.raises(console.SetupError) as caught:
            interpreter.find(MMCV1)
        text = str(caught.value)
        assert text.startswith(f'{path} is no Python 3.11 (PYTHON_MMCV1 names')
        assert 'on Debian 12, sudo apt-get install g++ python3-torch' in text


class TestMachine:
    """What the machine must have."""

    @pytest.mark.parametrize('version', ['3.10.14', '3.12.0', '3.1.1'])
    def test_other_python(self, version):
        """Another Python is refused with the version that is tested."""
        python = make_python(version=version)
        with pytest.raises(console.SetupError, match=r'PYTHON=python3\.11'):
            machine.check_python(python, MMENGINE)
        with pytest.raises(console.SetupError, match=r'PYTHON_MMCV1=python3'):
            machine.check_python(python, MMCV1)

    def test_no_ensurepip(self):
        """A Python without ensurepip is refused with the package to add."""
        with pytest.raises(console.SetupError, match='-venv'):
            machine.check_python(make_python(ensurepip=False), MMENGINE)

    @pytest.mark.parametrize(
        ('packages', 'found'),
        [
            ({}, 'no torch, but 1.13.*'),
            ({'torch': ('2.1.0', '/t')}, '2.1.0 torch, but 1.13.*'),
            ({'torch': ('1.13.1', '/t')}, 'no torchvision, but 0.14.*'),
        ],
    )
    def test_packages_of_the_system(self, packages, found):
        """A missing torch 1.13 is named, with the packages to install."""
        python = make_python(packages=packages)
        with pytest.raises(console.SetupError) as caught:
            machine.check_python(python, MMCV1)
        expected = f'/usr/bin/python3 has {found} is needed: on Debian 12, '
        assert str(caught.value).startswith(f'{expected}sudo apt-get install')

    def test_what_debian_has_will_do(self):
        """Debian's torch and torchvision are not refused."""
        machine.check_python(make_python(), MMCV1)

    def test_no_compiler(self, monkeypatch):
        """Without a compiler the message names the package to install."""
        monkeypatch.setenv('CXX', 'no-such-compiler -O2')
        with pytest.raises(console.SetupError, match=r'g\+\+.*build-essentia'):
            machine.check_compiler(make_python())

    @pytest.mark.parametrize(
        ('missing', 'package'),
        [('Python.h', 'python3.11-dev'), ('extension.h', 'libtorch-dev')],
    )
    def test_no_headers(self, monkeypatch, tmp_path, missing, package):
        """Without headers the message names their package."""
        monkeypatch.setattr(machine.shutil, 'which', lambda name: name)
        headers = tmp_path / 'Python.h', tmp_path / 'include/torch/extension.h'
        for header in headers:
            header.parent.mkdir(parents=True, exist_ok=True)
            header.touch()
        packages = {'torch': ('1.13.0', str(tmp_path))}
        python = make_python(headers=str(tmp_path), packages=packages)
        machine.check_compiler(python)
        next(x for x in headers if x.name == missing).unlink()
        with pytest.raises(console.SetupError, match=f'{missing}.*{package}'):
            machine.check_compiler(python)

    def test_full_disk(self, tmp_path):
        """A full disk is named with what is free and what is needed."""
        with pytest.raises(console.SetupError, match='but 1000000 GiB are'):
            machine.check_disk(tmp_path / 'not' / 'there', 10**6)

    @pytest.mark.parametrize(
        ('cores', 'gibibytes', 'asked', 'expected'),
        [
            (8, 64, '', 8),
            (8, 4, '', 2),
            (8, 1, '', 1),
            (8, 64, '3', 3),
            (8, 64, 'many', 8),
        ],
    )
    def test_compile_jobs(
        self, monkeypatch, cores, gibibytes, asked, expected
    ):
        """Cores and memory bound the jobs, unless MAX_JOBS is set."""
        monkeypatch.setenv('MAX_JOBS', asked)
        monkeypatch.setattr(machine, '_cores', lambda: cores)
        monkeypatch.setattr(
            machine, '_free_memory', lambda: gibibytes * machine.GIBIBYTE
        )
        assert machine.compile_jobs() == expected
