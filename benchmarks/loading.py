"""Find the peers' packages, and load one file of a package alone."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).with_name('.peers')
"""Where ``make bench`` installs the peers of ``peers.txt``."""


class NotInstalledError(ImportError):
    """A peer's package cannot be imported."""


def find_peers() -> None:
    """Make the peers in their folder importable, behind all others."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


def load(name: str) -> ModuleType:
    """Import a module.

    Raises:
        NotInstalledError: If it, or what it needs, is missing.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalledError(str(error)) from error


def load_file(package: str, path: str) -> ModuleType:
    """Run one file of a package without the package's other modules.

    timm's models need torchvision, mmdet's need compiled operators; their
    averages need neither.

    Args:
        package: Name of the package.
        path: The file, relative to the package's folder.

    Returns:
        The module.

    Raises:
        NotInstalledError: If it, or what it needs, is missing.
    """
    name = '.'.join([package, *Path(path).with_suffix('').parts])
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise NotInstalledError(f'no package {package}')
    file = Path(found.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise NotInstalledError(str(error)) from error
    sys.modules[name] = module
    return module
