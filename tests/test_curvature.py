"""Curvature of traced functions: never below the Hessian's eigenvalues, and as tight as is claimed."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fantastic4 import lipschitz, robustness
from fantastic4.scalar import Expr, X, extremes

SEED = int(os.environ.get("FUZZ_SEED", 20211))
CASES = int(os.environ.get("FUZZ_CASES", 6))


def weights(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)


def found_by_search(fn, shape, rng, points=30):
    """The largest -λ_min and λ_max of Hessians at random points, in float64."""
    hessian = jax.jit(jax.hessian(lambda x: fn(x.reshape(shape)).reshape(())))
    lows, highs = [0.0], [0.0]
    for scale in np.geomspace(0.1, 3, points):
        point = rng.normal(size=int(np.prod(shape))) * scale
        values = np.linalg.eigvalsh(np.asarray(hessian(jnp.asarray(point)), np.float64))
        lows.append(-values[0])
        highs.append(values[-1])
    return max(lows), max(highs)


def assert_sound(fn, shape, rng, dtype=jnp.float64):
    return assert_holds(lipschitz.curvature(fn, jax.ShapeDtypeStruct(shape, dtype)), fn, shape, rng)


def assert_holds(bound, fn, shape, rng):
    low, high = found_by_search(fn, shape, rng)
    assert float(bound.lower) >= low
    assert float(bound.upper) >= high
    return bound, low, high


def two_layers(rng, activation=jax.nn.softplus, n=6, hidden=9, classes=3):
    first, last, bias = weights(rng, n, hidden), weights(rng, hidden, classes), weights(rng, 1, hidden)
    return lambda x: activation(x @ first + bias) @ last, first, last


def test_two_layers_of_softplus_have_the_signed_formula():
    rng = np.random.default_rng(SEED)
    net, first, last = two_layers(rng)
    bounds = np.asarray(lipschitz.margin_curvatures(net, jnp.ones((1, 6))))
    first, last = np.asarray(first, np.float64), np.asarray(last, np.float64)
    for i in range(3):
        for j in range(3):
            lower_part = np.maximum(-(last[:, i] - last[:, j]), 0)
            exact = 0.25 * np.linalg.norm(first * np.sqrt(lower_part), 2) ** 2
            assert exact <= bounds[i, j] <= exact * 1.001 + 1e-6


class SideBySide(nn.Module):
    """A large and a small kernel on one image."""

    def setup(self):
        self.large = nn.Conv(5, (6, 6), padding="VALID")
        self.small = nn.Conv(3, (3, 3), strides=3)
        self.last = nn.Dense(2)

    def __call__(self, x):
        branches = [nn.softplus(layer(x)).reshape(len(x), -1) for layer in (self.large, self.small)]
        return self.last(jnp.concatenate(branches, axis=1))


def parts_of_the_input(rng):
    left, right, last = rng.normal(size=(4, 7)), rng.normal(size=(4, 5)), rng.normal(size=(12, 2))

    def net(x):  # entries 2 and 3 are seen by both; each call makes its weights anew, and yet is one network
        parts = [jax.nn.softplus(x[:, :4] @ left.copy()), jax.nn.softplus(x[:, :1:-1] @ right[::-1])]
        return jnp.concatenate(parts, axis=1) @ last

    return (1, 6), net, [np.vstack([left, np.zeros((2, 7))]), np.vstack([np.zeros((2, 5)), right])], last


def two_convolutions(rng, shifts=((0, 1.0),)):
    """And an average over images moved to the right."""
    del rng
    model, shape = SideBySide(), (1, 6, 6, 1)
    variables = model.init(jax.random.key(SEED), jnp.ones(shape))
    move = lambda x, by: jnp.pad(x, ((0, 0), (0, 0), (by, 0), (0, 0)))[:, :, :6] if by else x

    def net(x):
        return sum(weight * model.apply(variables, move(x, by)) for by, weight in shifts)

    units, matrices = jnp.eye(36).reshape(36, 6, 6, 1), []
    for by, _ in shifts:
        for name in ("large", "small"):
            layer = getattr(model.bind(variables), name)
            matrices.append(np.asarray(layer(move(units, by)) - layer(jnp.zeros(shape))).reshape(36, -1))
    last = np.asarray(variables["params"]["last"]["kernel"], np.float64)
    return shape, net, matrices, np.vstack([weight * last for _, weight in shifts])


def shifted_images(rng):
    return two_convolutions(rng, ((0, 0.6), (2, 0.4)))


def contracted_in_two_orders(rng):
    one, two, last = rng.normal(size=(2, 3, 7)), rng.normal(size=(2, 3, 5)), rng.normal(size=(12, 2))
    turned = np.moveaxis(two, 0, 1)

    def net(x):
        image = x.reshape(2, 3)
        parts = [jnp.tensordot(image, one, ((0, 1), (0, 1))), jnp.tensordot(image, turned, ((1, 0), (0, 1)))]
        return (jnp.concatenate([jax.nn.softplus(part) for part in parts]) @ last)[None]

    return (1, 6), net, [one.reshape(6, 7), two.reshape(6, 5)], last


@pytest.mark.parametrize("make", [parts_of_the_input, contracted_in_two_orders, two_convolutions, shifted_images])
def test_first_layers_side_by_side_have_the_norm_of_all(make, x64):
    rng = np.random.default_rng(SEED)
    shape, net, matrices, last = make(rng)
    bound, _, _ = assert_sound(lambda x: net(x)[0, 0] - net(x)[0, 1], shape, rng)
    margin = last[:, 0] - last[:, 1]
    for found, part in ((bound.lower, np.maximum(-margin, 0)), (bound.upper, np.maximum(margin, 0))):
        scaled = np.hstack(matrices) * np.sqrt(part / 4)
        exact = np.linalg.norm(scaled, 2) ** 2
        split = np.split(scaled, np.cumsum([m.shape[1] for m in matrices])[:-1], axis=1)
        assert exact <= float(found) <= exact * 1.001
        assert exact * 1.001 < sum(np.linalg.norm(one, 2) ** 2 for one in split)  # the sum of norms would not pass


def test_a_layer_that_reads_an_entry_twice_is_bounded_as_it_is(x64):
    rng = np.random.default_rng(SEED)
    first, last = np.abs(rng.normal(size=(6, 7))), rng.normal(size=7)

    def net(x):
        return (jax.nn.softplus(jnp.concatenate([x, x], axis=1) @ first) @ last)[0]

    bound, _, _ = assert_sound(net, (1, 3), rng)
    for found, part in ((bound.lower, np.maximum(-last, 0)), (bound.upper, np.maximum(last, 0))):
        assert np.linalg.norm((first[:3] + first[3:]) * np.sqrt(part / 4), 2) ** 2 <= float(found)


@pytest.mark.parametrize("name", ["softplus", "gelu", "silu", "tanh", "sigmoid", "mish"])
def test_every_smooth_activation(name, x64):
    activation = {"tanh": jnp.tanh, "mish": jax.nn.mish}.get(name) or getattr(jax.nn, name)
    rng = np.random.default_rng(SEED)
    net, _, _ = two_layers(rng, activation)
    bound, low, high = assert_sound(lambda x: net(x)[0, 0], (1, 6), rng)
    assert float(bound.value) < 12 * max(low, high)  # and of some use


class Convolutional(nn.Module):
    """Everything that is linear between smooth functions."""

    @nn.compact
    def __call__(self, x):
        y = nn.softplus(nn.Conv(3, (3, 3), padding="CIRCULAR")(x))
        y = nn.BatchNorm(use_running_average=True)(y)
        y = y + nn.tanh(nn.Conv(3, (3, 3), padding="REFLECT")(y))
        y = jnp.concatenate([nn.avg_pool(y, (2, 2), (2, 2)), -y[:, ::2, ::2]], axis=-1)
        y = nn.softplus(nn.Conv(4, (2, 2), strides=2)(y))
        return nn.Dense(2)(jnp.mean(y, axis=(1, 2)))


def test_a_convolutional_network(x64):
    rng = np.random.default_rng(SEED)
    model = Convolutional()
    variables = model.init(jax.random.key(0), jnp.ones((1, 4, 4, 1)))
    variables["batch_stats"]["BatchNorm_0"]["var"] = jnp.array([0.5, 2.0, 1.0])
    assert_sound(lambda x: model.apply(variables, x)[0, 0] - model.apply(variables, x)[0, 1], (1, 4, 4, 1), rng)


def published(matrices, slope, bend):
    """S/r of Singla & Feizi (2020) in NumPy, for the first output of a dense network, |W| and all."""
    matrices = [np.asarray(m, np.float64) for m in matrices]
    r, radii = 0.0, []
    for i, m in enumerate(matrices[:-1]):
        r = np.linalg.norm(m, 2) * (1.0 if i == 0 else slope * r)
        radii.append(r)
    reach, total = np.abs(matrices[-1][:, 0]), 0.0
    for i in range(len(matrices) - 2, -1, -1):
        total += bend * radii[i] ** 2 * reach.max()
        reach = slope * np.abs(matrices[i]) @ reach
    return total


def test_it_is_never_above_the_published_recursion():
    rng = np.random.default_rng(SEED)
    shapes = [(5, 7), (7, 6), (6, 8), (8, 2)]
    matrices = [weights(rng, *shape) for shape in shapes]

    def net(x):
        for m in matrices[:-1]:
            x = jax.nn.softplus(x @ m)
        return (x @ matrices[-1])[0, 0]

    bound = lipschitz.curvature(net, jnp.ones((1, 5)))
    assert float(bound.value) <= published(matrices, 1.0, 0.25) * 1.001


def test_a_network_called_twice_is_one_network():
    rng = np.random.default_rng(SEED)
    net, _, _ = two_layers(rng)
    twice = lipschitz.curvature(lambda x: net(x)[0, 0] - net(x)[0, 1], jnp.ones((1, 6)))
    matrix = lipschitz.margin_curvatures(net, jnp.ones((1, 6)))
    np.testing.assert_allclose(float(twice.lower), matrix[0, 1], rtol=1e-4)
    np.testing.assert_allclose(float(twice.upper), matrix[1, 0], rtol=1e-4)


ACTIVATIONS = [jax.nn.softplus, jnp.tanh, jax.nn.sigmoid, jax.nn.gelu, jax.nn.silu, jnp.sin, jnp.arctan, jnp.arcsinh]


def random_operation(rng, unit, n):
    """Its name, and a function of a vector of ``n`` entries or of two into one; ``unit`` is 1, known or traced."""
    matrix, vector, cube = rng.normal(size=(n, n)) * unit, rng.normal(size=n), rng.normal(size=(2, n // 2, n)) * unit
    number, places, act = float(rng.normal()) * unit, rng.integers(0, n, n), ACTIVATIONS[rng.integers(len(ACTIVATIONS))]
    far, mask, vector = (vector + np.copysign(0.5, vector)) * unit, vector > 0, vector * unit
    one = {
        "activation": act,
        "wide activation": lambda x: act(number * x),
        "matrix": lambda x: x @ matrix,
        "positive matrix": lambda x: x @ jnp.abs(matrix),
        "contraction": lambda x: jnp.tensordot(x.reshape(2, n // 2), jnp.moveaxis(cube, 0, 1), ((1, 0), (0, 1))),
        "from constants": lambda x: vector - x,
        "from a number": lambda x: number - x,
        "shift": lambda x: x + vector,
        "scale": lambda x: x * vector,
        "division": lambda x: x / far,
        "places": lambda x: x[places],
        "columns": lambda x: x.reshape(2, n // 2).ravel(order="F"),
        "centre": lambda x: x - x.mean(),
        "level": lambda x: x.sum() + x,
        "cumsum": jnp.cumsum,
        "softmax": jax.nn.softmax,
        "log-softmax": lambda x: jax.nn.log_softmax(x)[places],
        "cross-entropy": lambda x: x * number - (matrix[0] * jax.nn.log_softmax(x)).sum(),
        "pad": lambda x: jnp.pad(x, (1, 0), constant_values=number)[:n],
        "stack": lambda x: jnp.stack([x, vector]).ravel()[::2],
        "mask": lambda x: jnp.where(mask, x, number),
    }
    two = {
        "sum": lambda x, y: x + y,
        "difference": lambda x, y: x - y,
        "beside": lambda x, y: jnp.concatenate([x[: n // 2], y[n // 2 :]]),
        "mixed": lambda x, y: jnp.where(mask, x, y),
    }
    name = str(rng.choice([*one, *two]))
    return name, one.get(name), two.get(name)


def random_function(rng, unit=1.0, n=4):
    """A `random_operation` after the other, each of vectors that there are."""
    steps = [(*random_operation(rng, unit, n), *rng.integers(0, 3, 2)) for _ in range(rng.integers(3, 9))]
    last = rng.normal(size=n) * unit

    def fn(x):
        known = [x[0]]
        for _, one, two, i, j in steps:
            near, far = known[-1 - i % len(known)], known[-1 - j % len(known)]
            known.append(one(near) if two is None else two(near, far))
        return known[-1] @ last

    return " → ".join(name for name, *_ in steps), fn


def check_random_functions(numbers):
    """How many had a bound. Every other one is bounded under jit, where its constants are not known."""
    bounded = 0
    for number in numbers:
        text, fn = random_function(np.random.default_rng([SEED, number]))

        def curvature(unit, number=number):
            fn = random_function(np.random.default_rng([SEED, number]), unit)[1]
            return lipschitz.curvature(fn, jax.ShapeDtypeStruct((1, 4), jnp.float64))

        try:
            bound = (jax.jit(curvature) if number % 2 else curvature)(1.0)
            assert_holds(bound, fn, (1, 4), np.random.default_rng([SEED, number]))
            bounded += 1
        except lipschitz.UnboundedError:
            continue
        except AssertionError as error:
            raise AssertionError(f"seed {SEED}, function {number}: {text}: {error}") from error
    return bounded


def test_random_functions_are_never_below_what_search_finds(x64):
    assert check_random_functions(range(2 * CASES)) > CASES


@pytest.mark.fuzz
def test_many_random_functions(x64):
    for start in range(0, 50 * CASES, 50):
        check_random_functions(range(start, start + 50))
        jax.clear_caches()


def random_net(rng):
    n, depth = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    width, layers = n, []
    for _ in range(depth):
        new = int(rng.integers(2, 6))
        layers.append(
            (
                weights(rng, width, new) * rng.uniform(0.3, 2),
                weights(rng, 1, new),
                ACTIVATIONS[rng.integers(len(ACTIVATIONS))],
            )
        )
        width = new
    last, kind = weights(rng, width, 1), rng.integers(3)

    def net(x):
        for m, b, act in layers:
            y = act(x @ m + b)
            x = y + x if kind == 1 and y.shape == x.shape else y
        return jnp.sum(x @ last) if kind < 2 else jnp.sum(jnp.tanh(x @ last) * 0.7)

    return net, (1, n)


def test_random_networks_are_never_below_what_search_finds(x64):
    for case in range(CASES):
        rng = np.random.default_rng([SEED, case])
        net, shape = random_net(rng)
        try:
            assert_sound(net, shape, rng)
        except AssertionError as error:
            raise AssertionError(f"seed {SEED}, case {case}") from error


def test_a_larger_network_has_finite_bounds_and_gradients():
    rng = np.random.default_rng(SEED)
    first, last = weights(rng, 6, 9), weights(rng, 9, 2)

    @jax.jit
    def penalty(first):
        return lipschitz.curvature(lambda x: (jax.nn.softplus(x @ first) @ last)[0, 0], jnp.ones((1, 6))).value

    gradient = jax.grad(penalty)(first)
    direction = jnp.asarray(rng.normal(size=first.shape), jnp.float32)
    difference = (penalty(first + 1e-2 * direction) - penalty(first - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(jnp.sum(gradient * direction), difference, rtol=2e-2)
    assert np.all(np.isfinite(jax.grad(penalty)(jnp.zeros_like(first))))


def test_what_is_not_smooth_is_refused():
    with pytest.raises(lipschitz.UnboundedError, match=r"relu.*softplus"):
        lipschitz.curvature(lambda x: jnp.sum(jax.nn.relu(x)), jnp.ones(3))
    with pytest.raises(lipschitz.UnboundedError, match="second derivative"):
        lipschitz.curvature(lambda x: jnp.sum(jnp.sort(jnp.tanh(x))), jnp.ones(3))
    with pytest.raises(ValueError, match="one example"):
        lipschitz.margin_curvatures(lambda x: x, jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="margins are of one example"):
        lipschitz.margin_curvatures(jnp.sum, jnp.ones((1, 3)))


def test_a_vector_has_the_lipschitz_constant_of_its_jacobian():
    # J = diag(cos x): |cos x - cos y| ≤ |x - y|, attained.
    bound = lipschitz.curvature(jnp.sin, jnp.ones(3))
    assert 1.0 <= float(bound.value) <= 1.001


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("op", ["tanh", "logistic", "sin", "silu", "softplus"])
def test_extremes_hold_every_value(op, order, x64):
    silu = Expr("mul", (X, Expr("logistic", (X,))))
    softplus = Expr("log1p", (Expr("exp", (Expr("neg", (Expr("abs", (X,)),)),)),))
    softplus = Expr("add", (Expr("max", (X, Expr("const", (), 0.0))), softplus))
    expr, function = {
        "silu": (silu, jax.nn.silu),
        "softplus": (softplus, jax.nn.softplus),
        "logistic": (Expr("logistic", (X,)), jax.nn.sigmoid),
    }.get(op) or (Expr(op, (X,)), getattr(jnp, op))
    derivative = jax.grad(function) if order == 1 else jax.grad(jax.grad(function))
    values = np.asarray(jax.vmap(derivative)(jnp.linspace(-9, 9, 4001)))
    low, high = extremes(expr, order)
    assert low <= values.min()
    assert values.max() <= high
    if (op, order) != ("silu", 1):  # far out, its slope is known to be at most 1 in size, without the sign
        assert high - low <= (values.max() - values.min()) * 1.001 + 1e-5


def test_extremes_hold_slopes_far_out():
    # f = √(x² + 1e12): f' is within 4e-5 of 0 where |x| ≤ 40, and tends to ±1.
    low, high = extremes(Expr("sqrt", (Expr("add", (Expr("mul", (X, X)), Expr("const", (), 1e12))),)), 1)
    assert low <= -1
    assert high >= 1


def inner(x, factor=3.0):
    """A node whose own curvature is seen only through the interval of what comes after it."""
    return jnp.tanh(x @ jnp.ones((1, 1))) @ jnp.full((1, 1), factor)


THROUGH = {
    "negative weight": lambda x: jax.nn.softplus(inner(x, -1.0)),
    "concave": lambda x: -jax.nn.softplus(x @ jnp.ones((1, 1))),
    "repeated times numbers of both signs": lambda x: (
        jax.nn.softplus(jnp.repeat(inner(x), 2, 1) * jnp.array([[-1.0, 1.001]])) @ jnp.ones((2, 1))
    ),
    "a steep linear map before a matrix": lambda x: jax.nn.softplus(
        jnp.sum(jnp.repeat(x, 4, 1), 1, keepdims=True) @ jnp.ones((1, 1))
    ),
    "read twice": lambda x: jax.nn.softplus(inner(x)) + jax.nn.softplus(inner(x) + 1) * 2,
    "read thrice": lambda x: jnp.repeat(inner(x), 3, 1) @ jnp.ones((3, 1)),
    "functions read thrice": lambda x: jax.nn.softplus(jnp.repeat(inner(x), 3, 1) @ jnp.ones((3, 1))),
    "multiplied by a number": lambda x: jax.nn.softplus((-4 * inner(x)) @ jnp.ones((1, 1))),
    "input multiplied by a number": lambda x: jax.nn.softplus((3 * x) @ jnp.ones((1, 1))),
    "input read thrice": lambda x: jax.nn.softplus(jnp.repeat(x, 3, 1)) @ jnp.ones((3, 1)),
    "side by side": lambda x: jax.nn.softplus(
        jnp.concatenate([inner(x), jnp.sin(inner(x, 2.0))], 1) @ jnp.array([[-1.0], [0.5]])
    ),
}


@pytest.mark.parametrize("name", THROUGH)
def test_intervals_go_back_through(name, x64):
    fn = lambda x: THROUGH[name](x)[0, 0]
    bends = jax.vmap(jax.grad(jax.grad(lambda t: fn(t.reshape(1, 1)))))(jnp.linspace(-6, 6, 2001))
    found = lipschitz.curvature(fn, jax.ShapeDtypeStruct((1, 1), jnp.float64))
    assert float(found.lower) >= -bends.min()
    assert float(found.upper) >= bends.max()


def test_intervals_go_back_through_a_ring(x64):
    """Of a transposed convolution with circular padding, on a plane, behind another layer."""
    rng = np.random.default_rng(SEED)
    layer = nn.ConvTranspose(2, (3, 2), (2, 1), "CIRCULAR", param_dtype=jnp.float64)
    inner, kernel = rng.normal(size=(4, 4)), rng.normal(size=(3, 2, 1, 2))
    weights = rng.normal(size=(1, 4, 2, 2))

    def fn(x):
        image = jnp.tanh(x @ inner).reshape(1, 2, 2, 1)
        return jnp.sum(
            weights * jax.nn.softplus(layer.apply({"params": {"kernel": kernel, "bias": weights[0, 0, 0]}}, image))
        )

    assert_sound(fn, (4,), rng)


def test_a_batch_is_not_one_example(x64):
    weights = jnp.array([[1.0, 0.0], [0.0, 5.0]])
    fn = lambda x: jnp.sum(jax.nn.softplus(x @ jnp.array([[1.0, 0.0], [0.0, 3.0]])) * weights[::-1])
    truth = np.linalg.eigvalsh(jax.hessian(lambda v: fn(v.reshape(2, 2)))(jnp.zeros(4)))
    assert float(lipschitz.curvature(fn, jnp.ones((2, 2))).upper) >= truth[-1] > 0


@pytest.mark.parametrize("count", [8, 3002])
def test_intervals_are_widened_by_their_rounding(count):
    """1e8 + 1 + … - 1e8: what float32 loses is in the interval."""
    ones = jnp.ones((1, 1))
    last = jnp.asarray(np.r_[1e8, np.ones(count - 2), -1e8], jnp.float32)[:, None]
    net = lambda x: (jnp.repeat(jnp.tanh(x @ ones) @ ones, count, axis=1) @ last)[0, 0]
    assert float(lipschitz.curvature(net, ones).value) >= 0.7698 * (count - 2)


def test_what_vanishes_below_the_smallest_float_is_not_zero():
    small = jnp.full((1, 1), 1e-25)
    steep = jnp.full((1, 1), 1e18)
    assert float(lipschitz.bound(lambda x: jnp.tanh(x @ small) @ small, jnp.ones((1, 1))).value) > 1e-50
    net = lambda x: (jnp.tanh(jnp.tanh(x @ steep) @ small) @ small)[0, 0]
    assert float(lipschitz.curvature(net, jnp.ones((1, 1))).value) >= 7.6e-15


TURNED = {
    "constants that differ": lambda x: jnp.sum(jnp.array([1.0, 2.0, 3.0]) - jax.nn.softplus(x)),
    "after a matrix": lambda x: jnp.sum(jnp.array([1.0, 2.0]) - jax.nn.softplus(x) @ np.abs(FIRST[:, :2])),
    "inside a function": lambda x: jnp.sum(jax.nn.softplus(jnp.array([1.0, 0.0, -1.0]) - jax.nn.softplus(x))),
    "twice": lambda x: jnp.sum(LAST - jax.nn.softplus(LAST - x @ FIRST) @ np.abs(FIRST)),
}
FIRST, LAST = np.random.default_rng(5).normal(size=(3, 3)), np.array([0.5, -0.5, 1.0])


@pytest.mark.parametrize("name", TURNED)
def test_what_is_subtracted_from_constants_is_bent_the_other_way(name, x64):
    bound, low, high = assert_sound(lambda x: TURNED[name](x[0]), (1, 3), np.random.default_rng(SEED))
    if name in ("constants that differ", "after a matrix"):
        assert float(bound.upper) < 1e-5 < low


def test_a_number_that_is_not_known_is_subtracted_from_under_jit():
    bound = jax.jit(lambda b: lipschitz.curvature(lambda x: jnp.sum(b - jax.nn.softplus(x)), jnp.zeros(3)))(2.0)
    assert float(bound.lower) >= 0.25 > 1e-5 > float(bound.upper)


def test_a_radius_of_logits_subtracted_from_constants():
    net = lambda x: jnp.array([3.0, 0.0]) - jax.nn.softplus(5 * x) @ jnp.array([[1.0, 0.0]])
    x, other = jnp.array([[-0.5]]), jnp.array([[0.6]])
    assert jnp.argmax(net(x)) != jnp.argmax(net(other))
    assert robustness.curvature_radii(net, x, lipschitz.margin_curvatures(net, x))[0] < 1.1


def test_scales_folded_into_a_layer_are_rounded():
    """Each product of the matrix and a scale is rounded down."""
    matrix, exact, scales = np.float32([[1.0, 1.25]]), np.array([1.0, 1.25]), []
    rng = np.random.default_rng(0)
    for _ in range(400):
        tries = (1 + rng.uniform(-0.1, 0.1, (400, 2))).astype(np.float32)
        off = (tries * matrix).astype(np.float64) / (tries.astype(np.float64) * matrix.astype(np.float64))
        best = np.array([tries[off[:, i].argmin(), i] for i in range(2)])
        scales.append(best)
        matrix, exact = best * matrix, exact * best.astype(np.float64)

    assert exact.sum() > float(matrix.astype(np.float64).sum()) * (1 + 2e-5)

    def fn(x):
        hidden = jax.nn.softplus(x) @ jnp.array([[1.0, 1.25]])
        for scale in scales:
            hidden = hidden * scale
        return jnp.sum(hidden)

    assert exact.sum() * 0.25 <= float(lipschitz.curvature(fn, jnp.zeros((1, 1))).upper)


VANISHING = {
    "in a scale": (lambda x: 1e-20 * x, 1e-20, 1e35),
    "in a scale that is no float": (lambda x: 1e-20 * (1e-20 * x), 1e-40, 1e38),
    "in a matrix": (lambda x: x @ jnp.full((1, 1), 1e-22), 1e-22, 1.0),
    "in a small matrix": (lambda x: x @ jnp.full((1, 1), 1e-30), 1e-30, 1.0),
}


@pytest.mark.parametrize("name", VANISHING)
def test_what_vanishes_in_between_is_not_nothing(name):
    """Of softplus(w x) · v the second derivative at 0 is w² v / 4."""
    inner, w, v = VANISHING[name]
    net = lambda x: jnp.sum(jax.nn.softplus(inner(x)) @ jnp.full((1, 1), v))
    assert float(lipschitz.curvature(net, jnp.ones((1, 1))).upper) >= w**2 * v / 4


SUBNORMAL = np.full((4, 3), 1e-39, np.float32)
SUBNORMAL[0, 0] = 2e-39
FLUSHED = {
    "a matrix": (lambda x: (jax.nn.softplus(x) @ SUBNORMAL[:, :1])[0] * 1e38, 0.05),
    "scales": (lambda x: (jax.nn.softplus(x) * SUBNORMAL[:, 0]).sum() * 1e38, 0.05),
    "a first matrix": (lambda x: jnp.sum(jax.nn.softplus(x @ (SUBNORMAL * np.float32(1e5)))) * 1e38, 0.25e-30),
    "a first matrix, all of it": (lambda x: jnp.sum(jnp.cos(x @ SUBNORMAL)) * 1e38 * 1e38, 3e-2),
}


@pytest.mark.parametrize("name", FLUSHED)
def test_constants_that_compilers_take_for_nothing_are_not(name):
    fn, least = FLUSHED[name]
    assert float(lipschitz.curvature(fn, jnp.ones(4)).value) >= least


def test_constants_that_overflow_are_no_small_bound():
    """Infinity, and not 0 · ∞."""
    fn = lambda x: jnp.sum(jax.nn.softplus(x @ np.full((4, 4), 1e-30, np.float32))) * 1e30 * 1e20
    assert float(lipschitz.curvature(fn, jnp.ones(4)).value) >= 0.25 * 16 * 1e-10


def test_functions_whose_other_units_tell_nothing():
    """The flattest line of it is not the one to search in."""
    huber = lambda y: jnp.where(y < 0, 0.0, jnp.where(y < 1, 0.5 * y * y, y - 0.5))
    found = lipschitz.curvature(lambda x: jnp.sum(huber(x)), jnp.ones(2))
    assert found.lower <= 1e-4
    assert 1 <= found.upper <= 1 + 1e-4


def test_pools_of_another_precision(x64):
    scales = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, (4, 4)), jnp.float32)
    pool = lambda x: jax.lax.reduce_window(x, np.float32(0), jax.lax.add, (2, 2), (1, 1), "SAME")
    fn = lambda x: jnp.sum(jnp.tanh(pool(x) * scales))
    found = lipschitz.curvature(fn, jax.ShapeDtypeStruct((4, 4), jnp.float32))
    points = np.random.default_rng(1).standard_normal((20, 16))
    hessians = jax.vmap(jax.hessian(lambda v: fn(v.astype(jnp.float32).reshape(4, 4))))(points)
    assert np.abs(np.linalg.eigvalsh(hessians)).max() <= float(found.value)


ODDS = np.log((1 + 3**-0.5) / (1 - 3**-0.5))
SOFT = {
    "logsumexp": (lambda z: jax.nn.logsumexp(z), 0.5),
    "softmax": (lambda z: jax.nn.softmax(z)[0], 0.1924),
    "log-softmax": (lambda z: jax.nn.log_softmax(z)[1], 0.5),
}


@pytest.mark.parametrize("name", SOFT)
def test_softmax_and_its_kin_bend_as_far_as_is_known(name, x64):
    """Furthest where two entries are far above all others."""
    fn, reached = SOFT[name]
    rng = np.random.default_rng(SEED)
    hessian = jax.jit(jax.hessian(fn))
    at = np.concatenate([rng.normal(size=(200, 4)) * 2, [[0, 0, -40, -40], [ODDS, 0, -40, -40]]])
    seen = max(np.abs(np.linalg.eigvalsh(np.asarray(hessian(jnp.asarray(z))))).max() for z in at)
    assert reached * 0.98 <= seen <= float(lipschitz.curvature(fn, jnp.ones(4)).value)
    w, v = rng.normal(size=(3, 5)), rng.normal(size=(5, 4))
    assert_sound(lambda x: fn(jnp.tanh(x @ w) @ v), (3,), rng)


def test_softmax_and_its_kin_as_functions_of_several_entries(x64):
    """The operator norm of the second derivative: that of softmax is √(2/27) at probabilities (1 ± 1/√3) / 2."""
    z, u = jnp.array([ODDS, 0.0]), jnp.array([1.0, -1.0]) / np.sqrt(2)
    for fn in (jax.nn.softmax, jax.nn.log_softmax):
        bend = jax.jvp(lambda z: jax.jvp(fn, (z,), (u,))[1], (z if fn is jax.nn.softmax else 0 * z,), (u,))[1]
        seen = float(jnp.linalg.norm(bend))
        assert seen >= 0.999 * (np.sqrt(2 / 27) if fn is jax.nn.softmax else 0.5**0.5)
        assert seen <= float(lipschitz.curvature(fn, z).value) * (1 + 1e-12)
    assert float(lipschitz.curvature(jax.nn.logsumexp, z).value) <= 0.5 * (1 + 1e-5)
    assert float(lipschitz.curvature(jax.nn.softmax, jnp.ones(7)).value) <= np.sqrt(2 / 27) * (1 + 1e-5)


def test_log_softmax_at_the_end_moves_no_margin():
    rng = np.random.default_rng(SEED)
    net, _, _ = two_layers(rng)
    ended = lambda x: jax.nn.log_softmax(net(x))
    x = jnp.ones((1, 6))
    np.testing.assert_array_equal(lipschitz.margin_curvatures(ended, x), lipschitz.margin_curvatures(net, x))
    np.testing.assert_array_equal(lipschitz.margins(ended, x), lipschitz.margins(net, x))
    across = lambda x: jax.nn.log_softmax(x, axis=0)  # takes something else from each class
    at = jnp.zeros((3, 2)).at[0].set(40.0)
    jacobian = jax.jacrev(lambda x: across(x)[:, 0] - across(x)[:, 1])(at).reshape(3, 6)
    assert np.linalg.norm(jacobian, 2) <= lipschitz.margins(across, at)[0, 1]
