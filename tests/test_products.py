"""Products of two signals, attention and gates: never below dense Jacobians, sizes never below what is computed."""

import contextlib
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from fantastic4 import lipschitz
from fantastic4.expression import X
from fantastic4.lipschitz.fixed import Input
from fantastic4.lipschitz.graph import Label, Signal
from fantastic4.lipschitz.propagation import size
from fantastic4.lipschitz.trace import Walk

SEED = int(os.environ.get("FUZZ_SEED", 20211))
RNG = np.random.default_rng(11)
W, V, U = (RNG.standard_normal((4, 4)).astype(np.float32) for _ in range(3))
HEADS = RNG.standard_normal((4, 2, 3)).astype(np.float32)
TAPS = RNG.standard_normal((3, 4, 2)).astype(np.float32)
SHAPE = (3, 4)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
SAW = np.float32([[1, -2, 0.5, 3]])


def points(shape, count=24):
    """Of several sizes; alike along the last axis but for a little, where what divides by a spread is steepest."""
    rng = np.random.default_rng(SEED)
    any_ = rng.standard_normal((count, *shape)) * np.geomspace(0.02, 30, count).reshape(-1, *(1,) * len(shape))
    alike = np.broadcast_to(any_[..., :1], any_.shape) + 1e-2 * rng.standard_normal(any_.shape)
    one = np.zeros((4, *shape))
    one[0].flat[0], one[1].flat[-1], one[2][..., -1], one[3][0] = 50, -50, 20, 20
    corners = np.array(list(itertools.product((0, 50, -50), repeat=shape[0]))) if shape in ((2,), (3,)) else any_[:0]
    return np.concatenate([any_, alike, one, np.zeros((1, *shape)), corners])


def steepest_seen(fn, shape, at=None):
    """The largest norm of a dense Jacobian in float64: a number that no bound may be below."""
    with jax.enable_x64(True):
        at = jnp.asarray(points(shape) if at is None else at, jnp.float64)
        jacobians = jax.jit(jax.vmap(jax.jacrev(lambda x: jnp.ravel(fn(x)))), compiler_options=QUICK)(at)
        flat = np.asarray(jacobians).reshape(len(at), jacobians.shape[1], int(np.prod(shape)))
        return float(np.linalg.norm(flat, 2, axis=(1, 2)).max()) if flat.size else 0.0


def bound(fn, shape):
    return float(lipschitz.bound(fn, jax.ShapeDtypeStruct(shape, jnp.float32)).value)


def behind_a_barrier(x):
    """The square of a signal of many operations, beside one that is small."""
    b = jnp.tanh(x) @ jnp.full((1, 1), 3.0, x.dtype)
    for _ in range(3):
        b = 0.9 * b + 0.1 * jnp.sin(b)
    b = b + jnp.tanh(b)
    _, b = lax.optimization_barrier((0.001 * jnp.tanh(x), b))
    return b**2


def test_each_of_several_has_its_own_size():
    with contextlib.suppress(lipschitz.UnboundedError):
        found = bound(behind_a_barrier, (1,))
        assert steepest_seen(behind_a_barrier, (1,), np.linspace(-3, 3, 601)[:, None]) * (1 - 1e-12) <= found


def unit(x):
    return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 0.1)


def centred(x):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 0.1)


def length_of(x):
    return jnp.sqrt(jnp.sum(x * x, -1) + 0.01)


def conv(x, kernel):
    return lax.conv_general_dilated(
        x[None], jnp.asarray(kernel, x.dtype), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0]


def rounds(x):
    return lax.scan(lambda c, row: (jnp.tanh(c + row), jnp.sin(row) * c), jnp.ones(4, x.dtype), x)


