"""What the page on the architecture names is there."""

import re

import pytest

from tests.docs.pages import DOCS, ROOT, prose

TEXT = prose(DOCS / 'en' / 'architecture.md')
CHINESE = prose(DOCS / 'zh_cn' / 'architecture.md')
PACKAGE = ROOT / 'mmdet_ema'


@pytest.mark.parametrize('text', [TEXT, CHINESE], ids=['en', 'zh_cn'])
def test_modules_of_each_folder(text):
    """The table of folders names every module, and none that is not there."""
    table = re.split(r'^## ', text, flags=re.M)[1]
    for folder in ('averaging', 'checkpoint', 'optimizers', 'training', 'cli'):
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
