"""The tables of options name every option of the hook."""

import re

import pytest

from mmdet_ema.training.options import NAMES
from tests.docs.pages import DOCS, ROOT

PAGES = (ROOT / 'README.md', DOCS / 'en' / 'adding_the_hook.md')


@pytest.mark.parametrize('page', PAGES, ids=lambda x: x.name)
def test_every_option_is_in_the_table(page):
    """The README leaves out what is for configs of mmpretrain."""
    text = page.read_text(encoding='utf-8')
    table = re.split(r'^## Options$', text, flags=re.M)[1].split('\n## ')[0]
    first = ' '.join(re.findall(r'^\| (`.*?`) \|', table, re.M))
    words = {'evaluate_on_ema', 'evaluate_on_origin'}  # of mmpretrain's hook
    missing = set(NAMES) - set(re.findall(r'`(\w+)`', first))
    assert missing <= (words if page.name == 'README.md' else set())
