"""What is uploaded: a wheel for every platform, and the whole project."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from mmdet_ema.version import __version__
from tests.averaging.models import ROOT
from tests.test_stacks import ROWS

BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])
"""
# what neither git nor the sdist has
ELSEWHERE = shutil.ignore_patterns(
    *('.git', '.venv*', 'work_dirs', 'data', 'build', 'dist', '*.egg-info'),
    *('.peers', '_build', '__pycache__', '.*_cache', '.hypothesis'),
    *('*.log', '*.pth', '.idea', '.vscode', '.coverage*', 'htmlcov', 'site'),
)


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """Return the sources, without git, and the three files made of them."""
    folder = tmp_path_factory.mktemp('build')
    source = folder / 'source'
    shutil.copytree(ROOT, source, ignore=ELSEWHERE)
    files = []
    # an editable wheel is called like the other
    for kind in ('sdist', 'wheel', 'editable'):
        place = folder / kind
        place.mkdir()
        run = subprocess.run(
            [sys.executable, '-c', BUILD, kind, str(place)],
            capture_output=True,
            cwd=source,
        )
        assert 0 == run.returncode, run.stderr.decode()
        files += place.iterdir()
    return (source, *files)


def test_wheel_is_for_every_platform(built):
    """It holds the package, its types and the command, nothing else."""
    wheel = built[2]
    assert wheel.name == f'mmdet_ema-{__version__}-py3-none-any.whl'
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        entry = file.read(f'mmdet_ema-{__version__}.dist-info/METADATA')
    assert {'mmdet_ema/py.typed', 'mmdet_ema_cli.py'} <= names
    assert {x.partition('/')[0] for x in names} == {
        'mmdet_ema',
        'mmdet_ema_cli.py',
        f'mmdet_ema-{__version__}.dist-info',
    }
    metadata = email.message_from_bytes(entry)
    assert 'Apache-2.0' in (
        metadata['License-Expression'] or metadata['License']
    )
    assert 'LICENSE' == metadata['License-File']
    wanted = set(metadata.get_all('Provides-Extra'))
    assert {'mmengine', 'mmdet', 'mmcv1', 'forks', 'plot'} <= wanted


def test_links_on_pypi_are_absolute(built):
    """The README that is shown there has no link to a file beside it."""
    with tarfile.open(built[1]) as file:
        name = f'mmdet_ema-{__version__}/PKG-INFO'
        shown = email.message_from_binary_file(file.extractfile(name))
    assert 'text/markdown' == shown['Description-Content-Type']
    readme = shown.get_payload(decode=True).decode()
    links = re.findall(r'\]\(([^)]+)\)|(?:src|href)="([^"]+)"', readme)
    targets = [markdown or html for markdown, html in links]
    assert len(targets) > 10
    assert [] == [x for x in targets if not re.match('https?://|#', x)]
    assert any('githubusercontent' in x for x in targets)


def test_sdist_is_the_project(built):
    """Every file of the sources is in it, so that its tests run."""
    source, sdist = built[:2]
    with tarfile.open(sdist) as file:
        packed = {
            member.name.partition('/')[2]: member.mode
            for member in file.getmembers()
            if member.isfile()
        }
    files = [x for x in source.rglob('*') if x.is_file()]
    expected = {
        x.relative_to(source).as_posix()
        for x in files
        if not re.search(r'\.egg-info|^build/', str(x.relative_to(source)))
    }
    assert set() == expected - packed.keys()
    assert packed['.ci/run'] & 0o100


def test_editable_install_is_found_by_type_checkers(built):
    """It is a path, which they follow, not an import hook."""
    source, editable = built[0], built[3]
    with zipfile.ZipFile(editable) as file:
        names = [x for x in file.namelist() if '.dist-info' not in x]
        (path,) = [x for x in names if x.endswith('.pth')]
        assert names == [path]
        assert file.read(path).decode().strip() == str(source)


def test_version_and_date_are_those_of_the_changes():
    """The newest release of the changes is what is built and cited."""
    changes = (ROOT / 'CHANGELOG.md').read_text()
    found = re.search(r'^## (\d\S+) \((\d{4}-\d\d-\d\d)\)$', changes, re.M)
    assert found, 'no release with a date'
    assert __version__ == found[1]
    cited = (ROOT / 'CITATION.cff').read_text()
    assert f'\nversion: {found[1]}\ndate-released: {found[2]}\n' in cited


def test_every_stack_is_run_in_ci():
    """What ``.ci/run`` may leave out has a job of its own."""
    workflow = (ROOT / '.github' / 'workflows' / 'ci.yml').read_text()
    jobs = re.findall(r"stack: ([\w-]+), python: '([\d.]+)'", workflow)
    assert jobs == [(row[0], row[1]) for row in ROWS if row[2] != 'always']
    always = {row[1] for row in ROWS if row[2] == 'always'}
    listed = re.findall(r'^ +(3\.\d+)$', workflow, re.MULTILINE)
    assert always == set(listed)
