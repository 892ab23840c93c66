"""The fixtures of tests/conftest.py that the tests in this folder use."""

from tests.conftest import made_once, short_grids, small_run  # noqa: F401
