"""Tests of the exit status and of what is asked for."""

import signal
import sys

import pytest

from environments import console, interpreter, prepare
from environments.generation import GENERATIONS, MMCV1, MMENGINE
from tests.environments.fakes import DEBIAN, WANTED, make_python, make_venv


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

        def fail(*args):
            raise error

        monkeypatch.setattr(prepare, 'prepare', fail)
        assert prepare.main() == status
        output = capsys.readouterr()
        assert output.out == ''
        assert output.err.startswith('setup: error: ')
        assert text in output.err
        assert output.err.count('\n') == 1

    @pytest.mark.parametrize(
        'generation', GENERATIONS.values(), ids=GENERATIONS
    )
    def test_nothing_to_do(self, tmp_path, monkeypatch, capsys, generation):
        """A run with nothing to do prints nothing and changes nothing."""
        monkeypatch.setenv('PYTHON_MMCV1', sys.executable)
        python = interpreter.find(generation)
        done = prepare.digests(tmp_path, generation, python)
        venv = make_venv(tmp_path, done, generation.venv)
        before = sorted(venv.rglob('*'))
        monkeypatch.setattr(prepare, 'ROOT', tmp_path)
        assert prepare.main(generation.name) == 0
        assert capsys.readouterr().out == ''
        assert sorted(venv.rglob('*')) == before
        assert [venv] == list(tmp_path.iterdir())

    def test_other_torch_of_the_system(self, tmp_path):
        """Another torch of the system makes every step be done again."""
        old = prepare.digests(tmp_path, MMCV1, make_python())
        packages = {**DEBIAN, 'torch': ('1.13.1', '/torch')}
        python = make_python(packages=packages)
        new = prepare.digests(tmp_path, MMCV1, python)
        assert all(old[name] != new[name] for name in WANTED)

    @pytest.mark.parametrize(
        ('words', 'expected'),
        [
            ([], (MMENGINE, [])),
            (['mmdet3d'], (MMENGINE, ['mmdet3d'])),
            (['mmengine', 'mmdet3d'], (MMENGINE, ['mmdet3d'])),
            (['mmcv1'], (MMCV1, [])),
        ],
    )
    def test_chosen(self, words, expected):
        """The first word may be a generation, the others are extra steps."""
        assert prepare.chosen(*words) == expected

    @pytest.mark.parametrize('words', [['mmdet4d'], ['mmcv1', 'mmdet3d']])
    def test_unknown_word(self, words, capsys):
        """A step that a generation does not have is refused by name."""
        assert prepare.main(*words) == 1
        assert f'no extra step {words[-1]!r}' in capsys.readouterr().err
