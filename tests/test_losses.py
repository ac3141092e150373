"""Losses of logits: never below dense Jacobians and Hessians of plain JAX, and equal to what is known."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import nn

from fantastic4 import lipschitz
from fantastic4.lipschitz.losses import Picked
from fantastic4.lipschitz.traced import trace

SEED = int(os.environ.get("FUZZ_SEED", 20211))
RNG = np.random.default_rng(7)
CLASSES, BATCH = 5, 3
ONE, SOME = (CLASSES,), (BATCH, CLASSES)
HOT = np.eye(CLASSES, dtype=np.float32)[2]
SOFT = RNG.dirichlet(np.ones(CLASSES), BATCH).astype(np.float32)
ANY = RNG.standard_normal(SOME).astype(np.float32)
SLOPES = np.float32([1, 2, 3, 1.5, 0.5])
LABELS = np.array([1, 4, 4])


def largest(weights):
    """The largest ‖y - (Σy) e_k‖ over rows y and all k."""
    y = np.atleast_2d(np.float64(weights))
    return max(np.linalg.norm(row - row.sum() * unit) for row in y for unit in np.eye(y.shape[1]))


def total(weights):
    return np.abs(np.atleast_2d(np.float64(weights)).sum(axis=1)).max()


# The function, the shape of its input, its Lipschitz constant, and that of its derivative (None: not looked at).
KNOWN = {
    "softmax_cross_entropy": (lambda z: optax.softmax_cross_entropy(z, HOT), ONE, 2**0.5, 0.5),
    "with labels": (lambda z: optax.softmax_cross_entropy_with_integer_labels(z, 2), ONE, 2**0.5, 0.5),
    "with labels, of a batch": (
        lambda z: optax.softmax_cross_entropy_with_integer_labels(z, LABELS), SOME, 2**0.5, 0.5
    ),
    "smoothed": (
        lambda z: optax.softmax_cross_entropy(z, optax.smooth_labels(HOT, 0.1)), ONE, largest(0.9 * HOT + 0.02), 0.5
    ),
    "at a temperature": (lambda z: optax.softmax_cross_entropy(z / 4, HOT), ONE, 2**0.5 / 4, 0.5 / 16),
    "of a batch": (lambda z: optax.softmax_cross_entropy(z, SOFT), SOME, largest(SOFT), 0.5),
    "mapped": (lambda z: jax.vmap(optax.softmax_cross_entropy)(z, SOFT), SOME, largest(SOFT), 0.5),
    "divergence": (
        lambda z: optax.kl_divergence(nn.log_softmax(z), 0.9 * HOT + 0.02), ONE, largest(0.9 * HOT + 0.02), 0.5
    ),
    "any weights": (lambda z: jnp.sum(ANY * nn.log_softmax(z), -1), SOME, largest(ANY), total(ANY) / 2),
    "over the first axis": (
        lambda z: jnp.sum(ANY * nn.log_softmax(z, 0), 0), SOME, largest(ANY.T), total(ANY.T) / 2
    ),
    "as products": (
        lambda z: jnp.einsum("bn,bn->b", ANY, nn.log_softmax(z)), SOME, largest(ANY), total(ANY) / 2
    ),
    "a product": (lambda z: nn.log_softmax(z) @ ANY[0], SOME, largest(ANY[0]), total(ANY[0]) / 2),
    "the mean": (lambda z: nn.log_softmax(z).mean(-1), SOME, largest(np.full(CLASSES, 0.2)), 0.5),
    "one entry": (lambda z: -nn.log_softmax(z)[2], ONE, 2**0.5, 0.5),
    "one entry of a slice": (lambda z: nn.log_softmax(z)[1:4][1], ONE, 2**0.5, 0.5),
    "two entries": (lambda z: nn.log_softmax(z)[np.array([0, 3])], ONE, 3**0.5, 0.5**0.5),
    "an entry of each": (lambda z: -nn.log_softmax(z)[np.arange(BATCH), LABELS], SOME, 2**0.5, 0.5),
    "an entry of each, their mean": (
        lambda z: -nn.log_softmax(z)[np.arange(BATCH), LABELS].mean(), SOME, (2 / BATCH) ** 0.5, None
    ),
    "all entries of one": (lambda z: nn.log_softmax(z)[1], SOME, CLASSES**0.5, CLASSES**0.5 / 2),
    "less logsumexp": (lambda z: z - nn.logsumexp(z, -1, keepdims=True), SOME, CLASSES**0.5, CLASSES**0.5 / 2),
    "logsumexp less all": (
        lambda z: nn.logsumexp(z, -1)[:, None] - z, SOME, CLASSES**0.5, CLASSES**0.5 / 2
    ),
    "the difference of two": (lambda z: nn.log_softmax(z)[0] - nn.log_softmax(z)[3], ONE, 2**0.5, 0.0),
    "differences of a batch": (
        lambda z: nn.log_softmax(z)[:, :1] - nn.log_softmax(z)[:, 1:], SOME, CLASSES**0.5, 0.0
    ),
    "sigmoid": (lambda z: optax.sigmoid_binary_cross_entropy(z, SOFT), SOME, max(SOFT.max(), 1 - SOFT.min()), None),
    "sigmoid, hard": (lambda z: optax.sigmoid_binary_cross_entropy(z, HOT).sum(), ONE, CLASSES**0.5, None),
    "snake, a slope for each": (lambda z: z + jnp.sin(SLOPES * z) ** 2 / SLOPES, SOME, 2.0, None),
    "huber, far out": (lambda z: optax.huber_loss(z, delta=500.0).sum(), ONE, 500 * CLASSES**0.5, 1.0),
    "huber": (lambda z: optax.huber_loss(z, ANY, delta=0.5), SOME, 0.5, None),
}  # fmt: skip
# What looks alike.
OTHERS = {
    "another class's sum": (lambda z: nn.logsumexp(z, -1) - z[::-1, 0], SOME),
    "a part's sum": (lambda z: nn.logsumexp(z[:2]) - z[3], ONE),
    "a sum of twice as much": (lambda z: nn.logsumexp(2 * z) - z[2], ONE),
    "two labels of one sum": (lambda z: nn.logsumexp(z) - z[np.array([1, 3])], ONE),
    "five times a logit": (lambda z: nn.logsumexp(z) - 5 * z[2], ONE),
    "one label for all": (lambda z: nn.logsumexp(z, -1) - z[0, 0], SOME),
    "weights along the other axis": (lambda z: jnp.sum(ANY * nn.log_softmax(z, 0), 1), SOME),
    "weights along an axis of one": (
        lambda z: jnp.sum(np.float32([[1], [-1], [0], [0], [0]]) * nn.log_softmax(z, 0), 1), (CLASSES, 1)
    ),
    "weights over both": (lambda z: jnp.sum(ANY * nn.log_softmax(z)), SOME),
    "entries of two sums less one another": (lambda z: nn.log_softmax(z)[0] - nn.log_softmax(z)[1], SOME),
    "one that is read twice": (lambda z: nn.log_softmax(z)[np.array([2, 2, 0])], ONE),
    "one beside a logit": (lambda z: nn.log_softmax(z)[2] - z[2], ONE),
    "twice the one less the other": (lambda z: 2 * nn.log_softmax(z)[2] - nn.log_softmax(z)[3], ONE),
    "of all logits and one more": (lambda z: nn.log_softmax(jnp.append(z, 1.0))[np.array([5, 2])], ONE),
    "of logits that are read twice": (lambda z: nn.logsumexp(jnp.append(z, z)) - z[2], ONE),
    "margins of picked entries": (lambda z: nn.log_softmax(z)[:2] @ np.float32([[1.0, -2], [0.5, 0]]), ONE),
    "functions of other entries": (lambda z: nn.softplus(z) * SOFT - nn.softplus(-z[::-1]) * (1 - SOFT), SOME),
    "signs of both": (lambda z: nn.relu(z) * ANY + nn.relu(-z) * ANY[::-1], SOME),
    "the same sign": (lambda z: nn.softplus(z) * SOFT - ANY * -nn.softplus(z), SOME),
    "a matrix's, weighed": (lambda z: jnp.sum(nn.log_softmax(z @ ANY.T) * ANY[0, :3]), ONE),
}  # fmt: skip


def corners(shape):
    """Points at which one entry of every sum is far above the others, and some between."""
    size = int(np.prod(shape))
    rows = np.stack([np.roll(np.eye(CLASSES) * 60, k, axis=1)[:, :] for k in range(CLASSES)])
    tops = np.concatenate([np.tile(r, (1, size // CLASSES)) for r in rows])
    columns = np.repeat(np.eye(size // CLASSES) * 60, CLASSES, axis=1) if size > CLASSES else np.zeros((0, size))
    pairs = np.stack([60.0 * (np.isin(np.arange(size) % CLASSES, [i, i + 1])) for i in range(CLASSES - 1)])
    rng = np.random.default_rng(SEED)
    return np.concatenate([tops, columns, pairs, rng.standard_normal((8, size)) * np.geomspace(0.1, 30, 8)[:, None]])


def seen(fn, shape):
    """Norms of dense Jacobians, and of Hessians of each entry: numbers that no bound may be below."""
    with jax.enable_x64(True):
        flat = lambda v: jnp.ravel(fn(v.reshape(shape)))
        at = jnp.asarray(corners(shape))
        first = np.linalg.norm(np.asarray(jax.jit(jax.vmap(jax.jacrev(flat)))(at)), 2, axis=(1, 2)).max()
        second = np.asarray(jax.jit(jax.vmap(jax.jacfwd(jax.jacrev(flat))))(at))
    return first, np.linalg.norm(second, 2, axis=(2, 3)).max()


@pytest.mark.parametrize("name", KNOWN)
def test_constants_of_losses(name):
    fn, shape, exact, bend = KNOWN[name]
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    first, second = seen(fn, shape)
    found = float(lipschitz.bound(fn, x).value)
    assert first * (1 - 1e-12) <= found
    assert exact * (1 - 1e-7) <= found <= exact * (1 + 1e-4)
    if name != "sigmoid" and not name.startswith(("huber", "snake")):
        assert first >= 0.75 * exact  # so the constant is of this function
    curved = float(lipschitz.curvature(fn, x).value)
    assert second * (1 - 1e-12) <= curved
    if bend is not None:
        assert curved <= bend * (1 + 1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_loss_is_not_taken_for_one(name):
    fn, shape = OTHERS[name]
    first, second = seen(fn, shape)
    assert first * (1 - 1e-12) <= float(lipschitz.bound(fn, jax.ShapeDtypeStruct(shape, jnp.float32)).value)
    if name != "signs of both":
        assert second * (1 - 1e-12) <= float(lipschitz.curvature(fn, jax.ShapeDtypeStruct(shape, jnp.float32)).value)


def test_margins_of_picked_entries_are_those_of_them_alone():
    fn = lambda z: nn.log_softmax(z)[np.array([4, 0])]
    np.testing.assert_allclose(lipschitz.margins(fn, jnp.zeros(ONE)), [[0, 2**0.5], [2**0.5, 0]], rtol=1e-4)


def test_weights_of_every_size_and_none():
    """Their squares vanish or overflow; what is not a number is told, also among thousands."""
    loss = lambda z, y: jnp.sum(y * nn.log_softmax(z))
    for scale in (1e-30, 1e30):
        found = float(lipschitz.bound(lambda z: loss(z, HOT * np.float32(scale)), jnp.zeros(ONE)).value)
        assert 2**0.5 * scale * (1 - 1e-7) <= found <= 2**0.5 * scale * (1 + 1e-4)
    assert float(lipschitz.bound(lambda z: loss(z, 0 * HOT), jnp.zeros(ONE)).value) <= 1e-30
    many = np.ones(5000, np.float32)
    many[17] = np.nan
    assert np.isnan(lipschitz.bound(lambda z: loss(z, many), jnp.zeros(5000)).value)
    assert np.isnan(lipschitz.bound(lambda z: z * many + jnp.tanh(z) * many[::-1], jnp.zeros(5000)).value)


TINY, SMALL = np.float32([1, 2, 3, 4]) * np.float32(1e-25), np.float32([1, 2, 3, 4]) * np.float32(1e-20)
VANISHING = {
    "weights of weights": (lambda z: (((nn.log_softmax(z) * 1e20) * TINY) * 1e-25).sum() * 1e30, largest(TINY * 1e25)),
    "squares of weights": (lambda z: (nn.log_softmax(z) * TINY * TINY).sum() * 1e30, 1e-20),
    "subnormal weights": (lambda z: (nn.log_softmax(z) @ np.full(4, 1e-42, np.float32)) * 1e30, 6e-12),
    "functions of the same entries": (
        lambda z: (((1e20 * z) * SMALL) * 1e-25 + ((1e20 * jnp.abs(z)) * SMALL) * 1e-25) * 1e25, 8.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VANISHING)
def test_weights_that_vanish_on_the_way(name):
    fn, least = VANISHING[name]
    assert least * (1 - 1e-6) <= float(lipschitz.bound(fn, jnp.zeros(4)).value)


def test_weights_that_are_large_on_the_way():
    found = lipschitz.bound(lambda z: ((nn.log_softmax(z) * 1e30) * (SMALL * 1e27)).sum() * 1e-30, jnp.zeros(4)).value
    assert largest(SMALL * 1e27) * (1 - 1e-6) <= found <= largest(SMALL * 1e27) * (1 + 1e-4)
    huge = lambda z: functools.reduce(lambda a, _: a * 1e30, range(12), nn.log_softmax(z)).sum()
    assert lipschitz.bound(huge, jnp.zeros(4)).value == np.inf


def test_roundings_of_many_weights_count():
    """Scales whose products are rounded down, each time, in float32."""
    rng = np.random.default_rng(0)
    product, scales, exact = np.float32(1), [], 1.0
    for _ in range(200):
        drawn = rng.uniform(0.8, 1.2, 2000).astype(np.float32)
        rounded = (product * drawn).astype(np.float32)
        lost = np.float64(rounded) / (np.float64(product) * np.float64(drawn))
        pick = np.argmin(np.where((rounded > 1) & (rounded < 1.3), lost, 2))
        scales.append(drawn[pick])
        product, exact = rounded[pick], exact * np.float64(drawn[pick])
    scaled = lambda z: functools.reduce(
        lambda y, c: y * np.float32([c, 0, 0, 0]), scales[::-1], nn.log_softmax(z)
    ).sum()
    assert 2**0.5 * exact * (1 - 1e-7) <= lipschitz.bound(scaled, jnp.zeros(4)).value <= 2**0.5 * exact * (1 + 1e-3)


def test_classes_that_are_none():
    assert lipschitz.bound(lambda z: nn.log_softmax(z).sum(), jnp.ones((2, 0))).value == 0


def test_labels_that_are_not_known_while_tracing():
    soft = jax.jit(lambda y: lipschitz.bound(lambda z: optax.softmax_cross_entropy(z, y), jnp.zeros(SOME)).value)
    np.testing.assert_allclose(soft(SOFT), largest(SOFT), rtol=1e-4)
    assert np.all(np.isfinite(jax.grad(lambda y: soft(y))(jnp.zeros(SOME))))
    hard = lambda k: lipschitz.bound(lambda z: optax.softmax_cross_entropy_with_integer_labels(z, k), jnp.zeros(SOME))
    with pytest.raises(lipschitz.UnboundedError, match="not known while tracing"):
        jax.jit(hard)(LABELS)


def test_few_entries_are_held_and_many_are_not():
    """Of n - 1 entries √n is no more than of all."""
    held = lambda fn: [type(o.node) for o in trace(fn, jnp.zeros(ONE)).outputs]
    assert held(lambda z: nn.log_softmax(z)[:3]) == [Picked]
    assert held(lambda z: nn.log_softmax(z)[:4]) != [Picked]
    assert held(lambda z: nn.log_softmax(z)[:4][2:]) == [Picked]
