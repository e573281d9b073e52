"""What a set-up leaves, and a Python, made up for its tests."""

import sys
import zipfile

from environments import interpreter, stamp, steps
from environments.generation import MMENGINE

WHEEL = 'mmcv-2.1.0-cp311-cp311-linux_x86_64.whl'
WANTED = {'packages': 'a', 'openmmlab': 'b', 'project': 'c'}
DEBIAN = {'torch': ('1.13.0a0+x', '/torch'), 'torchvision': ('0.14.1a0', '/v')}


def make_wheel(folder, content='compiled'):
    """Writes a small wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, 'w') as archive:
        archive.writestr('mmcv/_ext.so', content * 1000)
    return folder / WHEEL


def make_venv(root, done, name='.venv'):
    """Makes what a set-up leaves that has done the given steps."""
    venv = root / name
    (venv / 'bin').mkdir(parents=True)
    (venv / 'bin' / 'python').symlink_to(sys.executable)
    (venv / 'pyvenv.cfg').touch()
    stamp.write(venv, done)
    return venv


def make_python(**facts):
    """Returns a Python that has all that Debian's has, but for ``facts``."""
    usual = dict(
        executable='/usr/bin/python3',
        version='3.11.2',
        headers='/usr/include',
        ensurepip=True,
        packages=DEBIAN,
        system='debian12',
    )
    return interpreter.Interpreter(**{**usual, **facts})


def make_steps(root, generation=MMENGINE, **facts):
    """Returns the steps of a generation."""
    return steps.Steps(root, generation, make_python(**facts), WANTED)
