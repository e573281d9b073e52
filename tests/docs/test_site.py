"""The site builds, where Sphinx is: ``make docs`` makes an environment."""

import importlib.util
import subprocess
import sys

import pytest

from tests.docs.pages import DOCS, ROOT

_OWN = ROOT / '.venv-docs' / 'bin' / 'python'
PYTHON = sys.executable if importlib.util.find_spec('myst_parser') else _OWN


@pytest.mark.skipif(
    not ROOT.joinpath(PYTHON).exists(), reason='no Sphinx: make docs'
)
@pytest.mark.parametrize('language', ['en', 'zh_cn'])
def test_site_builds_without_a_warning(language, tmp_path):
    """Pages, links between them and the docstrings of the API."""
    command = [str(PYTHON), '-m', 'sphinx', '-W', '--keep-going', '-q']
    done = subprocess.run(
        [*command, str(DOCS / language), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert 0 == done.returncode, done.stdout.decode()
    page = (tmp_path / 'api.html').read_text(encoding='utf-8')
    assert 'class="sig-name descname"' in page
