"""Certified radii: nothing that is certified can be broken, and what is easy is certified exactly."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fantastic4 import lipschitz, robustness

SEED = int(os.environ.get("FUZZ_SEED", 20211))


def weights(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)


def network(rng, n=4, hidden=16, classes=4):
    first, bias, last = weights(rng, n, hidden), weights(rng, 1, hidden), 2 * weights(rng, hidden, classes)
    return lambda x: jax.nn.softplus(x @ first + bias) @ last


def linear(x):
    return x @ jnp.array([[1.0, -1.0, 0.0], [0.0, 0.5, 2.0]])


def distances(x):
    """What the linear classifier's radii are, in NumPy."""
    w = np.array([[1.0, -1.0, 0.0], [0.0, 0.5, 2.0]])
    z = np.asarray(x, np.float64) @ w
    y = z.argmax(1)
    apart = [[(z[i, y[i]] - z[i, t]) / np.linalg.norm(w[:, y[i]] - w[:, t]) for t in range(3) if t != y[i]]
             for i in range(len(z))]  # fmt: skip
    return np.min(apart, axis=1)


def test_a_linear_classifier_is_certified_exactly():
    x = jnp.asarray(np.random.default_rng(SEED).normal(size=(50, 2)), jnp.float32)
    exact = distances(x)
    by_lipschitz = robustness.lipschitz_radii(linear, x, lipschitz.margins(linear, x[:1]))
    by_curvature = robustness.curvature_radii(linear, x, lipschitz.margin_curvatures(linear, x[:1]))
    for radii in (by_lipschitz, by_curvature):
        assert np.all(radii <= exact)
        np.testing.assert_allclose(radii, exact, rtol=1e-3, atol=1e-4)


def test_the_runner_up_is_not_always_the_nearest_class():
    x = jnp.array([[2.0, 0.9]])  # logits 2, -1.55, 1.8: class 2 is second
    radii = robustness.curvature_radii(linear, x, jnp.zeros((3, 3)))
    assert radii[0] <= distances(x)[0]
    far = lambda x: jnp.stack([x[:, 0], 0.9 * x[:, 0], -20 * x[:, 1] + 0 * x[:, 0]], axis=1)
    # At (1, 0.1): logits 1, 0.9, -2. The second class is 1 away, the third 0.15.
    radius = robustness.curvature_radii(far, jnp.array([[1.0, 0.1]]), jnp.zeros((3, 3)))[0]
    assert 0.149 < radius <= 3 / np.hypot(1, 20)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_margin_that_bends_one_way_only(sign):
    """Convex margins are certified further than concave ones, whose sign would lie if taken for theirs."""
    bent = lambda x: 3 * jax.nn.softplus(4 * x).sum(axis=1)
    net = lambda x: jnp.stack([sign * bent(x), sign * 9.0 + 0 * x[:, 0]], axis=1)
    x = jnp.linspace(-2, 2, 30).reshape(-1, 1)
    radii = robustness.curvature_radii(net, x, lipschitz.margin_curvatures(net, x[:1]))
    place = np.log(np.exp(3) - 1) / 4  # where both logits are 9
    exact = np.abs(np.asarray(x, np.float64)[:, 0] - place)
    assert np.all(radii <= exact)
    assert np.all(radii >= 0.3 * exact)


def nearest_break(net, x, y, rng, count=40_000):
    """The nearest of many random points with another class."""
    steps = rng.normal(size=(count, x.shape[-1]))
    steps *= rng.uniform(0, 4, size=(count, 1)) / np.linalg.norm(steps, axis=1, keepdims=True)
    points = jnp.asarray(np.asarray(x) + steps, jnp.float32)
    broken = np.asarray(jnp.argmax(net(points), axis=1)) != y
    return np.linalg.norm(steps[broken], axis=1).min(initial=np.inf)


