"""These tests have no time to sleep."""

from tests.contract.conftest import no_sleep  # noqa: F401  a fixture
