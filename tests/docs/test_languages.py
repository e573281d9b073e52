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
pairs = pytest.mark.parametrize('page', ENGLISH, ids=NAMES)


def test_both_languages_have_the_same_pages():
    """The evidence in the appendix alone is English only."""
    assert NAMES == sorted(path.name for path in CHINESE.glob('*.md'))


@pairs
def test_headings_are_the_same(page):
    """As many headings of each level, in the same order."""
    ours, theirs = headings(page), headings(CHINESE / page.name)
    assert [level for level, _ in ours] == [level for level, _ in theirs]


@pairs
def test_blocks_are_the_same(page):
    """Every block has the same code; its comments are translated."""
    ours, theirs = (
        [
            (x.mark, x.language, x.stripped)
            for x in blocks(path)
            if x.language != '{toctree}'
        ]
        for path in (page, CHINESE / page.name)
    )
    assert ours == theirs


@pairs
def test_tables_are_the_same(page):
    """Every table has as many rows and columns."""
    assert tables(page) == tables(CHINESE / page.name)


@pairs
def test_the_same_names_and_numbers_are_named(page):
    """What is between backquotes, and numbers: no page drifts away."""
    assert names(page) == names(CHINESE / page.name)
    assert numbers(page) == numbers(CHINESE / page.name)


@pytest.mark.parametrize(
    'page',
    [*(CHINESE / name for name in NAMES), ROOT / 'README_zh-CN.md'],
    ids=lambda x: x.name,
)
def test_chinese_has_full_width_punctuation(page):
    """No ASCII comma, stop, colon or bracket next to a Chinese character."""
    text = re.sub(r'`[^`]*`', '`', prose(page))
    text = re.sub(r'\]\([^)]*\)', ']', text)
    wrong = re.findall(r'.?[\u4e00-\u9fff][,;:?!()].?', text)
    wrong += re.findall(r'.?[,;:?!()][\u4e00-\u9fff].?', text)
    assert [] == wrong