def test_the_bound_of_a_whole_network_holds_for_margins():
    """A margin moves by √2 times as much: here by just that."""
    net = lambda x: x @ jnp.array([[1.0, -1.0]]) / np.float32(2**0.5)
    whole = lipschitz.bound(net, jnp.ones((1, 1))).value
    assert 0.99 <= robustness.lipschitz_radii(net, jnp.ones((1, 1)), whole)[0] <= 1
    assert robustness.lipschitz_radii(net, jnp.ones((1, 1)), np.float32(1))[0] <= 1


def test_no_point_within_the_radius_has_another_class():
    rng = np.random.default_rng(SEED)
    net = network(rng)
    x = jnp.asarray(rng.normal(size=(24, 4)), jnp.float32)
    curvatures = lipschitz.margin_curvatures(net, x[:1])
    radii = robustness.curvature_radii(net, x, curvatures)
    limits = robustness.lipschitz_radii(net, x, lipschitz.margins(net, x[:1]))
    predicted = np.asarray(jnp.argmax(net(x), axis=1))
    nearest = np.array([nearest_break(net, x[i], predicted[i], rng) for i in range(len(x))])
    assert np.all(radii <= nearest)
    assert np.all(limits <= nearest)
    assert np.mean(radii / np.minimum(nearest, 4)) > 0.5  # and of some use
    # A test that cannot fail is a defect: with a tenth of the curvature some radii are wrong or at least larger.
    assert np.any(robustness.curvature_radii(net, x, curvatures / 10) > radii * 1.01)


def test_an_underestimated_curvature_is_caught():
    # One dimension: margin 1 - cosh-like. f = 2 - softplus(4 x) - softplus(-4 x) + 2 log 2, m = 8.
    net = lambda x: jnp.concatenate([2 - jax.nn.softplus(4 * x) - jax.nn.softplus(-4 * x), 0 * x], axis=1)
    grid = np.linspace(0, 1, 100_001)
    truth = grid[np.argmax(2 - np.logaddexp(0, 4 * grid) - np.logaddexp(0, -4 * grid) <= 0)]
    zero = jnp.array([[0.0]])
    honest = robustness.curvature_radii(net, zero, lipschitz.margin_curvatures(net, zero))[0]
    broken = robustness.curvature_radii(net, zero, lipschitz.margin_curvatures(net, zero) / 8)[0]
    assert honest <= truth < broken


def test_an_attack_breaks_nothing_that_is_certified():
    rng = np.random.default_rng(SEED)
    net = network(rng, n=8, hidden=32)
    x = jnp.asarray(rng.normal(size=(200, 8)), jnp.float32)
    labels = jnp.argmax(net(x), axis=1)
    radii = robustness.curvature_radii(net, x, lipschitz.margin_curvatures(net, x[:1]))
    certified = radii > 0
    assert certified.sum() > 150
    attacked = robustness.attack(net, x, labels, radii, key=jax.random.key(0), steps=40, restarts=4)
    assert np.all(np.linalg.norm(attacked - x, axis=1) <= radii * 1.0001 + 1e-6)
    assert not np.any((jnp.argmax(net(attacked), axis=1) != labels) & certified)
    # The attack is no straw man: at three times the radius it breaks most of them.
    further = robustness.attack(net, x, labels, 3 * radii, key=jax.random.key(0), steps=40, restarts=4)
    assert np.mean((jnp.argmax(net(further), axis=1) != labels)[certified]) > 0.3


def test_ties_and_nan_are_never_certified():
    tie = lambda x: jnp.concatenate([x, x, x - 1], axis=1)
    x = jnp.array([[3.0], [-2.0]])
    assert not np.any(robustness.lipschitz_radii(tie, x, lipschitz.margins(tie, x[:1])))
    assert not np.any(robustness.curvature_radii(tie, x, jnp.zeros((3, 3))))
    broken = lambda x: linear(x) * jnp.nan
    assert not np.any(robustness.lipschitz_radii(broken, jnp.ones((2, 2)), 1.0))
    assert not np.any(robustness.curvature_radii(broken, jnp.ones((2, 2)), 1.0))


