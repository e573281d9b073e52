"""The table of stacks at the head of en/appendix/what_was_run.md.

``make test-stack STACK=name`` leaves its count in ``work_dirs/tests``; this
writes the rows of the stacks that were run. With ``--check`` it only compares,
and ends with status 1 where the page is not true any more.
"""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs/en/appendix/what_was_run.md'
SHOWN = (
    *('torch', 'numpy', 'mmengine', 'mmcv', 'mmcv-full', 'mmdet', 'mmdet3d'),
    *('onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection'),
)
VERSIONS = f"""
import platform
from importlib.metadata import PackageNotFoundError, version
found = []
for name in {SHOWN!r}:
    try:
        found.append(name + ' ' + version(name).split('+')[0])
    except PackageNotFoundError:
        pass
print('.'.join(platform.python_version_tuple()[:2]), *found, sep='|')
"""


def stacks():
    """Return names and purposes, from the table of stacks."""
    text = (ROOT / 'environments' / 'stacks.txt').read_text()
    rows = [x.split(None, 3) for x in text.splitlines() if x[:1].isalpha()]
    return {name: purpose for name, _, _, purpose in rows}


def row(name, purpose, report):
    """Return a row of the table: versions and the count of the last run."""
    python = ROOT / f'.venv-{name}' / 'bin' / 'python'
    found = subprocess.run(
        [str(python), '-c', VERSIONS], stdout=subprocess.PIPE, check=True
    ).stdout.decode()
    version, torch, numpy, *openmmlab = found.strip().split('|')
    suite = ElementTree.parse(report).getroot().find('testsuite')
    count = int(suite.get('tests'))
    return (
        f'| `{name}`: {purpose} | {version} | {torch[6:]}, {numpy[6:]} '
        f'| {", ".join(openmmlab)} | {count:,} |'
    )


def main():
    """Write the rows, or compare them."""
    page = before = PAGE.read_text()
    for name, purpose in stacks().items():
        report = ROOT / 'work_dirs' / 'tests' / f'{name}.xml'
        if report.exists():
            new = row(name, purpose, report)
            page = re.sub(rf'^\| `{name}`.*$', new, page, flags=re.M)
    if '--check' not in sys.argv:
        PAGE.write_text(page)
    elif page != before:
        old, new = before.splitlines(), page.splitlines()
        wrong = [b for a, b in zip(old, new) if a != b]
        sys.exit(
            f'{PAGE.relative_to(ROOT)} is not true any more; '
            'run `make stacks`.\n' + '\n'.join(wrong)
        )


if __name__ == '__main__':
    main()