# Arrays of which each is bounded, whatever x is.
BOUNDED = {
    "squashed": lambda x: jnp.tanh(x) @ W,
    "normalised": unit,
    "normalised, a row at a time": lambda x: unit(x)[1],
    "less the mean": centred,
    "layer": lambda x: centred(x) * SAW + SAW[:, ::-1],
    "layers": lambda x: nn.gelu((centred(x) * SAW + 2) @ W + 3) @ V - 1,
    "swish": lambda x: nn.silu(unit(x) @ W) * 2,
    "softmax": lambda x: nn.softmax(x @ W),
    "softmax over the first axis": lambda x: nn.softmax(x, 0) @ V,
    "heads": lambda x: jnp.einsum("td,dhe->the", unit(x), HEADS),
    "heads, another order": lambda x: jnp.einsum("dhe,td->hte", HEADS, unit(x)),
    "a constant before": lambda x: U[:, :3] @ unit(x),
    "moved": lambda x: jnp.transpose(unit(x).reshape(3, 2, 2), (2, 0, 1))[::-1],
    "cut": lambda x: unit(x)[:, 1:3],
    "repeated": lambda x: jnp.repeat(unit(x), 2, -1),
    "side by side": lambda x: jnp.concatenate([unit(x), jnp.tanh(x) @ W, jnp.full((3, 1), 7.0, x.dtype)], -1),
    "stacked": lambda x: jnp.stack([unit(x), centred(x)]),
    "padded": lambda x: jnp.pad(unit(x), 1, constant_values=-4),
    "picked": lambda x: unit(x)[np.array([2, 0, 2])],
    "split": lambda x: jnp.split(centred(x) @ W, 2, -1)[1],
    "divided": lambda x: centred(x) / SAW,
    "powers": lambda x: (unit(x) @ W) ** 3 + jnp.square(centred(x)),
    "exponentials": lambda x: jnp.exp(unit(x) @ W),
    "sums": lambda x: jnp.sum(centred(x) @ W + 1, 0),
    "means": lambda x: unit(x).mean(-1),
    "largest": lambda x: jnp.max(centred(x) @ W, -1),
    "the larger": lambda x: jnp.maximum(unit(x) @ W, centred(x)),
    "rectified": lambda x: nn.relu(centred(x) @ W - 0.3),
    "chosen": lambda x: jnp.where(SAW > 0, centred(x), unit(x) @ W),
    "convolved": lambda x: conv(unit(x), TAPS) + 1,
    "products": lambda x: (unit(x) @ W) * (centred(x) @ V),
    "dot products": lambda x: (unit(x) @ W) @ (centred(x) @ V).T,
    "means by softmax": lambda x: nn.softmax(unit(x) @ unit(x).T) @ (unit(x) @ W),
    "called": lambda x: jax.jit(lambda y: nn.leaky_relu(y @ W))(unit(x)),
    "carried": lambda x: rounds(x)[0],
    "of each round": lambda x: rounds(x)[1],
    "mapped": lambda x: lax.map(lambda row: unit(row) @ W, x),
    "one of two": lambda x: lax.cond(jnp.asarray(True), lambda y: y @ W, lambda y: y @ V, unit(x)),
    "shifted": lambda x: unit(x) - 3,
    "scaled and shifted": lambda x: centred(x) * SAW + 3,
    "sums of rows and columns": lambda x: unit(x) + unit(x.T).T,
    "rows of many sizes": lambda x: lax.map(lambda row: row @ W, (unit(x) @ V) * np.float32([[1], [5], [9]])),
    "differences": lambda x: centred(x) - unit(x) - 3,
    "the difference of one": lambda x: unit(x) - 2 * unit(x),
}  # fmt: skip


def size_of(fn, shape):
    """What is known of how large an output is."""
    closed = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct(shape, jnp.float32))
    walk = Walk()
    node = Input(Label("input"), (int(np.prod(shape)),), ())
    (out,) = walk.closed(closed, [Signal(node, shape, None, X, node.label)])
    return size(walk, out)


@pytest.mark.parametrize("name", BOUNDED)
def test_sizes(name):
    """Of every entry, and of rows along each axis: never below what is computed, and of its magnitude."""
    fn = BOUNDED[name]
    found = size_of(fn, SHAPE)
    with jax.enable_x64(True):
        values = np.asarray(jax.jit(jax.vmap(fn), compiler_options=QUICK)(jnp.asarray(points(SHAPE, 200))))
    assert np.all(np.abs(values).max(0) <= np.float64(found.entries))
    assert np.abs(values).max() * 8 > float(found.most)
    for axis in range(values.ndim - 1):
        rows = np.linalg.norm(values, axis=axis + 1).max(0)
        assert np.all(rows <= np.float64(found.length((axis,))))
    if values.ndim > 2:
        norms = np.linalg.norm(np.moveaxis(values, 0, -3).reshape(-1, *values.shape[-2:]), 2, axis=(1, 2))
        axes = range(values.ndim - 1)
        assert norms.max() <= float(found.norm(axes[-2:-1], axes[-1:]))