def test_enough_stops_early_and_stays_sound():
    rng = np.random.default_rng(SEED)
    net = network(rng)
    x = jnp.asarray(rng.normal(size=(24, 4)), jnp.float32)
    curvatures = lipschitz.margin_curvatures(net, x[:1])
    whole = robustness.curvature_radii(net, x, curvatures)
    seen = []
    some = robustness.curvature_radii(net, x, curvatures, enough=0.2, progress=lambda *done: seen.append(done))
    assert np.all(some <= whole * 1.0001 + 1e-6)
    np.testing.assert_array_equal(some > 0.2, whole > 0.2)
    assert seen[-1][0] == seen[-1][1]


def test_certified_accuracy_counts_what_is_right_and_beyond():
    x = jnp.array([[3.0, 0.0], [0.1, 0.0], [0.0, 1.0]])
    radii = np.array([1.0, 1.0, 2.0])
    labels = jnp.array([0, 1, 2])
    assert robustness.certified_accuracy(linear, x, labels, radii, 0.5) == pytest.approx(2 / 3)
    assert robustness.certified_accuracy(linear, x, labels, radii, 1.0) == pytest.approx(1 / 3)


def attack(labels=(0, 1), epsilon=0.1, key=None):
    key = jax.random.key(0) if key is None else key
    return robustness.attack(linear, jnp.ones((2, 2)), jnp.asarray(labels), epsilon, key=key)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: robustness.lipschitz_radii(lambda x: x[0], jnp.ones((2, 3)), 1.0), r"logits \(batch, classes\)"),
        (lambda: robustness.lipschitz_radii(linear, jnp.ones((2, 2)), jnp.ones((2, 2))), r"\(3, 3\)"),
        (
            lambda: robustness.lipschitz_radii(linear, jnp.ones((2, 2)), lipschitz.bound(linear, jnp.ones((2, 2)))),
            r"margins must be numbers, .* of a lipschitz\.Bound its value",
        ),
        # As (2, 1) they would count every example with the labels of all.
        (
            lambda: robustness.certified_accuracy(linear, jnp.ones((2, 2)), jnp.zeros((2, 1)), jnp.ones(2), 0.1),
            r"labels must have the shape \(2,\), .* got \(2, 1\)",
        ),
        (
            lambda: robustness.certified_accuracy(linear, jnp.ones((2, 2)), jnp.zeros(2), jnp.ones(3), 0.1),
            r"radii must have the shape \(2,\)",
        ),
        (
            lambda: robustness.certified_accuracy(linear, jnp.ones((2, 2)), jnp.zeros(2, int), jnp.ones(2), -0.1),
            "epsilon must not be negative",
        ),
        (lambda: robustness.curvature_radii(linear, jnp.ones((2, 2), int), 1.0), "floating"),
        (lambda: jax.jit(lambda m: robustness.curvature_radii(linear, jnp.ones((2, 2)), m))(1.0), "not inside jit"),
        (lambda: robustness.lipschitz_radii(lambda x: jnp.ones(x.shape, int), jnp.ones((2, 3)), 1.0), "floating dtype"),
        (lambda: attack(jnp.zeros((2, 1), int)), r"labels must be integers of the shape \(2,\), .* got int32\(2, 1\)"),
        (lambda: attack(jnp.zeros(2)), "labels must be integers"),
        (lambda: attack(jnp.array([7, 0])), "classes from 0 to 2"),
        (lambda: attack(epsilon=-0.1), "not negative"),
        (lambda: attack(epsilon=np.nan), "not negative"),
        (lambda: attack(epsilon=jnp.ones(3)), r"one for each of 2 examples, got \(3,\)"),
        (lambda: attack(key=0), "key must be a key"),
        (lambda: robustness.curvature_radii(linear, jnp.ones((2, 2)), 1.0, steps=0), "steps"),
    ],
)
def test_bad_input_is_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_radii_of_numbers_whose_squares_vanish():
    """Each of these certified twice the distance, or any."""
    line = lambda x: x @ jnp.array([[-1e-20, 0.0]]) + jnp.array([1.0, 0.0])  # another class from 1e20 on
    bowl = lambda x: jnp.concatenate([jnp.full_like(x, 1e-12), 0.5e-27 * x**2], axis=1)  # from 4.47e7 on
    level = lambda x: jnp.concatenate([jnp.full_like(x, 1e-10), 0 * x], axis=1)
    zero = jnp.zeros((1, 1))
    assert 1e18 <= robustness.curvature_radii(line, zero, lipschitz.margin_curvatures(line, zero))[0] <= 1e20
    assert 4.4e7 <= robustness.curvature_radii(bowl, zero, jnp.asarray(1e-27))[0] <= 4.4722e7
    assert 1e27 <= robustness.lipschitz_radii(level, zero, 1e-39)[0] <= 1e29


