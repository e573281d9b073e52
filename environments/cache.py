"""The user's cache of compiled wheels, shared by all clones."""

from __future__ import annotations

import os
import platform
import shutil
import zipfile
import zlib
from pathlib import Path

from .console import say


def cache_folder() -> Path:
    """Returns the cache's folder.

    It is ``MMDET_EMA_CACHE`` if that is set, else ``mmdet_ema`` in
    ``XDG_CACHE_HOME``, else in ``~/.cache``.
    """
    own = os.environ.get('MMDET_EMA_CACHE')
    if own:
        return Path(own).expanduser().resolve()
    shared = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    return Path(shared).expanduser().resolve() / 'mmdet_ema'


def key(python: str, torch: str) -> str:
    """Returns what a compiled wheel is good for, as a folder's name.

    Args:
        python (str): The version of Python, such as ``3.11.7``.
        torch (str): What torch it is compiled against, such as ``2.13.0``.
    """
    tag = 'cp{}{}'.format(*python.split('.')[:2])
    return f'{tag}-torch{torch}-{platform.machine()}'


def find(folder: Path, name: str, version: str) -> Path | None:
    """Returns a sound wheel of the cache; removes a broken one and says so.

    Args:
        folder (Path): The folder of one key.
        name (str): The package.
        version (str): Its version.
    """
    stem = name.replace('-', '_')
    for wheel in sorted(folder.glob(f'{stem}-{version}-*.whl')):
        if is_sound(wheel):
            return wheel
        say(f'{wheel} is broken; it is built again')
        wheel.unlink(missing_ok=True)
    return None


def is_sound(wheel: Path) -> bool:
    """Tells whether every file of a wheel has its right checksum.

    Args:
        wheel (Path): The wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
        return False


def store(wheel: Path, folder: Path) -> Path:
    """Copies a wheel into the cache; it shows there whole or not at all.

    Args:
        wheel (Path): The wheel.
        folder (Path): The folder of one key.

    Returns:
        Path: The wheel in the cache.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f'{wheel.name}.{os.getpid()}.part'
    try:
        shutil.copyfile(wheel, temporary)
        os.replace(temporary, folder / wheel.name)
    finally:
        temporary.unlink(missing_ok=True)
    return folder / wheel.name
