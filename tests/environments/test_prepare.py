"""Tests of the set-up: what it decides and says, without installing."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from environments import (
    cache,
    commands,
    console,
    lock,
    machine,
    operators,
    pins,
    prepare,
    stamp,
    steps,
)

WHEEL = 'mmcv-2.1.0-cp311-cp311-linux_x86_64.whl'
WANTED = {'packages': 'a', 'openmmlab': 'b', 'project': 'c'}
PIN_FILES = (pins.BUILD, pins.OPENMMLAB, pins.RUNTIME, pins.TOOLS)


def make_wheel(folder, content='compiled'):
    """Writes a small wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, 'w') as archive:
        archive.writestr('mmcv/_ext.so', content * 1000)
    return folder / WHEEL


def make_venv(root, done):
    """Makes what a set-up leaves that has done the given steps."""
    venv = root / '.venv'
    (venv / 'bin').mkdir(parents=True)
    (venv / 'bin' / 'python').symlink_to(sys.executable)
    (venv / 'pyvenv.cfg').touch()
    stamp.write(venv, done)
    return venv


class TestCache:
    """The user's cache of wheels."""

    def test_key(self, monkeypatch):
        """The key names Python, torch and the kind of machine."""
        monkeypatch.setattr(sys, 'version_info', (3, 11, 7))
        monkeypatch.setattr(cache.platform, 'machine', lambda: 'aarch64')
        assert cache.key('2.13.0') == 'cp311-torch2.13.0-aarch64'

    @pytest.mark.parametrize(
        ('variables', 'expected'),
        [
            ({'MMDET_EMA_CACHE': '/a', 'XDG_CACHE_HOME': '/b'}, '/a'),
            ({'XDG_CACHE_HOME': '/b'}, '/b/mmdet_ema'),
            ({'MMDET_EMA_CACHE': '', 'HOME': '/c'}, '/c/.cache/mmdet_ema'),
        ],
    )
    def test_folder(self, monkeypatch, variables, expected):
        """Our own variable goes before the system's, and that before home."""
        for name in ('MMDET_EMA_CACHE', 'XDG_CACHE_HOME'):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert cache.cache_folder() == Path(expected)

    def test_stored_wheel_is_found(self, tmp_path):
        """A wheel that was stored is found, and no other file is left."""
        built = make_wheel(tmp_path / 'built')
        kept = cache.store(built, tmp_path / 'kept')
        assert cache.find(tmp_path / 'kept', 'mmcv', '2.1.0') == kept
        assert [kept] == list((tmp_path / 'kept').iterdir())
        assert kept.read_bytes() == built.read_bytes()

    def test_other_version_is_not_found(self, tmp_path):
        """A wheel of another version does not count."""
        make_wheel(tmp_path)
        assert cache.find(tmp_path, 'mmcv', '2.2.0') is None

    def test_store_that_fails_leaves_the_old_wheel(
        self, tmp_path, monkeypatch
    ):
        """A copy that breaks off leaves the cached wheel as it was."""
        old = make_wheel(tmp_path / 'kept', 'old')
        before = old.read_bytes()

        def break_off(source, target):
            Path(target).write_bytes(b'half')
            raise OSError('No space left on device')

        monkeypatch.setattr(cache.shutil, 'copyfile', break_off)
        with pytest.raises(OSError, match='No space'):
            cache.store(make_wheel(tmp_path / 'new', 'new'), tmp_path / 'kept')
        assert [old] == list((tmp_path / 'kept').iterdir())
        assert old.read_bytes() == before

    @pytest.mark.parametrize('damage', ['cut', 'changed', 'empty'])
    def test_broken_wheel_is_removed(self, tmp_path, capsys, damage):
        """A broken wheel is removed, and one line says so."""
        wheel = make_wheel(tmp_path)
        content = wheel.read_bytes()
        damaged = {
            'cut': content[: len(content) // 2],
            'changed': content.replace(b'compiled', b'c0mpiled', 1),
            'empty': b'',
        }[damage]
        wheel.write_bytes(damaged)
        assert cache.find(tmp_path, 'mmcv', '2.1.0') is None
        assert not wheel.exists()
        output = capsys.readouterr().out
        assert output == f'setup: {wheel} is broken; it is built again\n'


class TestPins:
    """The requirement files."""

    @pytest.mark.parametrize('file', PIN_FILES, ids=lambda file: file.name)
    def test_every_line_is_pinned(self, file):
        """Every requirement is one exact version, with nothing else."""
        lines = file.read_text(encoding='utf-8').splitlines()
        wanted = [x for x in lines if x.strip() and not x.startswith('#')]
        assert wanted
        for line in wanted:
            assert re.fullmatch(r'[\w-]+==[\w.]+', line)

    def test_no_package_is_pinned_twice(self):
        """No two files pin the same package."""
        text = '\n'.join(x.read_text(encoding='utf-8') for x in PIN_FILES)
        names = re.findall(r'^([\w-]+)==', text, re.MULTILINE)
        assert sorted(set(names)) == sorted(names)

    def test_pinned(self):
        """The version of a package is read from its line."""
        assert pins.pinned(pins.OPENMMLAB, 'mmcv') == '2.1.0'

    def test_not_pinned(self):
        """A package that is not in the file is named in the error."""
        with pytest.raises(ValueError, match='no line "mmcv-full==VERSION"'):
            pins.pinned(pins.OPENMMLAB, 'mmcv-full')

    def test_digest_changes(self, tmp_path, monkeypatch):
        """Contents, recipe, Python and place each change the digest."""
        file = tmp_path / 'pins.txt'
        digests = [pins.digest([file], '/a')]
        file.write_text('torch==2.13.0\n')
        digests += [pins.digest([file], '/a'), pins.digest([file], '/b')]
        monkeypatch.setattr(pins, 'RECIPE', pins.RECIPE + 1)
        digests.append(pins.digest([file], '/a'))
        monkeypatch.setattr(pins, 'python_version', lambda: '3.11.99')
        digests.append(pins.digest([file], '/a'))
        assert len(set(digests)) == 5
        assert pins.digest([file], '/a') == digests[-1]


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


class TestSteps:
    """The steps and their record."""

    def test_foreign_environment_is_left_alone(self, tmp_path):
        """An environment that somebody else made is refused, not removed."""
        venv = make_venv(tmp_path, {})
        (venv / stamp.NAME).unlink()
        with pytest.raises(console.SetupError, match='move or delete it'):
            steps.Steps(tmp_path, WANTED).do('packages')
        assert (venv / 'pyvenv.cfg').exists()

    def test_failed_step_is_not_recorded(self, tmp_path, monkeypatch):
        """A step that fails is not recorded, a step before it stays so."""
        venv = make_venv(tmp_path, {'packages': 'a'})

        def fail(*args, **kwargs):
            raise console.SetupError('no network')

        monkeypatch.setattr(commands, 'run', fail)
        with pytest.raises(console.SetupError, match='no network'):
            steps.Steps(tmp_path, WANTED).do('project')
        assert stamp.read(venv) == {'packages': 'a'}

    def test_done_step_is_recorded(self, tmp_path, monkeypatch):
        """A step that succeeds is recorded with its digest."""
        venv = make_venv(tmp_path, {'packages': 'a'})
        monkeypatch.setattr(commands, 'run', lambda *args, **kwargs: None)
        steps.Steps(tmp_path, WANTED).do('project')
        assert stamp.read(venv) == {'packages': 'a', 'project': 'c'}


class TestMachine:
    """What the machine must have."""

    def test_other_python(self, monkeypatch):
        """Another Python is refused with the version that is tested."""
        monkeypatch.setattr(machine, 'TESTED_PYTHON', (3, 4))
        with pytest.raises(console.SetupError, match=r'PYTHON=python3\.11'):
            machine.check_python()

    def test_no_ensurepip(self, monkeypatch):
        """A Python without ensurepip is refused with the package to add."""
        monkeypatch.setattr(machine, 'TESTED_PYTHON', sys.version_info[:2])
        monkeypatch.setattr(
            machine.importlib.util, 'find_spec', lambda name: None
        )
        with pytest.raises(console.SetupError, match='-venv'):
            machine.check_python()

    def test_no_compiler(self, monkeypatch):
        """Without a compiler the message names the package to install."""
        monkeypatch.setenv('CXX', 'no-such-compiler -O2')
        with pytest.raises(console.SetupError, match=r'g\+\+.*build-essentia'):
            machine.check_compiler()

    def test_no_headers(self, monkeypatch, tmp_path):
        """Without Python's headers the message names their package."""
        monkeypatch.setattr(machine.shutil, 'which', lambda name: name)
        monkeypatch.setattr(
            machine.sysconfig, 'get_path', lambda name: str(tmp_path)
        )
        with pytest.raises(console.SetupError, match='-dev'):
            machine.check_compiler()

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


class TestCommands:
    """Commands that are run, and what is said when they fail."""

    def test_environment_is_clean(self, monkeypatch, tmp_path):
        """What leads pip or Python elsewhere is not passed on."""
        monkeypatch.setenv('PYTHONPATH', '/elsewhere')
        monkeypatch.setenv('PIP_TARGET', '/elsewhere')
        environment = commands.clean_environment(tmp_path)
        assert '/elsewhere' not in environment.values()
        assert environment['PATH'].startswith(f'{tmp_path}/bin{os.pathsep}')

    def test_output_goes_to_the_log(self, tmp_path, capfd):
        """A command prints into the log alone."""
        log = tmp_path / 'log'
        code = 'print("loud")'
        commands.run([sys.executable, '-c', code], log=log, environment={})
        assert log.read_text().endswith('\nloud\n')
        assert capfd.readouterr() == ('', '')

    def test_failure_names_cause_and_log(self, tmp_path):
        """A command that fails is one line: its last error, and the log."""
        log = tmp_path / 'log'
        code = 'print("ERROR: No space left on device\\nbye"); exit(3)'
        with pytest.raises(console.SetupError) as caught:
            commands.run([sys.executable, '-c', code], log=log, environment={})
        assert str(caught.value) == (
            f'No space left on device: free 5 GiB of disk space ({log})'
        )

    def test_unknown_failure(self, tmp_path):
        """A failure that we have no advice for ends in its last line."""
        text = commands.explain('a\nb\n', tmp_path)
        assert text == f'b: look into the log ({tmp_path})'

    def test_children_end_with_us(self, tmp_path):
        """An interruption ends the command and what it has started."""

        def interrupt():
            if (tmp_path / 'pid').exists():
                raise KeyboardInterrupt

        script = f'sleep 60 & echo $! > {tmp_path}/p; mv {tmp_path}/p '
        script += f'{tmp_path}/pid; wait'
        with pytest.raises(KeyboardInterrupt):
            commands.run(
                ['/bin/sh', '-c', script],
                log=tmp_path / 'log',
                environment={'PATH': os.defpath},
                watch=interrupt,
            )
        assert has_ended(int((tmp_path / 'pid').read_text()))


def has_ended(pid):
    """Tells whether a process is gone, or only its record is left."""
    for _ in range(50):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


class TestLock:
    """Two set-ups at once."""

    def test_second_waits_and_says_so(self, tmp_path, capsys):
        """The second of two set-ups waits for the first and says so."""
        order = []

        def second():
            with lock.held(tmp_path / 'lock'):
                order.append('second')

        other = threading.Thread(target=second)
        with lock.held(tmp_path / 'lock'):
            other.start()
            time.sleep(0.2)
            order.append('first')
        other.join(10)
        assert order == ['first', 'second']
        assert 'another set-up is at work' in capsys.readouterr().out

    def test_child_keeps_the_lock(self, tmp_path):
        """A command that outlives a killed set-up still holds the lock."""
        with lock.held(tmp_path / 'lock'):
            child = subprocess.Popen(['sleep', '60'], close_fds=False)
        other = threading.Thread(target=self.take, args=(tmp_path / 'lock',))
        other.start()
        other.join(0.2)
        assert other.is_alive()
        child.kill()
        child.wait()
        other.join(10)
        assert not other.is_alive()

    @staticmethod
    def take(path):
        """Takes the lock and lets it go."""
        with lock.held(path):
            pass


class TestProgress:
    """What is said while mmcv is compiled."""

    @pytest.mark.parametrize(
        ('log', 'expected'),
        [
            ('', ''),
            ('  [3/4] c++ a.o\n', 'mmcv operators: 3 of 4 files'),
            (
                '[1/2] c++ c.o\nx.h:1: warning\n',
                'mmcv operators: 3 of 4 files',
            ),
        ],
        ids=['not started', 'from nothing', 'resumed'],
    )
    def test_text(self, tmp_path, log, expected):
        """Files of an earlier build count as compiled."""
        plan = tmp_path / 'build' / 'temp.linux' / 'build.ninja'
        plan.parent.mkdir(parents=True)
        plan.write_text(
            'rule compile\n' + 'build /a/b.o: compile /a/b.cpp\n' * 4
        )
        (tmp_path / 'log').write_text('[9/9] of an earlier build\n')
        progress = operators.Progress(tmp_path, tmp_path / 'log')
        with open(tmp_path / 'log', 'a') as file:
            file.write(log)
        assert progress.text() == expected


class TestMain:
    """The exit status, and what is printed with it."""

    @pytest.fixture(autouse=True)
    def keep_signals(self):
        """Puts the signal handlers back."""
        numbers = (signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in numbers}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    @pytest.mark.parametrize(
        ('error', 'status', 'text'),
        [
            (console.SetupError('no g++'), 1, 'no g++'),
            (OSError(28, 'No space left'), 1, 'No space left: put that right'),
            (KeyboardInterrupt(), 130, 'the next run goes on from here'),
        ],
    )
    def test_failure(self, monkeypatch, capsys, error, status, text):
        """A failure is one line on the error stream and an exit status."""

        def fail(root):
            raise error

        monkeypatch.setattr(prepare, 'prepare', fail)
        assert prepare.main() == status
        output = capsys.readouterr()
        assert output.out == ''
        assert output.err.startswith('setup: error: ')
        assert text in output.err
        assert output.err.count('\n') == 1

    def test_nothing_to_do(self, tmp_path, monkeypatch, capsys):
        """A run with nothing to do prints nothing and changes nothing."""
        venv = make_venv(tmp_path, prepare.digests(tmp_path))
        before = sorted(venv.rglob('*'))
        monkeypatch.setattr(prepare, 'ROOT', tmp_path)
        assert prepare.main() == 0
        assert capsys.readouterr().out == ''
        assert sorted(venv.rglob('*')) == before
        assert not (tmp_path / '.venv.lock').exists()