def test_half_precision_is_widened():
    net = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, 0.0]])
    whole = robustness.curvature_radii(net, jnp.ones((1, 2)), 0.5)
    for dtype in (jnp.float16, jnp.bfloat16):
        np.testing.assert_array_equal(robustness.curvature_radii(net, jnp.ones((1, 2), dtype), 0.5), whole)


def test_pairs_have_their_own_curvatures():
    net = lambda x: jnp.concatenate([2 - jax.nn.softplus(4 * x) - jax.nn.softplus(-4 * x), 0 * x], axis=1)
    x = jnp.array([[0.3], [-0.3], [0.0], [1.5], [-1.5]])
    z = lambda r: 2 - np.logaddexp(0, 4 * r) - np.logaddexp(0, -4 * r)
    edge = next(r for r in np.linspace(0, 1, 100_001) if z(r) <= 0)
    curvatures = lipschitz.margin_curvatures(net, x[:1])
    assert float(curvatures[1, 0]) < 1e-3 < float(curvatures[0, 1])
    radii, truth = robustness.curvature_radii(net, x, curvatures), np.abs(np.abs(np.asarray(x)[:, 0]) - edge)
    assert np.all(radii <= truth)
    np.testing.assert_allclose(radii[3:], truth[3:], rtol=0.1)  # convex from there


def test_lipschitz_limits_are_those_of_the_predicted_class():
    net = lambda x: x @ jnp.array([[1.0, -1.0]])
    limits = jnp.array([[0.0, 2.0], [8.0, 0.0]])
    radii = robustness.lipschitz_radii(net, jnp.array([[1.0], [-1.0]]), limits)
    np.testing.assert_allclose(radii, [1, 0.25], rtol=1e-4)


@pytest.mark.parametrize("turn", range(3))
def test_every_class_counts(turn):
    order = np.roll([0, 1, 2], turn)
    net = lambda x: jnp.stack([x[:, 0], 0.9 * x[:, 0], -20 * x[:, 1]], axis=1)[:, order]
    x = jnp.array([[1.0, 0.1]])
    assert float(robustness.lipschitz_radii(net, x, lipschitz.margins(net, x))[0]) <= 3 / np.hypot(1, 20)
    assert robustness.curvature_radii(net, x, jnp.zeros((3, 3)))[0] <= 3 / np.hypot(1, 20)


def test_margins_below_their_rounding_are_not_certified():
    net = lambda x: jnp.concatenate([1e4 + x, 1e4 + 0 * x], axis=1)
    x = jnp.array([[0.004]])
    assert float(robustness.lipschitz_radii(net, x, 1.0)[0]) == 0
    assert robustness.curvature_radii(net, x, 0.0)[0] == 0


def test_gradients_that_cancel_certify_no_more():
    net = lambda x: jnp.stack([1e8 * x[:, 0] + (x[:, 0] + 1), 1e8 * x[:, 0]], 1)
    assert robustness.curvature_radii(net, jnp.zeros((1, 2)), 0.0)[0] <= 1


@pytest.mark.parametrize("scale", [1e-15, 1e-19, 1e-23])
def test_small_logits(scale):
    net = lambda x: jnp.stack([scale * (x[:, 0] + x[:, 1]), 0 * x[:, 0]], 1)
    assert robustness.curvature_radii(net, jnp.ones((1, 2)), 0.0)[0] <= 2**0.5


