"""The examples, shortened, on noise instead of digits; ``make examples`` runs them whole."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data
from examples import gan_discriminator, linen_train_state, nnx_optimizer, optax_plain, sngp_soft

ROOT = Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(0)
DIGITS = data.Digits(RNG.random((150, 28, 28, 1), np.float32), np.arange(150, dtype=np.int32) % 10)


@pytest.mark.parametrize("example", [linen_train_state, nnx_optimizer])
def test_penalised_layers(example, capsys):
    before = example.main(DIGITS, 1)
    after = example.main(DIGITS, 30)
    assert len(after.rows) == 3
    assert after.product < 0.8 * before.product
    assert "unseen digits" in capsys.readouterr().out


def test_projected_layers():
    report = optax_plain.main(DIGITS, 10)
    assert [row.name for row in report.rows] == ["conv1/kernel", "conv2/kernel", "head/kernel"]
    assert all(row.bound <= optax_plain.MAXIMUM for row in report.rows)


def test_a_discriminator(tmp_path):
    held = gan_discriminator.main(DIGITS, 3, tmp_path / "gan.png")
    assert all(0.99 < bound < 1.05 for bound in held.values())
    assert (tmp_path / "gan.png").stat().st_size > 1000


def test_uncertainty():
    assert all(0 <= share <= 1 for share in sngp_soft.main(DIGITS, 2).values())


def test_two_hosts():
    """Two processes that see each other's devices; each asserts what it found."""
    command = [sys.executable, "-W", "error", "-m", "examples.multi_host", "--steps", "10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("4 devices") == 2
