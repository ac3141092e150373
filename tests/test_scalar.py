"""Slopes and curvatures of activations: against JAX's own derivatives on a fine grid, and what they must refuse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fantastic4.expression import substitute
from fantastic4.jets import Interval, jet
from fantastic4.rounding import times_up
from fantastic4.scalar import Expr, X, const, extremes, most_bent, steepest
from fantastic4.tails import BORDER, tail


def op(name, *args, number=0.0):
    return Expr(name, tuple(const(a) if isinstance(a, int | float) else a for a in args), number)


CUBE = op("power", X, number=3)
SOFTPLUS = op("add", op("max", X, 0), op("log1p", op("exp", op("neg", op("abs", X)))))
SHORT = op("min", op("abs", X), 1)
INNER = op("mul", math.sqrt(2 / math.pi), op("add", X, op("mul", 0.044715, CUBE)))
SMOOTH = {
    "gelu": (op("mul", op("mul", X, 0.5), op("add", 1, op("erf", op("div", X, math.sqrt(2))))), jax.nn.gelu, False),
    "gelu-tanh": (op("mul", X, op("mul", 0.5, op("add", 1, op("tanh", INNER)))), jax.nn.gelu, True),
    "silu": (op("mul", X, op("logistic", X)), jax.nn.silu, None),
    "softplus": (SOFTPLUS, jax.nn.softplus, None),
    "mish": (op("mul", X, op("tanh", SOFTPLUS)), jax.nn.mish, None),
    "tanh": (op("tanh", X), jnp.tanh, None),
    "sigmoid": (op("logistic", op("mul", 3, X)), lambda x: jax.nn.sigmoid(3 * x), None),
    "squareplus": (
        op("mul", 0.5, op("add", X, op("sqrt", op("add", op("power", X, number=2), 4)))),
        jax.nn.squareplus,
        None,
    ),
    "softsign": (op("div", X, op("add", 1, op("abs", X))), jax.nn.soft_sign, None),
    "sine": (op("sin", op("mul", 3, X)), lambda x: jnp.sin(3 * x), None),
    "elu": (op("select", 0, X, X, op("expm1", op("min", X, 0))), jax.nn.elu, None),
    "atan": (op("atan", op("mul", 3, X)), lambda x: jnp.arctan(3 * x), None),
    "asinh": (op("asinh", op("mul", -3, X)), lambda x: jnp.arcsinh(-3 * x), None),
    "atan of a square": (op("atan", op("power", X, number=2)), lambda x: jnp.arctan(x**2), None),
    "snake": (op("add", X, op("power", op("sin", X), number=2)), lambda x: x + jnp.sin(x) ** 2, None),
    "huber": (
        op("add", op("mul", 0.5, op("power", SHORT, number=2)), op("sub", op("abs", X), SHORT)),
        lambda x: jnp.where(jnp.abs(x) < 1, 0.5 * x**2, jnp.abs(x) - 0.5),
        None,
    ),
}
KINKED = {
    "relu": (op("max", X, 0), 1.0),
    "leaky": (op("select", X, 0, op("mul", X, 0.01), X), 1.0),
    "abs": (op("abs", op("mul", -2, X)), 2.0),
    "relu6": (op("min", op("max", X, 0), 6), 1.0),
    "half a square, cut off far out": (op("mul", 0.5, op("power", op("min", op("max", X, 0), 70), number=2)), 70.0),
    "hard-sigmoid": (op("div", op("min", op("max", op("add", X, 3), 0), 6), 6), 1 / 6),
    "hard-swish": (op("mul", X, op("div", op("min", op("max", op("add", X, 3), 0), 6), 6)), 1.5),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions(name, x64):
    expression, function, approximate = SMOOTH[name]
    f = function if approximate is None else lambda x: jax.nn.gelu(x, approximate=approximate)
    far = np.logspace(1, 4, 50)
    x = jnp.asarray(np.concatenate([np.linspace(-12, 12, 48_001), far, -far]))
    slopes = np.abs(jax.vmap(jax.grad(f))(x))
    bends = np.abs(jax.vmap(jax.grad(jax.grad(f)))(x))
    assert slopes.max() <= steepest(expression) <= slopes.max() * (1 + 1e-5)
    # At 0, where some are largest from one side, JAX may say 0.
    assert bends.max() <= most_bent(expression) <= bends.max() * (1 + (2e-3 if name in ("softsign", "elu") else 1e-4))


@pytest.mark.parametrize(("a", "b"), [(0.01, 0.0), (1.0, -41.0), (-1 / 3, 100.0)])
@pytest.mark.parametrize("name", ["gelu-tanh", "softplus", "tanh", "elu"])
def test_functions_that_are_stretched_and_moved(name, a, b):
    """F(a x + b): as steep and as bent as f, in its own units; much of it lies beyond the interval that is searched."""
    f = SMOOTH[name][0]
    line = op("add", op("mul", a, X), b) if b else op("mul", a, X)
    g = op("mul", 5, substitute(f, X, line))
    for order, known, ours in ((1, steepest(f), steepest(g)), (2, most_bent(f), most_bent(g))):
        scale = 5 * abs(a) ** order
        assert known * scale * (1 - 2e-6) <= ours <= known * scale * (1 + 2e-6)
        if a < 0:  # the search for both ends takes its time
            ends = np.array(extremes(f, order)) * scale
            wanted = sorted(-ends) if order == 1 else ends
            np.testing.assert_allclose(extremes(g, order), wanted, atol=3e-6 * known * scale)


INSIDE = {
    "x": (X, lambda x: x),
    "-3x": (op("mul", -3, X), lambda x: -3 * x),
    "x²": (op("power", X, number=2), jnp.square),
}


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("name", ["atan", "asinh", "tanh", "logistic", "erf"])
def test_envelopes_lie_above_what_they_envelop(name, inside, x64):
    """At the border and beyond, values, slopes and curvatures, on both sides."""
    functions = {
        "atan": jnp.arctan,
        "asinh": jnp.arcsinh,
        "tanh": jnp.tanh,
        "logistic": jax.nn.sigmoid,
        "erf": jax.lax.erf,
    }
    expression, inner = INSIDE[inside]
    f = lambda x: functions[name](inner(x))
    t = np.concatenate([np.linspace(BORDER, 60, 50), np.logspace(2, 5, 20)])
    for sign in (1.0, -1.0):
        with np.errstate(all="ignore"):
            found = tail(op(name, expression), sign)
        for terms, exact in zip(found[:3], (f, jax.grad(f), jax.grad(jax.grad(f))), strict=True):
            above = sum(c * t**n * np.exp(-a * t) for c, n, a in terms)
            assert np.all(np.abs(jax.vmap(exact)(jnp.asarray(sign * t))) <= above * (1 + 1e-9) + 1e-300)


def test_numbers_that_vanish_on_the_way():
    """Slopes of 1 whose terms, or parts, are below the smallest float."""
    small = op("mul", 1e-200, op("mul", 1e-200, op("max", op("sub", X, 100), 0)))
    assert steepest(op("mul", 1e200, op("mul", 1e200, small))) >= 1
    assert 1e-150 <= times_up(1e-200, 1e-200, 1e250) < 1
    assert times_up(1e-200, 0.0, 1e250) == 0
    slow = op("mul", 1e-170, op("tanh", op("mul", 1e-170, X)))
    assert 1 <= steepest(op("mul", 1e170, op("mul", 1e170, slow))) < math.inf


@pytest.mark.parametrize("level", [op("cos", op("mul", 0, X)), op("tanh", op("mul", 0, X))])
def test_divisors_that_are_known_roughly_far_out(level):
    """0 · ∞ may be anything: far out 2 + cos(0 x) is known to be 1 to 3, and divides by 3."""
    for outer, steep, bent in ((op("tanh", X), 1.0, 0.7698), (op("logistic", X), 0.25, 0.09622)):
        for divisor in (op("add", 2, level), op("sub", -2, level)):
            f = substitute(outer, X, op("sub", op("div", X, divisor), 15))
            number = 3 if level.op == "cos" else 2
            assert steepest(f) >= steep / number
            assert most_bent(f) >= bent / number**2
            low, high = extremes(f, 1)
            assert high >= steep / number if divisor.op == "add" else low <= -steep / number


@pytest.mark.parametrize("inner", [X, op("tanh", X)])
def test_jumps_are_seen_in_the_units_of_the_input(inner):
    """Of x / 2³³, and of what is flat, 1e-12 is far."""
    scale = 2.0**33
    flat = substitute(inner, X, op("div", X, scale))
    curve = op("tanh", flat)
    rough = op("mul", scale, op("sub", op("add", curve, 1000), 1000))
    shifted = op("add", op("mul", scale, curve), 5e-4)
    with pytest.raises(ValueError, match=r"too roughly|not of affine"):
        steepest(op("select", flat, 0, rough, shifted))
    assert steepest(op("select", X, 0, op("expm1", X), X)) <= 1 + 1e-5  # what meets exactly needs no such care


@pytest.mark.parametrize("name", KINKED)
def test_functions_with_kinks_have_no_curvature(name):
    expression, slope = KINKED[name]
    assert slope <= steepest(expression) <= slope * (1 + 1e-5)
    with pytest.raises(ValueError, match=r"its slope jumps at|no finite bound"):
        most_bent(expression)


@pytest.mark.parametrize(("name", "wave"), [("sin", np.sin), ("cos", np.cos)])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e9, 1e14])
def test_waves_are_enclosed_closely(name, wave, size):
    """A slack that grows with the argument hid jumps: of sin(1e9 + x) any at all."""
    rng = np.random.default_rng(3)
    low = size * rng.standard_normal(2000)
    high = low + 10.0 ** rng.uniform(-12, 1.5, 2000)
    value, slope, bend = jet(op(name, X), Interval(low, high))
    for at in np.linspace(0, 1, 15):
        here = np.clip(low + at * (high - low), low, high)
        turned = [wave(here), np.cos(here) if name == "sin" else -np.sin(here), -wave(here)]
        for part, truth in zip((value, slope, bend), turned, strict=True):
            assert np.all((part.lo <= truth) & (truth <= part.hi))
    point = jet(op(name, X), Interval(low, low)).value
    steep = np.abs(wave(low)) < 1 - 1e-4  # at its extremes no float tells
    assert size > 1e9 or np.max((point.hi - point.lo)[steep]) < 1e-14
    with np.errstate(invalid="ignore"):
        everything = jet(op(name, X), Interval(np.array(-math.inf), np.array(math.inf))).value
    assert (everything.lo, everything.hi) == (-1, 1)


def test_what_has_no_bound_is_refused():
    for expression in (op("power", X, number=2), op("mul", X, op("sin", X)), op("exp", X), op("log", X), op("sqrt", X)):
        with pytest.raises(ValueError, match="no finite bound"):
            steepest(expression)
    with pytest.raises(ValueError, match="it jumps at 1"):
        steepest(op("select", X, 1, 0, X))
    with pytest.raises(ValueError, match="not of affine functions"):
        steepest(op("select", CUBE, 1, 0, X))
    for exponent in (0.5, -1, 0):
        with pytest.raises(ValueError, match="positive whole number"):
            op("power", X, number=exponent)
    with pytest.raises(ValueError, match="must be finite"):
        const(math.inf)
    with pytest.raises(ValueError, match="no finite bound"):
        steepest(op("mul", op("tanh", X), op("power", X, number=300)))
    with pytest.raises(ValueError, match="no operation 'cosh' of 1 arguments"):
        op("cosh", X)


def test_a_comparison_of_equal_numbers_does_not_hold():
    """left where a < b: with a = b it is right, however steep that is."""
    for number in (0.0, 1.5):
        assert steepest(op("select", number, number, X, op("mul", 7, X))) >= 7


def test_small_jumps_of_the_slope_are_seen():
    """Beside a curvature that hides them a little way off."""
    sum_ = op("add", op("mul", 1000, SOFTPLUS), op("mul", 1e-7, op("abs", X)))
    with pytest.raises(ValueError, match="its slope jumps at 0"):
        most_bent(sum_)


LATE = {
    "maximum of a relu": (op("max", op("max", X, 0), op("sub", 2, X)), 1.0),
    "maximum of a selection": (op("max", op("select", 0, X, X, 0), op("sub", 4, X)), 2.0),
    "absolute value of a selection": (op("abs", op("select", X, 2, X, X)), 0.0),
    "logistic of a maximum": (op("logistic", op("max", op("max", X, 0.25), op("sub", 2.5, X))), 1.25),
    "at the border": (op("abs", op("sub", X, 40)), 40.0),
    "at the border, of a relu": (op("min", op("max", X, 0), op("sub", 80, X)), 40.0),
    "beyond the border": (op("max", op("sub", X, 5000), 0), 5000.0),
}


@pytest.mark.parametrize("name", LATE)
def test_kinks_of_what_has_kinks_are_seen(name):
    """Where a maximum changes over depends on another one; and where the search halves its cells."""
    expression, kink = LATE[name]
    around = np.array([kink - 2**-20, kink, kink + 2**-20])
    assert np.abs(np.diff(np.diff(evaluate(expression, around)))) > 2**-23  # it is one
    with pytest.raises(ValueError, match=r"its slope jumps at|no finite bound"):
        most_bent(expression)


@pytest.mark.parametrize(("large", "small"), [(1e9, 1e-8), (1e20, 1.0)])
def test_slopes_that_cancel_hide_no_jump(large, small):
    line = op("mul", large, X)
    expression = op("sub", op("add", line, op("mul", small, op("max", X, 0))), line)
    with pytest.raises(ValueError, match="too roughly at 0"):
        most_bent(expression)


@pytest.mark.parametrize("kink", [-40.0, 40.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_slopes_beyond_a_kink_at_the_border_count(kink, sign):
    low, high = extremes(op("mul", sign, op("abs", op("sub", X, kink))), 1)
    assert low <= -1
    assert high >= 1


def random_expression(rng, depth):
    """A random tree of operations that keep slopes finite."""
    if depth == 0:
        return op("add", op("mul", float(rng.normal()), X), float(rng.normal()))
    kind = rng.choice(["tanh", "logistic", "erf", "sin", "abs", "max", "add", "mul"])
    inner = random_expression(rng, depth - 1)
    if kind in ("max", "add"):
        return op(str(kind), inner, random_expression(rng, depth - 1))
    if kind == "mul":  # of bounded functions: the product's slope is bounded
        return op("mul", op("tanh", inner), op("logistic", random_expression(rng, depth - 1)))
    return op(str(kind), inner)


def evaluate(expression, x):
    functions = {
        "tanh": np.tanh, "logistic": lambda v: 1 / (1 + np.exp(-v)), "erf": np.vectorize(math.erf), "sin": np.sin,
        "abs": np.abs, "max": np.maximum, "min": np.minimum, "add": np.add, "sub": np.subtract, "mul": np.multiply,
        "select": lambda a, b, left, right: np.where(a < b, left, right),
    }  # fmt: skip
    if expression.op == "x":
        return x
    if expression.op == "const":
        return np.full_like(x, expression.number)
    return functions[expression.op](*(evaluate(arg, x) for arg in expression.args))


def test_random_expressions_are_never_steeper():
    rng = np.random.default_rng(0)
    x = np.linspace(-30, 30, 60_001) + rng.uniform(0, 1e-3)
    for _ in range(40):
        expression = random_expression(rng, 3)
        found = np.max(np.abs(np.diff(evaluate(expression, x)) / np.diff(x)))  # a mean value is a slope somewhere
        assert found <= steepest(expression) * (1 + 1e-6)


def pieces(rng, depth):
    """A random function with kinks at numbers of few digits, or without."""
    if depth == 0:
        line = op("add", op("mul", float(rng.integers(-1, 2)), X), float(rng.integers(-4, 5)) / 4)
        return op("select", X, 0, line, line)  # whose kinks nothing lists
    kind = str(rng.choice(["abs", "max", "min", "add", "add", "tanh"]))
    parts = [pieces(rng, depth - 1) for _ in range(1 if kind in ("abs", "tanh") else 2)]
    return op(kind, *parts)


def test_random_functions_in_pieces_are_never_more_bent():
    rng = np.random.default_rng(0)
    step = 2.0**-10
    x = np.arange(-8, 8, step)
    smooth = 0
    for _ in range(30):
        expression = pieces(rng, 2)
        found = np.max(np.abs(np.diff(evaluate(expression, x), 2))) / step**2  # a mean value of f''
        try:
            assert found <= most_bent(expression) * (1 + 1e-6) + 1e-7
            smooth += 1
        except ValueError:
            continue
    assert smooth > 5
