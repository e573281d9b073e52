"""The environments, as data: one for each generation of OpenMMLab."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from . import pins


@dataclass(frozen=True)
class Generation:
    """What is special about an environment.

    Attributes:
        name (str): Also the folder of its requirement files.
        venv (str): Its folder in the repository's root.
        variable (str): The variable that names another Python.
        compiled (str): The package whose operators are compiled.
        sources (int): How many files that compiles.
        pace (str): How long that takes.
        packages (tuple[str, ...]): The requirement files that come first.
        imports (str): What must be importable at the end.
        gibibytes (float): Its size on the disk.
        python (str, optional): The Python that it is made with. Defaults to
            the running one.
        system_packages (dict[str, str]): Packages that come with that Python,
            and how their versions begin.
        advice (str): How to get that Python and these packages.
        extras (dict[str, str]): Steps that are done where they are asked for,
            each a requirement file of that name, and what must be importable
            after it.
    """

    name: str
    venv: str
    variable: str
    compiled: str
    sources: int
    pace: str
    packages: tuple[str, ...]
    imports: str
    gibibytes: float
    python: str | None = None
    system_packages: dict[str, str] = field(default_factory=dict)
    advice: str = ''
    extras: dict[str, str] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """Returns one of its requirement files.

        Args:
            name (str): ``build``, ``openmmlab`` or the like.
        """
        return pins.FOLDER / self.name / f'{name}.txt'

    def package_files(self) -> list[Path]:
        """Returns the requirement files that come first."""
        return [self.file(name) for name in self.packages]

    def compiled_version(self) -> str:
        """Returns the version of the package that is compiled."""
        return pins.pinned(self.file('openmmlab'), self.compiled)


MMENGINE = Generation(
    name='mmengine',
    venv='.venv',
    variable='PYTHON',
    compiled='mmcv',
    sources=77,
    pace='6 minutes at best, about 20 on two slow cores',
    packages=('build', 'runtime', 'tools'),
    imports='mmcv.ops, mmdet',
    gibibytes=3.0,
    # Not mmdet3d alone: that imports next to nothing.
    extras={'mmdet3d': 'mmdet3d.apis, mmdet3d.evaluation'},
)
MMCV1 = Generation(
    name='mmcv1',
    venv='.venv-mmcv1',
    variable='PYTHON_MMCV1',
    compiled='mmcv-full',
    sources=73,
    pace='4 minutes at best, about 30 on one slow core',
    packages=('build', 'runtime', 'tools', 'loggers'),
    imports='mmcv.ops, mmdet.apis, mmengine',
    gibibytes=1.0,
    python='/usr/bin/python3',
    # The torch of mmcv 1.x's last years.
    system_packages={'torch': '1.13.', 'torchvision': '0.14.'},
    advice=(
        'on Debian 12, sudo apt-get install g++ python3-torch '
        'python3-torchvision libtorch-dev python3-dev python3-venv'
    ),
)
GENERATIONS = {x.name: x for x in (MMENGINE, MMCV1)}
