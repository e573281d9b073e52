"""Both languages of the site say the same."""

import re

import pytest

from tests.docs.pages import (
    DOCS,
    ENGLISH,
    NAMES,
    ROOT,
    blocks,
    headings,
    names,
    numbers,
    prose,
    tables,
)

CHINESE = DOCS / 'zh_cn'
PAIRS = [
    *((page, CHINESE / page.name) for page in ENGLISH),
    (ROOT / 'README.md', ROOT / 'README_zh-CN.md'),
]
pairs = pytest.mark.parametrize(
    ('page', 'chinese'), PAIRS, ids=[page.name for page, _ in PAIRS]
)


def test_both_languages_have_the_same_pages():
    """The evidence in the appendix alone is English only."""
    assert NAMES == sorted(path.name for path in CHINESE.glob('*.md'))


@pairs
def test_headings_are_the_same(page, chinese):
    """As many headings of each level, in the same order."""
    ours, theirs = headings(page), headings(chinese)
    assert [level for level, _ in ours] == [level for level, _ in theirs]


@pairs
def test_blocks_are_the_same(page, chinese):
    """Every block has the same code; its comments are translated."""
    ours, theirs = (
        [
            (x.mark, x.language, x.stripped)
            for x in blocks(path)
            if x.language != '{toctree}'
        ]
        for path in (page, chinese)
    )
    assert ours == theirs


@pairs
def test_tables_are_the_same(page, chinese):
    """Every table has as many rows and columns."""
    assert tables(page) == tables(chinese)


@pairs
def test_the_same_names_and_numbers_are_named(page, chinese):
    """What is between backquotes, and numbers: no page drifts away."""
    assert names(page) == names(chinese)
    assert numbers(page) == numbers(chinese)


@pairs
def test_chinese_has_full_width_punctuation(page, chinese):
    """No ASCII comma, stop, colon or bracket next to a Chinese character."""
    text = re.sub(r'`[^`]*`', '`', prose(chinese))
    text = re.sub(r'\]\([^)]*\)', ']', text)
    wrong = re.findall(r'.?[\u4e00-\u9fff][,;:?!()].?', text)
    wrong += re.findall(r'.?[,;:?!()][\u4e00-\u9fff].?', text)
    assert [] == wrong
