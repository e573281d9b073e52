"""Metadata is in pyproject.toml; here links of the README become absolute.

On PyPI a relative one leads nowhere. In the repository they are relative, so
that they fit the branch or fork that is read, and are tested.
"""

import re
from pathlib import Path
from runpy import run_path

from setuptools import setup

TAG = 'v' + run_path('mmdet_ema/version.py')['__version__']
FILES = f'https://github.com/mmdet-ema/mmdet_ema/blob/{TAG}/'
IMAGES = f'https://raw.githubusercontent.com/mmdet-ema/mmdet_ema/{TAG}/'

readme = Path('README.md').read_text(encoding='utf-8')
for start, where in ((r'!\[', IMAGES), (r'(?<!!)\[', FILES)):
    relative = rf'({start}[^\[\]]*\]\()(?!\w+:|#)'
    readme = re.sub(relative, rf'\g<1>{where}', readme)
setup(long_description=readme, long_description_content_type='text/markdown')
