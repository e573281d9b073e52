"""The requirement files, and digests that tell when they changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# To be raised when the steps of the set-up change.
RECIPE = 1


def pinned(file: Path, package: str) -> str:
    """Returns the version that a requirement file pins.

    Args:
        file (Path): A requirement file of ``name==version`` lines.
        package (str): The name, as it is written in the file.

    Raises:
        ValueError: If the file does not pin the package.
    """
    for line in file.read_text(encoding='utf-8').splitlines():
        name, _, version = line.strip().partition('==')
        if name == package and version:
            return version
    raise ValueError(f'{file} has no line "{package}==VERSION"')


def digest(python: str, files: Iterable[Path], *more: str) -> str:
    """Returns a hash of the recipe, the Python version and the files.

    Args:
        python (str): The version of Python, such as ``3.11.7``.
        files (Iterable[Path]): Their names and contents count; a file that is
            not there counts as an empty one.
        *more (str): Other texts that count.
    """
    total = hashlib.sha256(f'{RECIPE} {python}'.encode())
    for file in files:
        content = file.read_bytes() if file.is_file() else b''
        total.update(f'\0{file.name}\0{len(content)}\0'.encode() + content)
    for text in more:
        total.update(f'\0{text}'.encode())
    return total.hexdigest()
