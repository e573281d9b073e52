"""What a Python says about itself.

Run as a file by the Python in question, so it imports nothing of ours; that
Python may be an old one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import sysconfig
from typing import Any


def facts(*packages: str) -> dict[str, Any]:
    """Returns what the set-up wants to know about the running Python.

    Args:
        *packages (str): Installed packages to look for.

    Returns:
        dict[str, Any]: The fields of ``interpreter.Interpreter``.
    """
    found = {name: _package(name) for name in packages}
    return {
        # The running Python may be the one of an environment to be removed.
        'executable': getattr(sys, '_base_executable', sys.executable),
        'version': '.'.join(map(str, sys.version_info[:3])),
        'headers': sysconfig.get_path('include'),
        'ensurepip': importlib.util.find_spec('ensurepip') is not None,
        'packages': {k: v for k, v in found.items() if v},
        'system': _system(),
    }


def _package(name: str) -> tuple[str, str] | None:
    """Returns version and folder of a package, without importing it."""
    from importlib import metadata

    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin:
        return None
    try:
        return metadata.version(name), os.path.dirname(spec.origin)
    except metadata.PackageNotFoundError:
        return None


def _system() -> str:
    """Returns the system's name, such as ``debian12``; '' if unknown."""
    try:
        release = platform.freedesktop_os_release()
    except (AttributeError, OSError):
        return ''
    return release['ID'] + release.get('VERSION_ID', '')


if __name__ == '__main__':
    print(json.dumps(facts(*sys.argv[1:])))
