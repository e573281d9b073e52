"""The Chinese build of the site."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from shared_conf import *  # noqa: F403

language = 'zh_CN'
