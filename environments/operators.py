"""Compiles mmcv, or mmcv-full, with its operators, once for all clones.

mmcv is unpacked into the cache and built there in its own folder, so that the
object files and ninja's log outlive a build that was stopped: the next one
goes on from there.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from . import cache, commands, machine, pins
from .console import SetupError, say
from .generation import Generation
from .interpreter import Interpreter
from .lock import held

BUILD_GIBIBYTES = 1.0
SECONDS_BETWEEN_LINES = 60.0
# One file brings up to 30 kB of warnings.
TAIL_BYTES = 2**18
STATUS = re.compile(r'\[(\d+)/(\d+)\] ')
OBJECT = re.compile(r'^build \S+\.o: compile ', re.MULTILINE)


class Operators:
    """mmcv's wheel: found in the cache, or compiled into it.

    Args:
        generation (Generation): Which mmcv.
        python (Interpreter): The Python that it is for.
        venv (Path): The environment that compiles; it sees torch.
        log (Path): The file for what the compiler says.
    """

    def __init__(
        self,
        generation: Generation,
        python: Interpreter,
        venv: Path,
        log: Path,
    ) -> None:
        self._generation, self._python = generation, python
        self._venv, self._log = venv, log
        self._name = generation.compiled
        self._version = generation.compiled_version()
        self._key = cache.key(python.version, _torch(generation, python))
        self._wheels = cache.cache_folder() / 'wheels' / self._key
        self._build = cache.cache_folder() / 'build' / self._key

    def check(self) -> None:
        """Refuses, early, a machine on which the build could only fail.

        Raises:
            SetupError: If a compiler or disk space is missing.
        """
        if self._find() is None:
            machine.check_compiler(self._python)
            machine.check_disk(self._build, BUILD_GIBIBYTES)

    def wheel(self) -> Path:
        """Returns the wheel; compiles it where the cache has none.

        Raises:
            SetupError: If the build fails.
        """
        with held(self._build.with_name(f'{self._key}.lock')):
            return self._find() or self._compile()

    def _find(self) -> Path | None:
        return cache.find(self._wheels, self._name, self._version)

    def _compile(self) -> Path:
        source = self._source()
        jobs = machine.compile_jobs()
        say(
            f'compiling {self._name} {self._version}, once: '
            f'{self._generation.sources} files, {jobs} at a time; '
            f'{self._generation.pace}'
        )
        with Progress(source, self._log) as progress:
            self._pip(
                ['wheel', '-v', '-w', self._build / 'wheels', '.'],
                folder=source,
                jobs=jobs,
                watch=progress.show,
            )
        return self._keep()

    def _keep(self) -> Path:
        folder = self._build / 'wheels'
        built = cache.find(folder, self._name, self._version)
        if built is None:
            raise SetupError(f'no wheel came out of the build ({self._log})')
        kept = cache.store(built, self._wheels)
        shutil.rmtree(self._build)
        say(f'kept {kept}')
        return kept

    def _source(self) -> Path:
        source = self._build / f'{self._name}-{self._version}'
        if not source.exists():
            self._unpack(self._download(), source)
        return source

    def _download(self) -> Path:
        folder = self._build / 'download'
        package = f'{self._name}=={self._version}'
        self._pip(['download', '--no-binary=:all:', '-d', folder, package])
        return folder / f'{self._name}-{self._version}.tar.gz'

    def _unpack(self, archive: Path, source: Path) -> None:
        temporary = self._build / 'unpacked'
        shutil.rmtree(temporary, ignore_errors=True)
        with tarfile.open(archive) as tar:
            # Python 3.11.4 and newer refuse paths that lead out of the folder.
            if hasattr(tarfile, 'data_filter'):
                tar.extraction_filter = tarfile.data_filter
            tar.extractall(temporary)
        os.replace(temporary / source.name, source)
        temporary.rmdir()

    def _pip(
        self,
        arguments: list[str | Path],
        *,
        folder: Path | None = None,
        jobs: int = 1,
        watch: Callable[[], None] | None = None,
    ) -> None:
        verb, *rest = arguments
        commands.run(
            [
                *(self._venv / 'bin' / 'python', '-m', 'pip', verb),
                *('--no-deps', '--no-build-isolation', '--use-pep517'),
                *rest,
            ],
            log=self._log,
            environment=self._environment(jobs),
            folder=folder,
            watch=watch,
        )

    def _environment(self, jobs: int) -> dict[str, str]:
        # Operators for the CPU alone: it is what tests and demo run on, and
        # it is the same wheel whatever GPU the machine has.
        return {
            **commands.clean_environment(self._venv),
            'CUDA_VISIBLE_DEVICES': '',
            'FORCE_CUDA': '0',
            'MAX_JOBS': str(jobs),
            'MMCV_WITH_OPS': '1',
            'NINJA_STATUS': '[%f/%t] ',
        }


def _torch(generation: Generation, python: Interpreter) -> str:
    if 'torch' in generation.system_packages:
        # It fits that system's libraries alone.
        return f'{python.package_version("torch")}-{python.system}'
    return pins.pinned(generation.file('build'), 'torch')


class Progress:
    """Says how many files are compiled, from what ninja writes into the log.

    A context manager: at its end the line that is rewritten is ended.

    Args:
        source (Path): mmcv's folder.
        log (Path): The log, to whose end ninja's output will go.
    """

    def __init__(self, source: Path, log: Path) -> None:
        self._source, self._log = source, log
        self._start = log.stat().st_size if log.exists() else 0
        self._shown, self._last_line = '', -SECONDS_BETWEEN_LINES

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown and sys.stdout.isatty():
            print(flush=True)

    def show(self) -> None:
        """Rewrites the line on a terminal; else prints one a minute."""
        text = self.text()
        if not text or text == self._shown:
            return
        now = time.monotonic()
        if sys.stdout.isatty():
            print(f'\rsetup: {text}', end='', flush=True)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            say(text)
            self._last_line = now
        self._shown = text

    def text(self) -> str:
        """Returns a line such as ``mmcv operators: 23 of 77 files``."""
        status = STATUS.findall(self._tail())
        total = self._total()
        if not status or not total:
            return ''
        # ninja counts only what it still has to do.
        left = int(status[-1][1]) - int(status[-1][0])
        return f'mmcv operators: {total - left} of {total} files'

    def _tail(self) -> str:
        with open(self._log, 'rb') as source:
            end = source.seek(0, os.SEEK_END)
            source.seek(max(self._start, end - TAIL_BYTES))
            return source.read().decode(errors='replace')

    def _total(self) -> int:
        for plan in self._source.glob('build/temp*/build.ninja'):
            return len(OBJECT.findall(plan.read_text(errors='replace')))
        return 0