def test_a_network_that_changes_is_compiled_again():
    class Net:
        a, b = 0.1, 1.0

        def __call__(self, x):
            return jax.nn.softplus(4 * x) * jnp.array([[self.a, 0.0]]) + jnp.array([[self.b, 0.0]])

    net, x = Net(), jnp.ones((1, 1))
    robustness.curvature_radii(net, x, lipschitz.margin_curvatures(net, x))
    net.a, net.b = -0.3, 1.4
    assert robustness.curvature_radii(net, x, lipschitz.margin_curvatures(net, x))[0] <= 0.1652


def test_an_empty_batch_has_no_radii():
    assert robustness.curvature_radii(linear, jnp.ones((0, 2)), 0.0).shape == (0,)


@pytest.mark.parametrize("slack", ["taken off", "forgotten"])
def test_what_floats_may_add_to_a_dual_is_taken_off(slack):
    """Values and gradients wrong by what is allowed for, each in the worst direction, where the dual's terms cancel."""
    rng = np.random.default_rng(SEED)
    cases, size = 2000, 8
    allowed = robustness._slack(jnp.float32, jnp.float32)
    x0, gradient = rng.normal(size=(2, cases, size))
    x = x0 + rng.normal(size=(cases, size)) * 10 ** rng.uniform(-3, 0, (cases, 1))
    below = 10 ** rng.uniform(-2, 1, cases)
    eta = rng.uniform(0.01, 0.9, cases) / below
    steep = np.linalg.norm(gradient, axis=1) * rng.uniform(1, 30, cases)
    x0, x, below, eta, steep = (np.float64(np.float32(a)) for a in (x0, x, below, eta, steep))
    moved = x - x0
    slope = moved + eta[:, None] * gradient
    fell = np.sum(slope**2, axis=1) / (1 - eta * below)
    half = np.sum(moved**2, axis=1)
    # The margin for which the dual is a little above 0.
    value = (fell - half + 10 ** rng.uniform(-4, 0, cases)) / (2 * eta)
    logits = np.abs(value) * rng.uniform(1, 30, cases)
    truth = half + 2 * eta * value - fell
    wrong = 0.9 * allowed
    computed = value + wrong * logits
    aside = slope / np.linalg.norm(slope, axis=1, keepdims=True)
    shorter = gradient - wrong * steep[:, None] * aside * np.minimum(1, np.linalg.norm(slope, axis=1) / steep)[:, None]
    numbers = [jnp.asarray(a, jnp.float32) for a in (x0, below, steep, computed, logits, shorter, x, eta)]

    @jax.jit
    @jax.vmap
    def duals(x0, below, steep, value, size, gradient, x, eta):
        pair = robustness._Pair(x0, 0, 1, below, below, steep, allowed if slack == "taken off" else 0.0)
        return robustness._dual(value, size, gradient, x, eta, pair)

    found = np.asarray(duals(*numbers), np.float64)
    if slack == "taken off":
        assert np.all(found <= truth)
        useful = truth > 1e-3 * (half + 2 * eta * logits + fell + eta * steep)
        assert useful.sum() > 100
        assert np.mean(found[useful] > 0) > 0.8  # and it is of use where the terms do not all cancel
    else:
        assert np.mean(found > truth) > 0.9


def test_an_attack_ends_no_worse_than_it_began():
    net = lambda x: jnp.stack([jnp.sin(3 * x[:, 0]) + 0.5 * x[:, 1], jnp.cos(2 * x[:, 1])], axis=1)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((20, 2)), jnp.float32)
    y = jnp.argmax(net(x), axis=1)
    margin = lambda z: np.asarray(net(z)[jnp.arange(20), y] - net(z)[jnp.arange(20), 1 - y])
    more = margin(robustness.attack(net, x, y, 0.3, key=jax.random.key(0), steps=40, restarts=3))
    assert np.all(more <= margin(x))
    one = margin(robustness.attack(net, x, y, 0.3, key=jax.random.key(0), steps=1, restarts=1))
    assert more.mean() < one.mean()
