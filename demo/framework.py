"""What the demo asks of mmdet, whichever generation is installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent


class Framework(ABC):
    """A generation of mmdet: its config, its tools and what they write."""

    config: ClassVar[Path]
    work_dir: ClassVar[Path]
    minutes: ClassVar[str]
    metric: ClassVar[str]

    @abstractmethod
    def last_checkpoint(self) -> Path | None:
        """Return the last checkpoint, or None if there is none."""

    @abstractmethod
    def train(self, resume: bool) -> None:
        """Train, or go on from the last checkpoint.

        Args:
            resume: Whether there is one.
        """

    @abstractmethod
    def test(self, weights: str) -> float:
        """Test the last checkpoint.

        Args:
            weights: Which weights: 'ema', 'raw' or the name of an average.

        Returns:
            The mAP.
        """

    @abstractmethod
    def detections(
        self, weights: str, score: float
    ) -> dict[str, npt.NDArray[Any]]:
        """Return what the last test found, above a score.

        Args:
            weights: Which weights were tested.
            score: The lowest score.

        Returns:
            Boxes (N, 5) of left, top, right, bottom and digit, by file name.
        """

    def run_tool(self, name: str, log_name: str, *arguments: object) -> None:
        """Run one of mmdet's own tools; end the demo if that fails.

        Args:
            name: 'train' or 'test'.
            log_name: What its log is called.
            *arguments: More arguments, after the config.
        """
        self.run(_tool(name), log_name, self.config, *arguments)

    def run(self, script: object, log_name: str, *arguments: object) -> None:
        """Run a program of Python; end the demo if that fails.

        Args:
            script: The program, or '-m'.
            log_name: What its log is called.
            *arguments: Its arguments.
        """
        self.work_dir.mkdir(parents=True, exist_ok=True)
        log = self.work_dir / f'{log_name}.log'
        words = [sys.executable, script, *arguments]
        # on a busy machine waiting OpenMP threads cost more than they bring
        environment = {'OMP_NUM_THREADS': '1', **os.environ}
        with log.open('a') as file:
            done = subprocess.run(
                [str(word) for word in words],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
            )
        if done.returncode:
            tail = '\n'.join(log.read_text().splitlines()[-15:])
            sys.exit(f'{tail}\n\n{log_name} failed; the whole log: {log}')

    def test_folder(self, weights: str) -> Path:
        """Return an empty folder for a test.

        Args:
            weights: Which weights are tested.
        """
        folder = self.work_dir / f'test_{weights}'
        shutil.rmtree(folder, ignore_errors=True)
        return folder


def _tool(name: str) -> Path:
    """Return the path of a tool inside the installed mmdet."""
    (package,) = importlib.util.find_spec('mmdet').submodule_search_locations
    return Path(package) / '.mim' / 'tools' / f'{name}.py'
