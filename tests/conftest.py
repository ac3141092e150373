import os

import jax
import pytest


def pytest_report_header():
    return f"random layers: seed {os.environ.get('FUZZ_SEED', 20211)} (FUZZ_SEED sets another)"


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Thousands of compiled programs in one process exhaust the memory maps that Linux grants it."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield
