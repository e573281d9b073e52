"""The steps of the set-up, each recorded when it is done."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from . import commands, machine, pins, stamp
from .console import SetupError, step
from .operators import Operators

VENV_GIBIBYTES = 3.0


class Steps:
    """The steps that make ``root/.venv``.

    Args:
        root (Path): The repository's root.
        wanted (dict[str, str]): The digest of every step.
    """

    def __init__(self, root: Path, wanted: dict[str, str]) -> None:
        self._root, self._wanted = root, wanted
        self._venv = root / '.venv'
        self._log = self._venv / 'setup.log'
        self._operators = Operators(self._venv, self._log)

    def do(self, name: str) -> None:
        """Does one step and records it.

        Args:
            name (str): ``packages``, ``openmmlab``, ``project`` or an
                extra one: ``mmdet3d``.
        """
        {
            'packages': self._packages,
            'openmmlab': self._openmmlab,
            'project': self._project,
            'mmdet3d': self._mmdet3d,
        }[name]()
        done = {**stamp.read(self._venv), name: self._wanted[name]}
        stamp.write(self._venv, done)

    def _packages(self) -> None:
        machine.check_python()
        self._refuse_foreign()
        machine.check_disk(self._root, VENV_GIBIBYTES)
        self._operators.check()
        with step(f'new environment {self._venv}'):
            self._remake()
        with step('torch, tools and other pinned packages'):
            self._install(
                *('-r', pins.BUILD, '-r', pins.RUNTIME, '-r', pins.TOOLS)
            )

    def _openmmlab(self) -> None:
        self._operators.check()
        wheel = self._operators.wheel()
        with step('mmcv, mmdet and mmengine'):
            # Else pip keeps an installed mmcv of the same version.
            force = ('--no-deps', '--force-reinstall')
            self._install(*force, wheel, '-r', pins.OPENMMLAB)
        with step('trying the imports'):
            self._try_imports(wheel)

    def _try_imports(self, wheel: Path) -> None:
        try:
            self._python('-c', 'import mmcv.ops, mmdet')
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

    def _mmdet3d(self) -> None:
        with step('mmdet3d and what it imports'):
            self._install('--no-deps', '-r', pins.MMDET3D)
        with step('trying its imports'):
            # Not mmdet3d alone: that imports next to nothing.
            self._python('-c', 'import mmdet3d.apis, mmdet3d.evaluation')

    def _refuse_foreign(self) -> None:
        if stamp.is_foreign(self._venv):
            raise SetupError(
                f'{self._venv} was not made by this set-up: move or delete it '
                'and run again'
            )

    def _remake(self) -> None:
        old = self._venv.with_name('.venv-old')
        shutil.rmtree(old, ignore_errors=True)
        # Moved first: a removal that is stopped leaves no half environment.
        if self._venv.exists():
            os.replace(self._venv, old)
            shutil.rmtree(old)
        self._venv.mkdir()
        stamp.write(self._venv, {})
        self._make()

    def _make(self) -> None:
        # The running Python may be the one of the environment just removed.
        python = getattr(sys, '_base_executable', sys.executable)
        commands.run(
            [python, '-I', '-m', 'venv', self._venv],
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
