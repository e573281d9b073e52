"""The stacks: every one is pinned, and the docs and metadata agree."""

import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'environments'
ROWS = [
    line.split(None, 3)
    for line in (FOLDER / 'stacks.txt').read_text().splitlines()
    if line[:1].isalpha()
]
NAMES = [row[0] for row in ROWS]
OPENMMLAB = (
    *('mmengine', 'mmcv', 'mmcv-full', 'mmdet', 'mmdet3d'),
    *('onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection'),
)


def pins(name):
    """Requirements of a stack, from both of its lists."""
    lines = [
        line
        for part in ('', '-openmmlab')
        for line in (FOLDER / f'{name}{part}.txt').read_text().splitlines()
        if line and not line.startswith('#')
    ]
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+', x) for x in lines), lines
    return dict(line.lower().split('==') for line in lines), len(lines)


@pytest.mark.parametrize('name', NAMES)
def test_every_package_of_a_stack_is_pinned_once(name):
    """Every requirement is one exact version, and no package has two."""
    found, lines = pins(name)
    assert lines == len(found)
    assert {'torch', 'numpy', 'pytest'} <= set(found)


@pytest.mark.parametrize(
    ('name', 'python', 'purpose'), [(*x[:2], x[3]) for x in ROWS]
)
def test_every_stack_has_its_row_in_the_docs(name, python, purpose):
    """The table of what was run names the versions that are pinned."""
    page = (ROOT / 'docs/en/appendix/what_was_run.md').read_text()
    (row,) = re.findall(rf'^\| `{name}`.*$', page, re.MULTILINE)
    found, _ = pins(name)
    openmmlab = [
        f'{package} {found[package]}'
        for package in OPENMMLAB
        if package in found
    ]
    assert row == (
        f'| `{name}`: {purpose} | {python} | {found["torch"]}, '
        f'{found["numpy"]} | {", ".join(openmmlab)} |'
    )


def test_this_stack_has_what_is_pinned():
    """A package that did not install is no reason to leave its tests out."""
    name = Path(sys.prefix).name.replace('.venv-', '')
    if name not in NAMES:
        pytest.skip('not run in the environment of a stack')
    found, _ = pins(name)
    assert {x: version(x).split('+')[0] for x in found} == found


def test_metadata_names_the_versions_that_are_tested():
    """``requires-python``, classifiers and torch's bound are the stacks'."""
    # Python before 3.11 reads no TOML
    metadata = (ROOT / 'pyproject.toml').read_text()
    tested = {row[1] for row in ROWS}
    assert tested == set(re.findall(r'Python :: (3\.\d+)"', metadata))
    oldest = min(tested, key=lambda x: int(x.split('.')[1]))
    assert f'requires-python = ">={oldest}"' in metadata
    torches = [pins(name)[0]['torch'].split('.')[:2] for name in NAMES]
    low = min(torches, key=lambda x: tuple(map(int, x)))
    assert f'dependencies = ["torch>={".".join(low)}"]' in metadata


@pytest.mark.parametrize('page', ['README.md', 'README_zh-CN.md'])
def test_both_readmes_name_the_versions_that_are_tested(page):
    """One line says from which to which Python and torch is tested."""
    text = (ROOT / page).read_text()
    assert 'Python 3.8' in text
    for name in NAMES:
        torch = '.'.join(pins(name)[0]['torch'].split('.')[:2])
        assert torch in text, name
