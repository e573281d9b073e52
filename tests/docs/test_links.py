"""Links in pages lead somewhere; nothing is asked of the network."""

import re

import pytest

from tests.docs.pages import DOCS, ROOT, links, prose, slugs

PAGES = [
    *sorted(DOCS.rglob('*.md')),
    *sorted(ROOT.glob('*.md')),
    *sorted((ROOT / 'configs').rglob('*.md')),
]


@pytest.mark.parametrize('page', PAGES, ids=lambda x: str(x.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files_and_headings(page):
    """Relative links name a file, and a heading of it, that is there."""
    lost = []
    for target in links(page):
        if '://' in target:
            continue
        name, _, anchor = target.partition('#')
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in slugs(file)):
            lost.append(target)
    assert [] == lost


def test_tests_that_pages_name_are_there():
    """A recipe says which test runs it."""
    for page in DOCS.rglob('*.md'):
        for name in re.findall(r'`(tests/[\w/.-]+)`', prose(page)):
            assert (ROOT / name).exists(), (page, name)


def test_every_page_is_in_the_table_of_contents():
    """The start page of both languages names every page of its folder."""
    for folder in (DOCS / 'en', DOCS / 'zh_cn'):
        text = (folder / 'index.md').read_text(encoding='utf-8')
        for page in folder.rglob('*.md'):
            name = str(page.relative_to(folder))[: -len('.md')]
            assert name == 'index' or f'\n{name}\n' in text, page


def test_the_start_page_leads_to_the_answers():
    """It links at least the twenty questions that newcomers ask."""
    english, chinese = (
        [x.partition('#') for x in links(DOCS / folder / 'index.md')[1:]]
        for folder in ('en', 'zh_cn')
    )
    assert len({''.join(x) for x in english}) >= 20
    assert [(x[0], x[1]) for x in english] == [(x[0], x[1]) for x in chinese]
