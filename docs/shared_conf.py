"""What both builds of the site share: ``docs/en`` and ``docs/zh_cn``."""

import os
import re
import sys
from pathlib import Path

from sphinx.ext.autodoc.mock import _MockObject

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
REPOSITORY = 'https://github.com/mmdet-ema/mmdet_ema/blob/main'
sys.path.insert(0, str(ROOT))

project = 'mmdet_ema'
author = 'The mmdet_ema authors'
copyright = author
release = version = re.findall(
    r"'(.+)'", (ROOT / 'mmdet_ema' / 'version.py').read_text()
)[0]

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx_copybutton',
]
myst_heading_anchors = 3
# API pages come from the docstrings, without torch and the frameworks
autodoc_mock_imports = ['torch', 'numpy', 'mmengine', 'mmcv', 'mmdet']
# modules compare torch's version when they are imported
for comparison in ('__ge__', '__gt__', '__le__', '__lt__'):
    setattr(_MockObject, comparison, lambda self, other: True)
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
# as names are written in configs
add_module_names = False
# a prompt is not a part of what is copied
copybutton_prompt_text = '>>> '

html_theme = 'furo'
html_title = f'mmdet_ema {release}'
html_copy_source = False
html_theme_options = dict(
    source_repository='https://github.com/mmdet-ema/mmdet_ema/',
    source_branch='main',
)


def link_to_repository(app, name, source):
    """Let links that leave the folder of a build lead to the repository.

    In the pages they are relative, as they are read on GitHub too.
    """
    here = Path(app.srcdir, name).parent

    def link(found):
        path = os.path.normpath(here / found[1])
        inside = Path(path).is_relative_to(app.srcdir)
        if inside or Path(path).is_relative_to(DOCS / 'images'):
            return found[0]
        return f']({REPOSITORY}/{os.path.relpath(path, ROOT)}{found[2] or ""})'

    source[0] = re.sub(r'\]\((\.\.?/[^)#]*)(#[^)]*)?\)', link, source[0])


def setup(app):
    """Connect what is above."""
    app.connect('source-read', link_to_repository)
