"""The Chinese build of the site."""

import logging
import sys
from pathlib import Path

import jieba  # cuts the words that the search of the site finds

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from shared_conf import *  # noqa: F403
from shared_conf import html_theme_options

language = 'zh_CN'
jieba.setLogLevel(logging.WARNING)
html_theme_options['source_directory'] = 'docs/zh_cn/'
