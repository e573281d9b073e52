"""The table of options names every option of the hook."""

import re

from mmdet_ema.training.options import NAMES
from tests.docs.pages import DOCS


def test_every_option_is_in_the_table():
    """An option that is new has its row."""
    text = (DOCS / 'en' / 'adding_the_hook.md').read_text(encoding='utf-8')
    table = re.split(r'^## Options$', text, flags=re.M)[1]
    first = ' '.join(re.findall(r'^\| (`.*?`) \|', table, re.M))
    assert set(NAMES) == set(re.findall(r'`(\w+)`', first))
