"""What the page on the architecture names is there."""

import re

from tests.docs.pages import DOCS, ROOT, prose

TEXT = prose(DOCS / 'en' / 'architecture.md')
PACKAGE = ROOT / 'mmdet_ema'


def test_modules_of_each_folder():
    """The table of folders names every module, and none that is not there."""
    table = re.split(r'^## ', TEXT, flags=re.M)[1]
    for folder in ('averaging', 'checkpoint', 'training'):
        row = re.search(rf'^\| `{folder}` \| (.*?) \|', table, re.M)[1]
        modules = {x.stem for x in (PACKAGE / folder).glob('[a-z]*.py')}
        assert modules == set(re.findall(r'`(\w+)`', row)) - {'meta'}


def test_paths_that_are_named():
    """``training/steps`` is a module; where folders are left out, of one."""
    modules = {
        str(path.relative_to(PACKAGE))[: -len('.py')]
        for path in PACKAGE.rglob('*.py')
    }
    named = re.findall(
        r'`((?:averaging|checkpoint|training|for_\w+)/\w+)(?:\.py)?`', TEXT
    )
    assert len(named) > 10
    assert set(named) <= modules
