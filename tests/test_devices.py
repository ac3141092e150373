"""Many devices: a child process that sees eight, for a process has as many as it started with."""

import os
import subprocess
import sys
from pathlib import Path


def test_on_eight_devices():
    cases = Path(__file__).with_name("eight_devices.py")
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # of code; where arrays are and what is sent stays the same
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    done = subprocess.run(command, env=environment, cwd=cases.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
