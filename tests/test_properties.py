"""Random layers, more of them than anyone would write down: hypothesis finds and shrinks what breaks a law.

The shapes and specs come from the table, so that programs are compiled once; the numbers are random. The seed
is printed; FUZZ_SEED sets another. `make fuzz` runs FUZZ_CASES of each law instead of hundreds.
"""

import os

import cases
import jax
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import fantastic4 as f4
from fantastic4.bounds import METHODS

SEED = int(os.environ.get("FUZZ_SEED", 20211))  # conftest prints it
CASES = int(os.environ.get("FUZZ_CASES", 10_000))
CHEAP = ["same", "valid", "circular-even", "reflect", "reflect-small", "edge", "stride", "stride-circular-wrapping",
         "dilation-stride-coprime", "groups", "transposed-stride", "1d-causal-stride", "3d"]  # fmt: skip

FEW = ["same", "reflect-small", "groups-stride", "1d-causal-stride"]
PLAIN = ["same", "valid", "circular-even", "one-tap", "row", "3d"]


def layers(names):
    """Which layer, which kind of kernel, which numbers, their scale, the share of zeros."""
    return st.tuples(
        st.sampled_from(names),
        st.sampled_from(cases.KINDS),
        st.integers(0, 2**32 - 1),
        st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e30]),
        st.sampled_from([0.0, 0.5]),
    )


def draw(layer):
    """Kernel, input size and spec of a drawn layer; a share of its entries set to zero."""
    name, kind, number, scale, zeros = layer
    shape, size, spec = cases.LAYERS[name]
    rng = np.random.default_rng(number)
    kernel = cases.draw(rng, shape, kind) * (rng.random(shape) >= zeros)
    return (kernel * scale).astype(np.float32), size, spec


def truth_of(kernel, size, spec):
    """The layer is linear: its matrix is made at scale 1, where no product of the convolution vanishes."""
    largest = float(np.abs(kernel).max()) or 1.0
    exponent = np.exp2(np.floor(np.log2(largest)))
    return oracle.norm(oracle.dense((kernel / exponent).astype(np.float32), size, **spec)) * exponent


def check_bounds(layer):
    kernel, size, spec = draw(layer)
    truth = truth_of(kernel, size, spec)
    four = f4.four_bounds(kernel, f4.ConvSpec(**spec))
    assert (np.asarray(four.values, np.float64) >= truth).all(), (np.asarray(four.values), truth)
    assert (truth == 0) or np.isfinite(four.values).all()


def check_unfoldings(layer):
    kernel, _, spec = draw(layer)
    four = f4.four_bounds(kernel, f4.ConvSpec(**spec))
    root = np.sqrt(float(np.prod(kernel.shape[:-2])))
    for name, norm in oracle.unfoldings(kernel).items():
        assert root * norm <= float(four[name]) <= 1.001 * root * norm


def check_step(layer):
    kernel, _, spec = draw(layer)
    spec = f4.ConvSpec(**spec)
    four, state = f4.step(kernel, f4.init(kernel, spec, key=jax.random.key(layer[2] % 7), warmup=3), spec)
    again, _ = f4.step(kernel, state, spec)
    sound = np.asarray(f4.four_bounds(kernel, spec).values)
    assert (np.asarray(four.values) <= sound).all()
    assert (np.asarray(again.values) >= np.asarray(four.values) * (1 - 1e-4)).all()  # power iteration climbs


def check_ladder(layer):
    kernel, size, spec = draw(layer)
    truth = truth_of(kernel, size, spec)
    values = {m: float(f4.bound(kernel, f4.ConvSpec(**spec), method=m)) for m in METHODS}
    assert all(value >= truth for value in values.values()), (values, truth)
    assert values["weighted"] <= values["four"] * (1 + 2e-5)


def check_interval(layer):
    """The oracle's convolution is float32, good to 3e-7; the interval is narrower than that."""
    kernel, size, spec = draw(layer)
    truth = truth_of(kernel, size, spec)
    own = f4.norm_interval(kernel, f4.ConvSpec(**spec), 1e-4, input_shape=size)
    assert own.lower <= truth * (1 + 3e-7)
    assert own.upper >= truth * (1 - 3e-7)
    every = f4.norm_interval(kernel, f4.ConvSpec(**spec), 1e-3)
    assert every.lower <= every.upper
    assert every.upper >= own.lower
    assert every.upper <= float(f4.four_bounds(kernel, f4.ConvSpec(**spec)).min()) * (1 + 1e-3)


LAWS = [
    (check_ladder, FEW, 80),
    (check_interval, FEW, 80),
    (check_bounds, CHEAP, 180),
    (check_unfoldings, PLAIN, 180),
    (check_step, CHEAP, 80),
]


def hunt(check, names, count, **options):
    """Run ``check`` on random layers, and say with which seed."""
    print(f"\n{check.__name__}: seed {SEED}, {count} random layers")

    @seed(SEED)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)
    @given(layers(names))
    def run(layer):
        check(layer)

    run()


@pytest.mark.parametrize(("check", "names", "count"), LAWS)
def test_random_layers(check, names, count):
    hunt(check, names, count)


@pytest.mark.fuzz
@pytest.mark.parametrize(("check", "names", "count"), LAWS)
def test_fuzz(check, names, count):
    hunt(check, names, CASES, phases=[Phase.generate, Phase.shrink])
