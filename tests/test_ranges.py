"""Scalar functions of what is known to lie in a range only when the program runs: never below what is seen there."""

import contextlib
import itertools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fantastic4 import lipschitz
from fantastic4.expression import Expr, X, const
from fantastic4.lipschitz.ranges import range_of

SEED = int(os.environ.get("FUZZ_SEED", 20211))  # conftest prints it
RNG = np.random.default_rng(3)
W, V = (RNG.standard_normal((3, 3)).astype(np.float32) for _ in range(2))
SHAPE = (2, 3)
EXAMPLE = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
CORNERS = np.array(list(itertools.product((-1.0, 0.999, 3.0), repeat=3)))


def bound(fn):
    return float(lipschitz.bound(fn, EXAMPLE).value)


def seen(fn):
    """The largest norm of a Jacobian in float64, at the corners of the box and elsewhere."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(SEED)
        at = np.concatenate([rng.standard_normal((40, *SHAPE)) * 2, np.repeat(CORNERS[:, None], 2, 1)])
        jacobians = jax.jit(jax.vmap(jax.jacfwd(lambda x: jnp.ravel(fn(x)))))(jnp.asarray(at))
        flat = np.asarray(jacobians).reshape(len(at), -1, 6)
        return float(np.linalg.norm(flat, 2, axis=(1, 2)).max())


def layer(x):
    return jnp.clip(x, -1, 1) @ W


def unit(x):
    return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 0.1)


FUNCTIONS = {
    "square": lambda x: jnp.square(layer(x)),
    "product with itself": lambda x: layer(x) * layer(x),
    "cube of a layer of unit vectors": lambda x: (unit(x) @ W + 0.5) ** 3,
    "squared relu": lambda x: nn.relu(layer(x) - 0.5) ** 2 @ V,
    "squared leaky relu": lambda x: nn.leaky_relu(layer(x), 0.2) ** 2,
    "squared relu that is steeper below": lambda x: nn.leaky_relu(layer(x), 3.0) ** 2,
    "exponential": lambda x: jnp.exp(layer(x)) - jnp.expm1(-layer(x)),
    "times its own silu": lambda x: layer(x) * nn.silu(layer(x)),
    "times its own tanh of a square": lambda x: (lambda h: h * h * jnp.tanh(h))(layer(x)),
    "divided by what is far from zero": lambda x: layer(x) / (20 + layer(x)),
    "logarithm": lambda x: jnp.log(20 + layer(x)) * 30,
    "root of what is positive": lambda x: jnp.sqrt(20.0 - layer(x)) * 30,
    "waves": lambda x: jnp.sin(layer(x) ** 2) + jnp.cos(layer(x) ** 3),
    "two layers": lambda x: (layer(x) ** 2 @ V) ** 2,
    "beside itself": lambda x: jnp.concatenate([layer(x) ** 2, layer(x) ** 3, layer(x)]),
    "moved and repeated": lambda x: (lambda h: jnp.concatenate([h[:, ::-1], h[:1]]))(layer(x) ** 2),
    "added to itself": lambda x: (lambda h: h**2 + h[:, ::-1] ** 2)(layer(x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_never_below_what_is_seen(name):
    fn = FUNCTIONS[name]
    found = bound(fn)
    assert seen(fn) * (1 - 1e-12) <= found <= 12 * seen(fn)
    of = lambda w: lipschitz.bound(lambda x: fn(w * x), EXAMPLE).value
    np.testing.assert_allclose(jax.jit(of)(1.0), found, rtol=1e-4)


@pytest.mark.parametrize("power", [2, 3])
def test_of_a_power_it_is_that_of_the_largest_row(power):
    """|h| is at most the sum of a column's sizes: there is a corner where it is."""
    largest = np.abs(W.astype(np.float64)).sum(axis=0).max()
    exact = power * largest ** (power - 1) * np.linalg.norm(W.astype(np.float64), 2)
    assert exact <= bound(lambda x: layer(x) ** power) <= exact * (1 + 1e-4)


def test_it_has_a_gradient_by_the_kernel():
    of = lambda w: lipschitz.bound(lambda x: (jnp.tanh(x) @ w) ** 2, EXAMPLE).value
    gradient = jax.grad(of)(W)
    step = 1e-3 * np.sign(gradient).astype(np.float32)
    assert np.isfinite(gradient).all()
    assert float(of(W + step) - of(W - step)) / 2 == pytest.approx(float(jnp.sum(gradient * step)), rel=2e-2)


def test_a_squared_relu_behind_a_normalisation():
    net = nn.Sequential([nn.LayerNorm(epsilon=0.1), nn.Dense(4), lambda h: nn.relu(h) ** 2, nn.Dense(2)])
    variables = net.init(jax.random.key(0), jnp.ones(SHAPE))
    fn = lambda x: net.apply(variables, x)
    assert seen(fn) * (1 - 1e-5) <= bound(fn) <= 50 * seen(fn)  # of a layer norm the largest scale


