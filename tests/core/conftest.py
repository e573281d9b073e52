"""Fixtures for tests of the core."""

import pytest

from tests.core.switches import switch_off


@pytest.fixture(params=['compiled', 'torch'])
def kernels(request, monkeypatch):
    """Run a test with the compiled kernels, and again with torch's."""
    if request.param == 'torch':
        switch_off(monkeypatch)
