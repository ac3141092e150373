"""Three of the examples, shortened, on noise instead of digits; ``make examples`` runs all of them whole."""

import numpy as np
import pytest

from benchmarks import data
from examples import linen_train_state, nnx_optimizer, optax_plain

RNG = np.random.default_rng(0)
DIGITS = data.Images(RNG.random((150, 28, 28, 1), np.float32), np.arange(150, dtype=np.int32) % 10)


@pytest.mark.parametrize("example", [linen_train_state, nnx_optimizer])
def test_penalised_layers(example, capsys, monkeypatch):
    monkeypatch.setattr(example, "BETA", 10.0)  # noise has to be learnt by heart: an ordinary penalty loses to it
    before = example.main(DIGITS, 1)
    after = example.main(DIGITS, 30)
    assert len(after.rows) == 3
    assert after.product < 0.9 * before.product
    assert "unseen digits" in capsys.readouterr().out


def test_projected_layers():
    report = optax_plain.main(DIGITS, 10)
    assert [row.name for row in report.rows] == ["conv1/kernel", "conv2/kernel", "head/kernel"]
    assert all(row.bound <= optax_plain.MAXIMUM for row in report.rows)