REFUSED = {
    "no range": lambda x: (x @ W) ** 2,
    "a jump": lambda x: jnp.where(layer(x) > 0, layer(x) ** 2, 1.0),
    "a quotient that may be none": lambda x: 1 / layer(x),
    "a root at zero": lambda x: jnp.sqrt(nn.relu(layer(x))),
    "a logarithm at zero": lambda x: jnp.log(layer(x)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_slope_there_is_refused(name):
    with pytest.raises(lipschitz.UnboundedError):
        bound(REFUSED[name])


def test_under_jit_it_is_infinite_where_it_has_none():
    of = jax.jit(lambda c: lipschitz.bound(lambda x: 1 / (20.0 + jnp.tanh(x) @ (c * W)), EXAMPLE).value)
    assert of(10.0) == np.inf
    assert of(1.0) == pytest.approx(bound(lambda x: 1 / (20.0 + jnp.tanh(x) @ W)), rel=1e-4)
    assert np.isnan(of(np.nan))
    assert np.isnan(bound(lambda x: (jnp.tanh(x) @ (np.nan * W)) ** 2))  # and outside of jit
    beyond = lambda c: lipschitz.bound(lambda x: jnp.exp(c * (jnp.tanh(x) @ W)), EXAMPLE).value
    assert jax.jit(beyond)(1e4) == np.inf
    zero_times = lambda h: h * (jnp.exp(-h) * jnp.exp(h))  # 0 times infinity, of values
    beyond = lambda c: lipschitz.bound(lambda x: zero_times(jnp.tanh(x) @ (c * W)), EXAMPLE).value
    assert jax.jit(beyond)(1e4) == np.inf


@pytest.mark.parametrize("fn", [
    lambda h: jnp.log(1e38 * (2 + h)),
    lambda h: 1e38 / (1e38 * (2 + h)),
    lambda h: 1e-19 * jnp.sqrt(1e38 * (2 + h)),
])  # fmt: skip
def test_what_vanishes_on_the_way_is_not_zero(fn):
    of = lambda x: fn(jnp.tanh(x) @ np.ones((1, 1), np.float32))
    found = lipschitz.bound(of, jnp.zeros(1)).value
    assert found >= jnp.abs(of(jnp.array([0.1])) - of(jnp.array([-0.1])))[0] / 0.2
    with contextlib.suppress(lipschitz.UnboundedError):
        assert lipschitz.curvature(of, jnp.zeros(1)).value > 0.1


def test_a_curvature():
    fn = lambda x: jnp.sum(jnp.square(jnp.tanh(x) @ W) + jnp.exp(jnp.tanh(x) @ V))
    found = float(lipschitz.curvature(fn, EXAMPLE).value)
    with jax.enable_x64(True):
        at = jnp.asarray(np.random.default_rng(SEED).standard_normal((60, *SHAPE)))
        hessians = jax.jit(jax.vmap(jax.hessian(fn)))(at)
        truth = np.linalg.norm(np.asarray(hessians).reshape(60, 6, 6), 2, axis=(1, 2)).max()
    assert truth * (1 - 1e-12) <= found <= 100 * truth
    with pytest.raises(lipschitz.UnboundedError):
        lipschitz.curvature(lambda x: jnp.sum(nn.relu(jnp.tanh(x) @ W) ** 3 + jnp.abs(jnp.tanh(x) @ W) ** 3), EXAMPLE)


UNARY = {
    "neg": np.negative, "abs": np.abs, "exp": np.exp, "expm1": np.expm1, "log": np.log, "log1p": np.log1p,
    "sqrt": np.sqrt, "tanh": np.tanh, "logistic": lambda v: 1 / (1 + np.exp(-v)), "atan": np.arctan,
    "asinh": np.arcsinh, "sin": np.sin, "cos": np.cos, "erf": np.vectorize(math.erf),
}  # fmt: skip
BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum}


def evaluate(expr, x):
    if expr.op == "x":
        return x
    if expr.op == "const":
        return np.full_like(x, expr.number)
    args = [evaluate(arg, x) for arg in expr.args]
    return args[0] ** expr.number if expr.op == "power" else (UNARY | BINARY)[expr.op](*args)


def random_function(rng, depth):
    if depth == 0:
        return Expr("add", (Expr("mul", (const(rng.normal()), X)), const(2 * rng.normal())))
    kind = rng.choice([*["power"] * 5, *UNARY, *BINARY, *BINARY])
    if kind == "power":
        return Expr("power", (random_function(rng, depth - 1),), float(rng.integers(1, 5)))
    return Expr(str(kind), tuple(random_function(rng, depth - 1) for _ in range(2 if kind in BINARY else 1)))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_random_functions_stay_in_their_range():
    rng = np.random.default_rng(SEED)
    known = bent = 0
    for _ in range(150):
        expr, most = random_function(rng, int(rng.integers(1, 3))), float(np.exp(rng.normal()))
        low, high, slope, bend = (float(v) for v in range_of.__wrapped__(expr, jnp.float32(most)))
        if not np.isfinite(slope):
            continue
        known += 1
        x, step = np.linspace(-most, most, 20_001, retstep=True)
        values = evaluate(expr, x)
        assert low <= values.min(), expr
        assert values.max() <= high, expr
        noise = 1e-13 * (1 + np.abs(values).max())
        assert np.abs(np.diff(values)).max() / step <= slope + noise / step, expr
        if np.isfinite(bend):
            bent += 1
            assert np.abs(np.diff(values, 2)).max() / step**2 <= bend * (1 + 1e-6) + 4 * noise / step**2, expr
    assert known >= 75
    assert bent >= 40
