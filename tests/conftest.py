import hashlib
import os
import platform
from pathlib import Path

import jax
import pytest

# Two thirds of the suite's time is XLA's, which compiles a thousand programs: those of a run before are kept. The names
# of a processor's abilities are part of the folder's, for a program may use them all.
_CPU = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else platform.processor()
_ABILITIES = "".join(line for line in _CPU.splitlines() if line.startswith(("flags", "Features")))
_KEPT = {
    "jax_compilation_cache_dir": str(
        Path(__file__).parents[1] / ".cache" / "xla" / hashlib.sha256(_ABILITIES.encode()).hexdigest()[:8]
    ),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for _name, _value in _KEPT.items():
    if _name.upper() not in os.environ:
        jax.config.update(_name, _value)
        os.environ[_name.upper()] = str(_value)  # for the processes that tests start


# How XLA rounds is part of what these test: they compile as users do. All others do so in two thirds of the time.
_COMPILED_AS_ALWAYS = {"test_bounds", "test_dense", "test_hunt", "test_interval", "test_properties", "test_rounding"}


def pytest_report_header():
    return f"random layers: seed {os.environ.get('FUZZ_SEED', 20211)} (FUZZ_SEED sets another)"


@pytest.fixture(autouse=True, scope="module")
def _programs(request):
    """Each file's own: thousands in one process exhaust the memory maps that Linux grants it."""
    plainly = request.module.__name__ not in _COMPILED_AS_ALWAYS
    jax.config.update("jax_disable_most_optimizations", plainly)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield
