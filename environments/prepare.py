"""Makes ``.venv``: pinned packages, mmcv's operators and the project itself.

Run from the repository's root as ``python3.11 -m environments.prepare``, or as
``make setup``. A step that is done is not done again; a run that was stopped
is taken up where it stopped. ``python3.11 -m environments.prepare mmdet3d``
does an extra step as well.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType

from . import pins, stamp
from .console import SetupError, complain

ROOT = pins.FOLDER.parent
PROJECT_FILES = ('pyproject.toml', 'setup.cfg', 'setup.py')
# Done where they are asked for; mmdet3d goes on top of a certain mmdet.
EXTRAS = {'mmdet3d': [pins.OPENMMLAB, pins.MMDET3D]}


def main(*extras: str) -> int:
    """Does what is not done yet.

    Args:
        *extras (str): Names of extra steps to do as well.

    Returns:
        int: The exit status: 0, 1 for a failure, 130 for an interruption.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        # What nohup ignores stays ignored.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        prepare(ROOT, *extras)
    except SetupError as error:
        complain(str(error))
        return 1
    except OSError as error:
        complain(f'{error}: put that right and run again')
        return 1
    except KeyboardInterrupt:
        complain('interrupted; the next run goes on from here')
        return 130
    return 0


def prepare(root: Path, *extras: str) -> None:
    """Brings ``root/.venv`` up to date.

    Args:
        root (Path): The repository's root.
        *extras (str): Names of extra steps to do as well.

    Raises:
        SetupError: If it cannot be done.
    """
    wanted = digests(root, *extras)
    if not stamp.pending(root / '.venv', wanted):
        return
    # Imported here, so that a run with nothing to do takes no time.
    from .lock import held
    from .steps import Steps

    with held(root / '.venv.lock'):
        steps = Steps(root, wanted)
        for name in stamp.pending(root / '.venv', wanted):
            steps.do(name)


def digests(root: Path, *extras: str) -> dict[str, str]:
    """Returns the digest of every step, in the order in which they are done.

    Args:
        root (Path): The repository's root. It counts, as an environment
            cannot be moved.
        *extras (str): Names of extra steps; they come last.

    Raises:
        SetupError: If there is no such extra step.
    """
    for name in extras:
        if name not in EXTRAS:
            raise SetupError(
                f'there is no extra step {name!r}, only {", ".join(EXTRAS)}'
            )
    files = {
        'packages': [pins.BUILD, pins.RUNTIME, pins.TOOLS],
        'openmmlab': [pins.OPENMMLAB],
        'project': [root / name for name in PROJECT_FILES],
        **{name: EXTRAS[name] for name in extras},
    }
    return {k: pins.digest(v, str(root)) for k, v in files.items()}


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
