"""Makes ``.venv``: pinned packages, mmcv's operators and the project itself.

Run from the repository's root as ``python3.11 -m environments.prepare``, or as
``make setup``. A step that is done is not done again; a run that was stopped
is taken up where it stopped. ``python3.11 -m environments.prepare mmdet3d``
does an extra step as well, ``python3.11 -m environments.prepare mmcv1`` makes
``.venv-mmcv1`` instead, for mmcv 1.x.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from . import interpreter, pins, stamp
from .console import SetupError, complain
from .generation import GENERATIONS, MMENGINE, Generation
from .interpreter import Interpreter

ROOT = pins.FOLDER.parent
PROJECT_FILES = (
    'pyproject.toml',
    'setup.cfg',
    'setup.py',
)
# what setup.py compiles
SOURCES = 'mmdet_ema/core/native/*.c'


def main(*words: str) -> int:
    """Does what is not done yet.

    Args:
        *words (str): The generation, if it is not the default one, and names
            of extra steps to do as well.

    Returns:
        int: The exit status: 0, 1 for a failure, 130 for an interruption.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        # What nohup ignores stays ignored.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        prepare(ROOT, *chosen(*words))
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


def chosen(*words: str) -> tuple[Generation, list[str]]:
    """Returns what the command line asks for: a generation and extra steps.

    Args:
        *words (str): The command line.

    Raises:
        SetupError: If the generation has no such extra step.
    """
    named = words and words[0] in GENERATIONS
    generation = GENERATIONS[words[0]] if named else MMENGINE
    extras = list(words[1:] if named else words)
    known = ', '.join(generation.extras) or 'none'
    for name in extras:
        if name not in generation.extras:
            raise SetupError(
                f'{generation.name} has no extra step {name!r} (there is: '
                f'{known}), and the generations are {", ".join(GENERATIONS)}'
            )
    return generation, extras


def prepare(
    root: Path, generation: Generation, extras: Sequence[str] = ()
) -> None:
    """Brings the environment of a generation up to date.

    Args:
        root (Path): The repository's root.
        generation (Generation): What to make.
        extras (Sequence[str]): Names of extra steps to do as well.

    Raises:
        SetupError: If it cannot be done.
    """
    venv = root / generation.venv
    python = interpreter.find(generation)
    wanted = digests(root, generation, python, extras)
    if not stamp.pending(venv, wanted):
        return
    # Imported here, so that a run with nothing to do takes no time.
    from .lock import held
    from .steps import Steps

    with held(root / f'{generation.venv}.lock'):
        steps = Steps(root, generation, python, wanted)
        for name in stamp.pending(venv, wanted):
            steps.do(name)


def digests(
    root: Path,
    generation: Generation,
    python: Interpreter,
    extras: Sequence[str] = (),
) -> dict[str, str]:
    """Returns the digest of every step, in the order in which they are done.

    Args:
        root (Path): The repository's root. It counts, as an environment
            cannot be moved.
        generation (Generation): What to make.
        python (Interpreter): The Python that it is made with.
        extras (Sequence[str]): Names of extra steps; they come last.
    """
    openmmlab = generation.file('openmmlab')
    files = {
        'packages': generation.package_files(),
        'openmmlab': [openmmlab],
        'project': [
            *(root / name for name in PROJECT_FILES),
            *sorted(root.glob(SOURCES)),
        ],
        # They go on top of certain versions of OpenMMLab's packages.
        **{name: [openmmlab, generation.file(name)] for name in extras},
    }
    system = [
        f'{name} {python.package_version(name)}'
        for name in generation.system_packages
    ]
    return {
        name: pins.digest(python.version, found, str(root), *system)
        for name, found in files.items()
    }


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
