"""These tests have no time to sleep."""

from tests.for_mmcv1.conftest import no_sleep  # noqa: F401  mmcv's 2 seconds
