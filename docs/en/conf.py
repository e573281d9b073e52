"""The English build of the site."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from shared_conf import *  # noqa: F403
from shared_conf import html_theme_options

language = 'en'
html_theme_options['source_directory'] = 'docs/en/'
