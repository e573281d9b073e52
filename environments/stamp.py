"""The record of which set-up steps are done, kept in the environment."""

from __future__ import annotations

import json
import os
from pathlib import Path

NAME = 'mmdet_ema_setup.json'


def read(venv: Path) -> dict[str, str]:
    """Returns the digest of every step that is done.

    Args:
        venv (Path): The virtual environment. None, or one whose record is
            broken, counts as nothing done.
    """
    try:
        record = json.loads((venv / NAME).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write(venv: Path, digests: dict[str, str]) -> None:
    """Replaces the record in one move.

    Args:
        venv (Path): The virtual environment.
        digests (dict[str, str]): The digest of every step that is done.
    """
    temporary = venv / f'{NAME}.{os.getpid()}'
    temporary.write_text(json.dumps(digests, indent=2), encoding='utf-8')
    os.replace(temporary, venv / NAME)


def pending(venv: Path, wanted: dict[str, str]) -> list[str]:
    """Returns the steps still to do: the first that differs and all after it.

    Args:
        venv (Path): The virtual environment.
        wanted (dict[str, str]): The digest of every step, in their order.
    """
    steps = list(wanted)
    if not os.access(venv / 'bin' / 'python', os.X_OK):
        return steps
    done = read(venv)
    for place, name in enumerate(steps):
        if done.get(name) != wanted[name]:
            return steps[place:]
    return []


def is_foreign(venv: Path) -> bool:
    """Tells whether an environment is there that this set-up did not make.

    Args:
        venv (Path): The virtual environment.
    """
    return (venv / 'pyvenv.cfg').exists() and not (venv / NAME).exists()
