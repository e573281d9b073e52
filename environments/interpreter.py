"""The Python that an environment is made with."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import facts
from .console import SetupError
from .generation import Generation

SECONDS_TO_ANSWER = 60


@dataclass(frozen=True)
class Interpreter:
    """What a Python said about itself.

    Attributes:
        executable (str): Its path.
        version (str): Such as ``3.11.7``.
        headers (str): The folder in which Python.h should be.
        ensurepip (bool): Whether it can make virtual environments.
        packages (dict): Version and folder of each package that was asked for
            and is installed.
        system (str): The system, such as ``debian12``.
    """

    executable: str
    version: str
    headers: str
    ensurepip: bool
    packages: dict[str, tuple[str, str]]
    system: str

    def package_version(self, name: str) -> str:
        """Returns the version of a package, '' where it is not installed."""
        return self.packages.get(name, ('', ''))[0]


def find(generation: Generation) -> Interpreter:
    """Returns the Python that a generation's environment is made with.

    Args:
        generation (Generation): Names it; else it is the running one.

    Raises:
        SetupError: If there is no such Python.
    """
    names = generation.system_packages
    if generation.python is None:
        return Interpreter(**facts.facts(*names))
    path = os.environ.get(generation.variable) or generation.python
    try:
        return Interpreter(**_ask(path, *names))
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        raise SetupError(
            f'{path} is no Python 3.11 ({generation.variable} names another '
            f'one): {generation.advice}'
        ) from None


def _ask(path: str, *names: str) -> Any:
    answer = subprocess.run(
        [path, '-I', str(Path(facts.__file__).resolve()), *names],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=SECONDS_TO_ANSWER,
    )
    return json.loads(answer.stdout)
