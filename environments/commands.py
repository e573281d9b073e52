"""Runs the commands of the set-up: quiet, logged, ended with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .console import SetupError

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_END = 10.0
# They would make pip install elsewhere, or Python import from elsewhere.
UNWANTED = (
    'PIP_PREFIX',
    'PIP_ROOT',
    'PIP_TARGET',
    'PIP_USER',
    'PYTHONHOME',
    'PYTHONPATH',
    'PYTHONSTARTUP',
)
ADVICE = {
    'No space left on device': 'free 5 GiB of disk space',
    'No matching distribution found': (
        'look at the network and at the package index that pip is set to'
    ),
    'Temporary failure in name resolution': 'look at the network',
    'Could not fetch URL': 'look at the network',
    'Killed signal terminated program': 'free memory, or set MAX_JOBS=1',
}


def clean_environment(venv: Path) -> dict[str, str]:
    """Returns the environment for commands that work on ``venv`` alone.

    Args:
        venv (Path): The virtual environment; its programs come first on PATH.
    """
    environment = {k: v for k, v in os.environ.items() if k not in UNWANTED}
    path = os.environ.get('PATH', os.defpath)
    environment.update(
        PATH=f'{venv / "bin"}{os.pathsep}{path}',
        PIP_DISABLE_PIP_VERSION_CHECK='1',
        PIP_NO_INPUT='1',
        PYTHONNOUSERSITE='1',
        PYTHONUNBUFFERED='1',
        VIRTUAL_ENV=str(venv),
    )
    return environment


def run(
    command: Sequence[str | Path],
    *,
    log: Path,
    environment: Mapping[str, str],
    folder: Path | None = None,
    watch: Callable[[], None] | None = None,
) -> None:
    """Runs a command with its output in a log file.

    Args:
        command (Sequence[str | Path]): The program and its arguments.
        log (Path): The file to which the output is appended.
        environment (Mapping[str, str]): The whole environment.
        folder (Path, optional): Where it runs. Defaults to where we are.
        watch (Callable, optional): Called every second while it runs.

    Raises:
        SetupError: If it fails. The message names the log.
    """
    with open(log, 'ab') as sink:
        sink.write(f'\n$ {" ".join(map(str, command))}\n'.encode())
        sink.flush()
        start = sink.tell()
        # close_fds: the lock's descriptor goes on to the child. A session of
        # its own lets us end the command with all that it started.
        child = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            close_fds=False,
            start_new_session=True,
        )
        status = _wait(child, watch)
    if status:
        raise SetupError(explain(_output(log, start), log))


def explain(output: str, log: Path) -> str:
    """Returns one line about a command that failed.

    Args:
        output (str): What it printed.
        log (Path): Where the whole output is.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    advice = [text for sign, text in ADVICE.items() if sign in output]
    errors = [line for line in lines if 'error:' in line.lower()]
    cause = (errors or lines or ['it printed nothing'])[-1]
    cause = cause.removeprefix('ERROR: ')
    return f'{cause[:200]}: {(advice or ["look into the log"])[0]} ({log})'


def _output(log: Path, start: int) -> str:
    with open(log, 'rb') as source:
        source.seek(start)
        return source.read().decode(errors='replace')


def _wait(
    child: subprocess.Popen[bytes], watch: Callable[[], None] | None
) -> int:
    try:
        while True:
            try:
                return child.wait(SECONDS_BETWEEN_LOOKS)
            except subprocess.TimeoutExpired:
                if watch:
                    watch()
    except BaseException:
        _end(child)
        raise


def _end(child: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(SECONDS_TO_END)
            return
