"""The steps of the set-up, each recorded when it is done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from . import commands, machine, stamp
from .console import SetupError, step
from .generation import Generation
from .interpreter import Interpreter
from .operators import Operators


class Steps:
    """The steps that make the environment of one generation.

    Args:
        root (Path): The repository's root.
        generation (Generation): What to make.
        python (Interpreter): The Python that it is made with.
        wanted (dict[str, str]): The digest of every step.
    """

    def __init__(
        self,
        root: Path,
        generation: Generation,
        python: Interpreter,
        wanted: dict[str, str],
    ) -> None:
        self._root, self._wanted = root, wanted
        self._generation, self._base = generation, python
        self._venv = root / generation.venv
        self._log = self._venv / 'setup.log'
        self._operators = Operators(generation, python, self._venv, self._log)

    def do(self, name: str) -> None:
        """Does one step and records it.

        Args:
            name (str): ``packages``, ``openmmlab``, ``project`` or an
                extra one, such as ``mmdet3d``.
        """
        if name in self._generation.extras:
            self._extra(name)
        else:
            {
                'packages': self._packages,
                'openmmlab': self._openmmlab,
                'project': self._project,
            }[name]()
        done = {**stamp.read(self._venv), name: self._wanted[name]}
        stamp.write(self._venv, done)

    def _packages(self) -> None:
        machine.check_python(self._base, self._generation)
        self._refuse_foreign()
        machine.check_disk(self._root, self._generation.gibibytes)
        self._operators.check()
        with step(f'new environment {self._venv}'):
            self._remake()
        with step('tools and other pinned packages'):
            files = self._generation.package_files()
            self._install(*(word for file in files for word in ('-r', file)))

    def _openmmlab(self) -> None:
        self._operators.check()
        wheel = self._operators.wheel()
        with step(f'{self._generation.compiled}, mmdet and mmengine'):
            # Else pip keeps an installed mmcv of the same version.
            force = ('--no-deps', '--force-reinstall')
            self._install(*force, wheel, '-r', self._file('openmmlab'))
        with step('trying the imports'):
            self._try_imports(wheel)

    def _try_imports(self, wheel: Path) -> None:
        try:
            self._python('-c', f'import {self._generation.imports}')
        except SetupError as error:
            raise SetupError(
                f'{error}; if mmcv is at fault, delete {wheel} and run again'
            ) from error

    def _project(self) -> None:
        with step('mmdet_ema itself, editable'):
            self._install(
                *('--no-deps', '--no-build-isolation', '--use-pep517'),
                *('-e', self._root),
            )

    def _extra(self, name: str) -> None:
        with step(f'{name} and what it imports'):
            self._install('--no-deps', '-r', self._file(name))
        with step('trying its imports'):
            self._python('-c', f'import {self._generation.extras[name]}')

    def _file(self, name: str) -> Path:
        return self._generation.file(name)

    def _refuse_foreign(self) -> None:
        if stamp.is_foreign(self._venv):
            raise SetupError(
                f'{self._venv} was not made by this set-up: move or delete it '
                'and run again'
            )

    def _remake(self) -> None:
        old = self._venv.with_name(f'{self._venv.name}-old')
        shutil.rmtree(old, ignore_errors=True)
        # Moved first: a removal that is stopped leaves no half environment.
        if self._venv.exists():
            os.replace(self._venv, old)
            shutil.rmtree(old)
        self._venv.mkdir()
        stamp.write(self._venv, {})
        self._make()

    def _make(self) -> None:
        system = ['--system-site-packages']
        options = system if self._generation.system_packages else []
        commands.run(
            [self._base.executable, '-I', '-m', 'venv', *options, self._venv],
            log=self._log,
            environment=commands.clean_environment(self._venv),
        )

    def _install(self, *arguments: str | Path) -> None:
        self._python('-m', 'pip', 'install', '--progress-bar=off', *arguments)

    def _python(self, *arguments: str | Path) -> None:
        commands.run(
            [self._venv / 'bin' / 'python', *arguments],
            log=self._log,
            environment=commands.clean_environment(self._venv),
            folder=self._venv,
        )