def test_rows_that_are_normalised_together_are_shorter_than_their_entries_say():
    """Of n entries by √n; so is what a matrix makes of them."""
    found = size_of(lambda x: unit(x) @ W, SHAPE)
    np.testing.assert_allclose(found.length((1,)), np.linalg.norm(W, 2) * np.ones(3), rtol=2e-3)
    np.testing.assert_allclose(found.entries, np.broadcast_to(np.linalg.norm(W, axis=0), SHAPE), rtol=1e-4)
    heads = size_of(BOUNDED["heads"], SHAPE).length((2,))
    np.testing.assert_allclose(heads, np.tile([np.linalg.norm(HEADS[:, h], 2) for h in (0, 1)], (3, 1)), rtol=2e-3)


UNBOUNDED = {
    "products": lambda x: x * jnp.tanh(x[::-1]),
    "dot products": lambda x: x @ x.T,
    "one of them": lambda x: unit(x) @ x.T,
    "shifted by the input": lambda x: (unit(x) + x) @ unit(x).T,
    "attention": lambda x: nn.softmax(x @ x.T) @ x,
    "divided": lambda x: (1 / (jnp.abs(x) + 1)) @ (jnp.log1p(jnp.abs(x)) * SAW).T,
    "a gate": lambda x: nn.sigmoid(x) * (x @ W),
    "some of it": lambda x: jnp.where(SAW > 0, unit(x), x) @ unit(x).T,
    "some beside it": lambda x: jnp.concatenate([unit(x), x]) @ unit(x).T,
    "limited on no side": lambda x: jnp.maximum(x, -jnp.inf) @ unit(x).T,
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_what_is_not_bounded_has_no_constant(name):
    with pytest.raises(lipschitz.UnboundedError, match=r"not both known to be bounded.*behind a normalisation"):
        bound(UNBOUNDED[name], SHAPE)


UNKNOWN = {
    "a quotient": lambda x: jnp.tanh(x) / jnp.sin(x),
    "a negative power": lambda x: jnp.tanh(x) ** -2,
    "the input": lambda x: x,
    "a logarithm": lambda x: jnp.log(jnp.abs(jnp.tanh(x))),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_sizes_that_are_not_known(name):
    assert size_of(UNKNOWN[name], SHAPE) is None


def attention(x, mask=None):
    h = centred(x)
    return jax.nn.dot_product_attention(h[None, :, None] @ W, h[None, :, None] @ V, h[None, :, None] @ U, mask=mask)


def steep(x):
    """The square of its largest slope is more than its largest value times its largest curvature."""
    return jnp.tanh(x) * (1 - jnp.tanh(x) ** 2)


CAUSAL = np.tril(np.ones((3, 3), bool))
ENDS = np.float32([4.0, -4.0])


def nearly(x, at=ENDS):
    """Where tanh hardly moves: the numbers ±1, but for a little."""
    return jnp.tanh(at + 1e-3 * x)


# The function, the shape of its input, and its constant where that is known.
PROGRAMS = {
    "attention": (attention, SHAPE, None),
    "with a mask": (lambda x: attention(x, CAUSAL), SHAPE, None),
    "in words": (lambda x: nn.softmax(unit(x) @ W @ unit(x).T / 2) @ (unit(x) @ V), SHAPE, None),
    "scores on the other side": (
        lambda x: nn.softmax(unit(x) @ W @ unit(x).T, 0).T @ (unit(x) @ V), SHAPE, None
    ),
    "values on the left": (lambda x: (unit(x) @ V).T @ nn.softmax(unit(x) @ W @ unit(x).T, 0), SHAPE, None),
    "not over what is summed": (lambda x: nn.softmax(unit(x) @ W @ unit(x).T, 0) @ (unit(x) @ V), SHAPE, None),
    "over two axes": (lambda x: nn.softmax(unit(x) @ W @ unit(x).T, (0, 1)) @ (unit(x) @ V), SHAPE, None),
    "some of the weights": (lambda x: nn.softmax(unit(x) @ W @ unit(x).T)[:, :2] @ (unit(x) @ V)[:2], SHAPE, None),
    "weights twice": (
        lambda x: jnp.tile(nn.softmax(unit(x) @ W @ unit(x).T), (1, 2)) @ jnp.tile(unit(x) @ V, (2, 1)), SHAPE, None
    ),
    "rows twice": (lambda x: jnp.tile(nn.softmax(unit(x) @ unit(x).T), (2, 1)) @ unit(x), SHAPE, None),
    "one row for all": (lambda x: nn.softmax(jnp.tile(unit(x)[:1] @ unit(x).T, (3, 1))) @ unit(x), SHAPE, None),
    "scores of one softmax in two rows": (
        lambda x: nn.softmax((unit(x) @ unit(x)[:2].T).ravel()).reshape(3, 2) @ unit(x)[:2], SHAPE, None
    ),
    "scores turned": (lambda x: nn.softmax((unit(x) @ W @ unit(x).T).T * 3) @ (unit(x) @ V), SHAPE, None),
    "negative scores": (lambda x: nn.softmax(-2 * unit(x) @ unit(x).T) @ unit(x), SHAPE, None),
    "scores of other scores": (lambda x: nn.softmax((unit(x) @ unit(x).T)[::-1]) @ unit(x), SHAPE, None),
    "bilinear": (lambda x: jnp.sum(unit(x) @ W * centred(x), -1), SHAPE, None),
    "gated": (lambda x: (nn.silu(unit(x) @ W) * (unit(x) @ V)) @ U, SHAPE, None),
    "excited": (lambda x: centred(x) * nn.sigmoid(centred(x).mean(0) @ W), SHAPE, None),
    "gram": (lambda x: jnp.tanh(x) @ jnp.tanh(x).T, SHAPE, None),
    "batched": (lambda x: jnp.einsum("abc,adc->abd", unit(x), jnp.tanh(x)), (2, 3, 2), None),
    "of one number": (lambda x: jnp.sin(x)[:1] * jnp.cos(x)[1:], (2,), None),
    "between": (lambda x: (1 - nn.sigmoid(x @ W)) * jnp.tanh(x) + nn.sigmoid(x @ W) * jnp.sin(x), SHAPE, None),
    "not quite between": (
        lambda x: (1 - nn.sigmoid(x @ W)) * jnp.tanh(x) + nn.sigmoid(x @ V) * jnp.sin(x), SHAPE, None
    ),
    "beyond": (lambda x: (1 - 2 * jnp.tanh(x @ W)) * jnp.tanh(x) + 2 * jnp.tanh(x @ W) * jnp.sin(x), SHAPE, None),
    # What means by softmax are not: tight where they would be taken for some.
    "rows of weights twice, by scores": (
        lambda x: jnp.tile(nn.softmax(x[:2])[None], (2, 1)) @ nearly(x[2:]), (4,), 1.0
    ),
    "weights of two softmaxes, by scores": (
        lambda x: nn.softmax(x[:6].reshape(2, 3), 0) @ nearly(x[6:], np.float32([4, -4, 4])), (9,), 0.75**0.5
    ),
    "weights twice, by scores": (
        lambda x: jnp.tile(nn.softmax(x[:2]), 2) @ nearly(x[2:], np.float32([4, -4, 4, -4])), (6,), 2**0.5
    ),
    "weights times three, by scores": (lambda x: (3 * nn.softmax(x[:2])) @ nearly(x[2:]), (4,), 3 * 0.5**0.5),
    "rows of scores twice, by a query": (
        lambda x: nn.softmax(jnp.tile(5 * jnp.tanh(x[:1])[None] @ nearly(x[1:3])[None], (2, 1))) @ nearly(x[3:]),
        (5,), 50**0.5,
    ),
    "scores times two, by a query": (
        lambda x: nn.softmax(2 * (5 * jnp.tanh(x[:1])[None] @ nearly(x[1:3])[None])) @ nearly(x[3:]), (5,), 10.0
    ),
    "one softmax of two queries": (
        lambda x: nn.softmax(jnp.tanh(x[:2])[:, None] @ nearly(x[2:4])[None], (0, 1)).ravel()
        @ nearly(x[4:], np.float32([4, -4, 4, -4])), (8,), None,
    ),
    "one softmax, two means": (lambda x: nn.softmax(x[:4]).reshape(2, 2) @ nearly(x[4:]), (6,), None),
    "weights that add up to something else": (
        lambda x: (1 - nn.sigmoid(x[1])) * jnp.tanh(x[0]) + nn.sigmoid(x[2]) * jnp.sin(x[0]), (3,), None
    ),
    "weights beyond 1": (
        lambda x: (1 - 2 * jnp.tanh(x[1] / 10)) * jnp.tanh(x[0]) + 2 * jnp.tanh(x[1] / 10) * jnp.sin(-x[0]), (2,), None
    ),
    "steep": (lambda x: steep(x) * steep(x @ np.eye(1)), (1,), None),
    # Where one of what they are made of moves, and the others hardly do.
    "means, by scores": (
        lambda x: nn.softmax(x[:2]) @ nearly(x[2:]), (4,), 0.5**0.5
    ),
    "means, by a query": (
        lambda x: nn.softmax(5 * jnp.tanh(x[:1]) @ nearly(x[1:3])[None]) @ nearly(x[3:]),
        (5,), 5.0,
    ),
    "means, by keys": (
        lambda x: nn.softmax(nearly(x[:3], 4)[:, None] @ jnp.tanh(x[3:5])[None]) @ nearly(x[5:]),
        (7,), 1.5**0.5,
    ),
    "means, by vectors": (
        lambda x: nn.softmax(40 * nearly(x[:6].reshape(3, 2))) @ jnp.tanh(x[6:]), (8,), 3**0.5
    ),
    "between, by what chooses": (
        lambda x: (1 - nn.sigmoid(x[:2])) * nearly(x[2:4])
        + nn.sigmoid(x[:2]) * nearly(x[4:], -ENDS), (6,), 0.5,
    ),
    "between, by what it is multiplied with": (
        lambda x: (
            (1 - nn.sigmoid(x[:2] / 100 - 6)) * (3 * nearly(x[2:4])) + nn.sigmoid(x[:2] / 100 - 6) * nearly(x[4:6])
        ) * jnp.tanh(x[6:]), (8,), 3.0,
    ),
    "product of three": (
        lambda x: (3 * nearly(x[:2])) * (3 * nearly(x[2:4])) * jnp.tanh(x[4:]), (6,), 9.0
    ),
    "means of longer vectors, by scores": (
        lambda x: nn.softmax(x[:2]) @ nearly(x[2:].reshape(2, 3), ENDS[:, None]), (8,), 1.5**0.5
    ),
    "product, by one": (lambda x: jnp.tanh(x[:2]) * nearly(x[2:]) * 3, (4,), 3.0),
    "matrices, by one": (
        lambda x: jnp.tanh(x[:2])[None] @ nearly(x[2:].reshape(2, 2)),
        (6,), 2.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_products_of_what_is_bounded(name):
    fn, shape, exact = PROGRAMS[name]
    found, seen = bound(fn, shape), steepest_seen(fn, shape)
    assert seen * (1 - 1e-12) <= found
    if exact is not None:
        assert exact * 0.98 <= found <= exact * 1.03
        assert seen >= exact * 0.97


CURVED = (
    "steep",
    "between",
    "beyond",
    "of one number",
    "product, by one",
    "matrices, by one",
    "gram",
    "means, by scores",
)


@pytest.mark.parametrize("name", CURVED)
def test_curvature_of_products(name):
    fn, shape, _ = PROGRAMS[name]
    found = float(lipschitz.curvature(lambda x: jnp.sum(fn(x)), jax.ShapeDtypeStruct(shape, jnp.float32)).value)
    with jax.enable_x64(True):
        at = jnp.asarray(points(shape))
        hessians = np.asarray(
            jax.jit(jax.vmap(jax.hessian(lambda x: jnp.sum(fn(x)))), compiler_options=QUICK)(at)
        ).reshape(len(at), -1)
    size = int(np.prod(shape))
    assert np.linalg.norm(hessians.reshape(-1, size, size), 2, axis=(1, 2)).max() * (1 - 1e-12) <= found


class Transformer(nn.Module):
    """Pre-norm, with a gated unit."""

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(epsilon=0.1)(x)
        x = x + nn.MultiHeadDotProductAttention(2)(h, h, mask=nn.make_causal_mask(x[..., 0]))
        h = nn.RMSNorm(epsilon=0.1)(x)
        return x + nn.Dense(4)(nn.silu(nn.Dense(6)(h)) * nn.Dense(6)(h))


class Excited(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.GroupNorm(2, epsilon=0.1)(nn.Conv(4, (3,))(x))
        return h * nn.sigmoid(nn.Dense(4)(nn.relu(nn.Dense(2)(h.mean(1, keepdims=True)))))


class Recurrent(nn.Module):
    cell: type

    @nn.compact
    def __call__(self, x):
        return nn.RNN(self.cell(3, param_dtype=x.dtype))(x)


MODULES = {
    "transformer": Transformer(),
    "squeeze and excitation": Excited(),
    "gru": Recurrent(nn.GRUCell),
    "minimal gated unit": Recurrent(nn.MGUCell),
    "lstm": Recurrent(nn.OptimizedLSTMCell),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_flax(name):
    x, net = jnp.ones((1, 3, 4)), MODULES[name]
    noise = lambda leaf: leaf + jax.random.normal(jax.random.key(SEED + leaf.size), leaf.shape) / 4
    variables = jax.tree.map(noise, net.init(jax.random.key(SEED), x))
    of = lambda v: lipschitz.bound(lambda x: net.apply(v, x), x).value
    found = float(of(variables))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
        plain = lambda x: net.apply(wide, x)
    assert steepest_seen(plain, x.shape) * (1 - 1e-12) <= found


def test_gradients_by_the_matrices():
    """Under jit: those of finite differences."""

    def of(matrices):
        q, k, v = matrices
        fn = lambda x: nn.softmax(unit(x) @ q @ (centred(x) @ k).T) @ (unit(x) @ v) * nn.sigmoid(unit(x) @ q)
        return lipschitz.bound(fn, jnp.ones(SHAPE)).value

    value, slopes = jax.jit(jax.value_and_grad(of))((W, V, U))
    assert value == pytest.approx(float(of((W, V, U))), rel=1e-4)
    for i, slope in enumerate(slopes):
        step = [m + 1e-2 * np.asarray(slope) / np.linalg.norm(slope) if j == i else m for j, m in enumerate((W, V, U))]
        assert float(of(step)) - float(value) == pytest.approx(1e-2 * float(np.linalg.norm(slope)), rel=0.1)


def test_a_bound_beyond_all_floats_is_infinite():
    """And not NaN, which would say that something is none."""
    cell = nn.RNN(nn.LSTMCell(8))
    x = jnp.ones((1, 40, 4))
    variables = jax.tree.map(lambda leaf: 30 * leaf, cell.init(jax.random.key(0), x))
    assert bound(lambda x: cell.apply(variables, x)[:, -1], x.shape) == np.inf


def test_attention_of_nnx():
    layer = nnx.MultiHeadAttention(2, 4, 4, decode=False, rngs=nnx.Rngs(0))
    net = lambda x: layer(centred(x)[None])
    assert steepest_seen(net, SHAPE) * (1 - 1e-6) <= bound(net, SHAPE)  # in float32


def test_a_gru_does_not_grow_with_what_it_has_kept():
    """Its state stays between -1 and 1, however long it runs: each step adds what one adds."""
    cell = nn.GRUCell(3)
    variables = cell.init(jax.random.key(0), jnp.zeros((1, 3)), jnp.zeros((1, 2)))
    quiet = jax.tree.map(lambda leaf: leaf / 64, variables)
    run = lambda x: nn.RNN(cell).apply({"params": {"cell": quiet["params"]}}, x)[:, -1]
    few, many = bound(run, (1, 10, 2)), bound(run, (1, 20, 2))
    assert many < 3 * few


def test_one_of_two_that_is_not_known_while_tracing():
    def fn(flag, cases):
        return lambda x: lax.cond(flag, *cases, nearly(x[:2]) + 1) * jnp.tanh(x[2:])

    cases = (lambda y: 5 * y, lambda y: y)
    for flag, both in ((True, cases), (False, cases[::-1])):
        found = jax.jit(lambda flag: lipschitz.bound(fn(flag, both), jnp.ones(4)).value)(flag)
        assert steepest_seen(fn(flag, both), (4,)) * (1 - 1e-12) <= found <= 10.2


def test_constants_that_are_no_numbers_are_told():
    for bad in (np.nan, np.inf):
        matrix = W.copy()
        matrix[1, 2] = bad
        assert not np.isfinite(bound(lambda x: (unit(x) @ matrix) @ jnp.tanh(x).T, SHAPE))


def test_of_every_magnitude():
    """Squares vanish or overflow; what is 0 stays near it."""
    for by in (1e-30, 1e-12, 1e12, 1e18):
        fn = lambda x: (unit(x) * np.float32(by)) @ unit(x).T
        assert steepest_seen(fn, SHAPE) * (1 - 1e-6) <= bound(fn, SHAPE) <= 100 * by
    assert bound(lambda x: (unit(x) @ np.zeros((4, 4), np.float32)) @ unit(x).T, SHAPE) <= 1e-12


def big(x):
    return np.float32(1e38) * jnp.tanh(x[2:])


def far(v):
    return v / jnp.sqrt(jnp.sum(v * v) + 1e12)


TINY = np.float32([1e-39, 2e-39])  # as the compiler may take for 0
# What vanishes in float32 on the way, and does not where it ends.
VANISHING = {
    "twice a small number": lambda x: jnp.dot(jnp.tanh(1e-6 * x[:2]) * 1e-20 * 1e-20, big(x)),
    "of what is normalised": lambda x: jnp.dot(far(x[:2]) * 1e-20 * 1e-20, big(x)),
    "of probabilities": lambda x: jnp.dot(nn.softmax(1e-6 * x[:2]) * 1e-20 * 1e-20, big(x)),
    "of the larger": lambda x: jnp.dot(jnp.maximum(jnp.tanh(1e-6 * x[:2]), 0) * 1e-20 * 1e-20, big(x)),
    "over large numbers": lambda x: jnp.dot(jnp.tanh(1e-6 * x[:2]) / np.float32([3e38, 2e38]), big(x)),
    "times subnormal numbers": lambda x: jnp.dot(far(x[:2]) * TINY, big(x)),
    "squashed, times subnormal numbers": lambda x: jnp.dot(jnp.tanh(1e-6 * x[:2]) * TINY, big(x)),
}


@pytest.mark.parametrize("name", VANISHING)
def test_sizes_do_not_vanish(name):
    fn = VANISHING[name]
    at = np.float64([[1e6, 1e6, 50, 50], [1e6, 1e6, 0, 0], [1e8, 1e8, 0, 0]])
    assert steepest_seen(fn, (4,), at) * (1 - 1e-6) <= bound(fn, (4,))


def test_a_nan_among_thousands_is_told():
    shape = (64, 64)
    eye, nan = np.eye(64, dtype=np.float32), np.where(np.arange(64) == 7, np.nan, 0).astype(np.float32)
    for fn in (
        lambda x: jnp.where(np.arange(64) == 7, np.float32(np.nan), unit(x)) @ unit(x).T,
        lambda x: (unit(x) @ eye + nan) * unit(x),
        lambda x: jnp.max(unit(x) @ eye + nan, 1, keepdims=True) * unit(x),
    ):
        assert np.isnan(bound(fn, shape))


# The function and the shape of its input: each has a bound, none an error of another kind.
ACCEPTED = {
    "spread over rows": (lambda x: (unit(x) @ W) * (unit(x) @ V)[:1], SHAPE),
    "spread over columns": (lambda x: (unit(x) @ W) * (unit(x) @ V).mean(1, keepdims=True), SHAPE),
    "an outer product": (lambda x: (unit(x) @ W)[1][:, None] * (unit(x) @ V)[2][None], SHAPE),
    "the square of what is normalised": (lambda x: unit(x) ** 2, SHAPE),
    "the exponential of probabilities": (lambda x: jnp.exp(3 * nn.softmax(x)), SHAPE),
    "entropy of a kind": (lambda x: nn.softmax(x) * jnp.log(nn.softmax(x) + 0.01), SHAPE),
    "a logarithm beside what it is of": (
        lambda x: (lambda p: jnp.concatenate([jnp.log(p + 0.1), p], -1))(nn.softmax(x)), SHAPE
    ),
    "a logarithm less what it is of": (lambda x: (lambda p: jnp.log(p + 0.1) - p[::-1])(nn.softmax(x)), SHAPE),
    "a logarithm of a norm beside it": (
        lambda x: (lambda n: jnp.stack([jnp.log(n), jnp.tanh(n)]))(length_of(x)), SHAPE
    ),
    "no rows": (lambda x: unit(x)[:0] @ unit(x).T, SHAPE),
    "nothing between": (lambda x: unit(x)[:, :0] @ unit(x).T[:0], SHAPE),
    "nothing in a matrix": (lambda x: (unit(x)[:, :0] @ np.zeros((0, 4), np.float32)) * unit(x), SHAPE),
    "no columns": (lambda x: (unit(x) @ np.zeros((4, 0), np.float32)) @ jnp.zeros((0, 4)) + unit(x), SHAPE),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_more_that_has_a_bound(name):
    fn, shape = ACCEPTED[name]
    found = bound(fn, shape)
    assert np.isfinite(found)
    assert steepest_seen(fn, shape) * (1 - 1e-12) <= found


def test_many_scales_after_one_another():
    """Deeper than Python's stack; numbers beyond all floats."""
    by = np.float32([1, 0.5, 2, 1]) ** 0.01
    long = lambda x: lax.scan(lambda h, _: (h * by, None), jnp.tanh(x), None, length=1500)[0] @ unit(x).T
    assert bound(long, SHAPE) > 0

    def large(x):
        h = unit(x)
        for _ in range(9):
            h = h * 1e38
        return h @ unit(x).T

    with pytest.raises(lipschitz.UnboundedError, match="too large for a float"):
        bound(large, SHAPE)


def random_program(rng, depth):
    """Of what is bounded, put together at random: (3, 4) to (3, 4)."""
    if depth == 0:
        matrix = draw_matrix(rng)
        return [
            unit,
            centred,
            lambda x: jnp.tanh(x @ matrix),
            lambda x: nn.softmax(x @ matrix, int(matrix[0, 0] > 0)),
            lambda x: jnp.clip(x, -1, 2) @ matrix,
            lambda x: jnp.sin(x)[::-1],
        ][rng.integers(6)]
    a, b, c = (random_program(rng, int(rng.integers(depth))) for _ in range(3))
    matrix, shift = draw_matrix(rng), np.float32(rng.standard_normal(4))
    return [
        lambda x: a(x) * b(x),
        lambda x: nn.softmax(a(x) @ matrix @ b(x).T * 2) @ c(x),
        lambda x: nn.softmax(jnp.where(CAUSAL, a(x) @ b(x).T, -1e9)) @ (c(x) @ matrix + shift),
        lambda x: (lambda z: (1 - z) * a(x) + z * b(x))(nn.sigmoid(c(x) @ matrix)),
        lambda x: (a(x) * shift + 1) @ matrix - b(x),
        lambda x: nn.silu(a(x) @ matrix) * (b(x) + shift),
        lambda x: a(b(x)) * c(x),
        lambda x: jnp.einsum("ij,kj,kl->il", a(x), b(x), c(x)),
        lambda x: lax.map(lambda pair: pair[0] * pair[1] + shift, (a(x), b(x))) @ matrix,
        lambda x: centred(a(x) + jnp.concatenate([b(x)[1:], c(x)[:1]])),
    ][rng.integers(10)]


def draw_matrix(rng):
    return np.float32(rng.standard_normal((4, 4)) * rng.choice([0.1, 1, 3]))


def check_random_programs(seed, count):
    for case in range(count):
        rng = np.random.default_rng((seed, case))
        fn = random_program(rng, 1 + case % 3)
        at = np.concatenate([points(SHAPE), rng.standard_normal((8, *SHAPE)) * 3])
        assert steepest_seen(fn, SHAPE, at) * (1 - 1e-12) <= bound(fn, SHAPE), (seed, case)


def test_random_programs():
    check_random_programs(SEED, 5)


@pytest.mark.fuzz
def test_random_programs_by_the_hundred():
    check_random_programs(SEED, int(os.environ.get("FUZZ_CASES", 300)))
