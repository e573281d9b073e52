"""The pages of the site, and what the tests read in them."""

import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / 'docs'
ENGLISH = sorted((DOCS / 'en').glob('*.md'))
NAMES = [path.name for path in ENGLISH]

# a comment right before a block says what a test does with it
_BLOCK = re.compile(
    r'(?:^<!-- (?P<mark>[^\n]+) -->\n)?'
    r'^```(?P<language>[\w{}-]*)\n(?P<code>.*?)^```$',
    re.M | re.S,
)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    mark: str
    language: str
    code: str

    @property
    def stripped(self):
        """The code without comments, which are translated."""
        code = re.sub(r'(^|\s)#( .*)?$', '', self.code, flags=re.M)
        return re.sub(r'[ \t]+$', '', code, flags=re.M)


def blocks(path):
    """Return the fenced blocks of a page."""
    text = path.read_text(encoding='utf-8')
    return [
        Block(
            str(path.relative_to(ROOT)),
            text[: found.start()].count('\n') + 1,
            found['mark'] or '',
            found['language'],
            found['code'],
        )
        for found in _BLOCK.finditer(text)
    ]


def prose(path):
    """Return the text of a page without its blocks."""
    return _BLOCK.sub('', path.read_text(encoding='utf-8'))


def headings(path):
    """Return level and text of each heading."""
    found = re.findall(r'^(#+) (.+)$', prose(path), re.M)
    return [(len(marks), text) for marks, text in found]


def links(path):
    """Return the targets of the links and pictures of a page."""
    text = re.sub(r'`[^`\n]*`', '', prose(path))
    return re.findall(r'\]\(([^)\s]+)\)', text)


def slugs(path):
    """Return the anchors of the headings, as GitHub and MyST make them."""
    return [slug(text) for _, text in headings(path)]


def slug(heading):
    """Return the anchor of a heading."""
    kept = (
        c
        for c in heading.lower()
        if c in ' -_' or unicodedata.category(c)[0] in 'LN'
    )
    return ''.join(kept).replace(' ', '-')


def tables(path):
    """Return the number of cells of each row of each table."""
    rows = re.findall(r'^\|.*\|$', prose(path), re.M)
    return [len(re.findall(r'(?<!\\)\|', row)) for row in rows]


def names(path):
    """Return what stands between backquotes, in a set."""
    return set(re.findall(r'`([^`]+)`', re.sub(r'\s+', ' ', prose(path))))


def numbers(path):
    """Return the numbers outside of backquotes and links, in a set."""
    text = re.sub(r'`[^`]+`|\]\([^)]*\)', '', prose(path))
    return set(re.findall(r'\d[\d,.]*\d|\d', text))
