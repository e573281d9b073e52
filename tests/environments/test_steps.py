"""Tests of the steps, of the commands that they run and of the lock."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from environments import commands, console, lock, machine, stamp, steps
from environments.generation import GENERATIONS, MMCV1, MMENGINE
from tests.environments.fakes import WANTED, make_python, make_steps, make_venv


class TestSteps:
    """The steps and their record."""

    def test_foreign_environment_is_left_alone(self, tmp_path):
        """An environment that somebody else made is refused, not removed."""
        venv = make_venv(tmp_path, {})
        (venv / stamp.NAME).unlink()
        with pytest.raises(console.SetupError, match='move or delete it'):
            make_steps(tmp_path).do('packages')
        assert (venv / 'pyvenv.cfg').exists()

    def test_failed_step_is_not_recorded(self, tmp_path, monkeypatch):
        """A step that fails is not recorded, a step before it stays so."""
        venv = make_venv(tmp_path, {'packages': 'a'})

        def fail(*args, **kwargs):
            raise console.SetupError('no network')

        monkeypatch.setattr(commands, 'run', fail)
        with pytest.raises(console.SetupError, match='no network'):
            make_steps(tmp_path).do('project')
        assert stamp.read(venv) == {'packages': 'a'}

    def test_done_step_is_recorded(self, tmp_path, monkeypatch):
        """A step that succeeds is recorded with its digest."""
        venv = make_venv(tmp_path, {'packages': 'a'})
        monkeypatch.setattr(commands, 'run', lambda *args, **kwargs: None)
        make_steps(tmp_path).do('project')
        assert stamp.read(venv) == {'packages': 'a', 'project': 'c'}

    def test_each_extra_step_ends_in_its_imports(self, tmp_path, monkeypatch):
        """An extra step installs its file and tries what it is for."""
        make_venv(tmp_path, WANTED)
        commands_run = self.record(monkeypatch)
        wanted = {**WANTED, 'mmdet3d': 'd'}
        steps.Steps(tmp_path, MMENGINE, make_python(), wanted).do('mmdet3d')
        install, attempt = commands_run
        assert install[-1] == MMENGINE.file('mmdet3d')
        assert attempt[-1] == 'import mmdet3d.apis, mmdet3d.evaluation'
        assert stamp.read(tmp_path / '.venv') == wanted

    @pytest.mark.parametrize(
        ('generation', 'expected'),
        [
            (MMENGINE, ['.venv']),
            (MMCV1, ['--system-site-packages', '.venv-mmcv1']),
        ],
        ids=GENERATIONS,
    )
    def test_only_mmcv1_sees_the_packages_of_the_system(
        self, tmp_path, monkeypatch, generation, expected
    ):
        """Only the environment of mmcv 1.x sees the torch of the system."""
        monkeypatch.setattr(machine, 'check_compiler', lambda python: None)
        make, install = self.packages(tmp_path, monkeypatch, generation)
        assert make[:4] == ['/usr/bin/python3', '-I', '-m', 'venv']
        assert [Path(word).name for word in make[4:]] == expected
        files = [word for word in install if str(word).endswith('.txt')]
        assert files == generation.package_files()

    def packages(self, root, monkeypatch, generation):
        """Returns the commands of the first step."""
        commands_run = self.record(monkeypatch)
        monkeypatch.setenv('MMDET_EMA_CACHE', str(root / 'cache'))
        make_steps(root, generation).do('packages')
        return commands_run

    @staticmethod
    def record(monkeypatch):
        """Runs no command; returns the list into which they go."""
        found = []
        monkeypatch.setattr(commands, 'run', lambda x, **kw: found.append(x))
        return found


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
