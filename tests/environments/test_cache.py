"""Tests of the cache of wheels, and of where operators come from."""

from pathlib import Path

import pytest

from environments import cache, operators
from environments.generation import GENERATIONS, MMCV1, MMENGINE
from tests.environments.fakes import WHEEL, make_python, make_wheel


class TestCache:
    """The user's cache of wheels."""

    def test_key(self, monkeypatch):
        """The key names Python, torch and the kind of machine."""
        monkeypatch.setattr(cache.platform, 'machine', lambda: 'aarch64')
        key = cache.key('3.11.7', '2.13.0')
        assert key == 'cp311-torch2.13.0-aarch64'

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

    def test_dash_in_a_name(self, tmp_path):
        """A wheel's file name has an underscore for a dash."""
        wheel = make_wheel(tmp_path)
        full = wheel.rename(tmp_path / WHEEL.replace('mmcv', 'mmcv_full'))
        assert cache.find(tmp_path, 'mmcv-full', '2.1.0') == full
        assert cache.find(tmp_path, 'mmcv', '2.1.0') is None

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


class TestOperators:
    """Where compiled wheels are looked for."""

    @pytest.mark.parametrize(
        ('generation', 'key', 'wheel'),
        [
            (MMENGINE, 'cp311-torch2.13.0-m', 'mmcv-2.1.0-x.whl'),
            (
                MMCV1,
                'cp311-torch1.13.0a0+x-debian12-m',
                'mmcv_full-1.7.2-x.whl',
            ),
        ],
        ids=GENERATIONS,
    )
    def test_cached_wheel_is_taken(
        self, tmp_path, monkeypatch, generation, key, wheel
    ):
        """A wheel for this Python and this torch is taken, with no build."""
        monkeypatch.setenv('MMDET_EMA_CACHE', str(tmp_path))
        monkeypatch.setattr(cache.platform, 'machine', lambda: 'm')
        cached = tmp_path / 'wheels' / key / wheel
        make_wheel(cached.parent).rename(cached)
        log = tmp_path / 'log'
        found = operators.Operators(generation, make_python(), tmp_path, log)
        assert found.wheel() == cached


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
