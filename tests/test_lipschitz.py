"""Bounds of whole functions: never below a dense Jacobian of plain JAX, and equal to the constant where it is known.

The truth is made by `jax.jacobian` in float64 at many points; nothing of the package takes part in it. Comparisons
with it are one-sided and have no tolerance but its own rounding. The seed is printed; FUZZ_SEED sets another,
`make fuzz` takes FUZZ_CASES random networks.
"""

import functools
import math
import os
import re
import subprocess
import sys
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

import fantastic4 as f4
from fantastic4 import lipschitz
from fantastic4.lipschitz.sparse import norm_above
from fantastic4.lipschitz.trace import USER_RULES

SEED = int(os.environ.get("FUZZ_SEED", 20211))  # conftest prints it
CASES = int(os.environ.get("FUZZ_CASES", 10_000))
FEW = min(60, int(os.environ.get("FUZZ_CASES", 60)))
RNG = np.random.default_rng(0)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
DTYPE = np.float32  # of constants: the same numbers in float32 and float64


def draw(*shape):
    return RNG.standard_normal(shape).astype(DTYPE)


W, V, B = draw(3, 3), draw(3, 3), draw(3)
TALL, WIDE, STACK = draw(3, 5), draw(5, 3), draw(2, 3, 4)
MASK = np.array([[True, False, True], [False, True, True]])
STEEP = np.array([3, 0], DTYPE)
DYADIC = np.array([0.5, -2.0, 1.0], DTYPE)
APART = np.array([[3, 1], [1, 2], [-2, 3]], DTYPE)
PERMUTED = np.arange(12, dtype=DTYPE).reshape(2, 3, 2) ** 2
NEGATIVE = np.array([-1, -0.5, -1], DTYPE)
MANY = np.array([[0, 5, 60], [3, 1, 2]], np.int32)


def norm(matrix):
    return float(np.linalg.norm(np.asarray(matrix, np.float64), 2))


def flat(fn, shape):
    """The function of a vector, with all its outputs in one vector."""
    return lambda v: jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(fn(v.reshape(shape)))])


def points(shape, seed=0, count=24):
    """Zero-free points of several sizes, a row each."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, math.prod(shape))) * np.geomspace(0.05, 20, count)[:, None]


def steepest_seen(fn, shape, at=None):
    """The largest norm of a dense Jacobian in float64: a number that no bound may be below."""
    return all_seen([(fn, shape, at)])[0]


def all_seen(functions):
    """The same of several functions (with a shape, and points or None), by one program: most of it costs each one."""
    with jax.enable_x64(True):
        at = [jnp.asarray(points(shape) if p is None else p, jnp.float64) for _, shape, p in functions]
        jacobians = [jax.vmap(jax.jacfwd(flat(fn, shape))) for fn, shape, _ in functions]
        found = jax.jit(lambda at: [f(x) for f, x in zip(jacobians, at, strict=True)], compiler_options=QUICK)(at)
        return [float(np.linalg.norm(np.asarray(j, np.float64), 2, axis=(1, 2)).max()) for j in found]


SEEN = {}


def seen_of(table, name):
    """The same of a function in a table by its name, together with its neighbours."""
    names = list(table)
    first = names.index(name) // 16 * 16
    key, neighbours = (id(table), first), names[first : first + 16]
    if key not in SEEN:
        SEEN[key] = dict(zip(neighbours, all_seen([(*table[n][:2], None) for n in neighbours]), strict=True))
    return SEEN[key][name]


def bound(fn, shape, **options):
    return float(lipschitz.bound(fn, jax.ShapeDtypeStruct(shape, jnp.float32), **options).value)


def assert_sound(found, truth):
    assert found >= truth * (1 - 1e-12), (found, truth)


def conv(x, kernel, strides=1, pads=(0, 0), upsample=1, dilation=1, groups=1):
    """A 1-D convolution of (batch, length, channels)."""
    return lax.conv_general_dilated(
        x, jnp.asarray(kernel, x.dtype), (strides,), [pads], (upsample,), (dilation,), ("NWC", "WIO", "NWC"), groups
    )


def pool(x, start, op, size, strides=1, padding="VALID"):
    return lax.reduce_window(x, np.asarray(start, x.dtype), op, (size,), (strides,), padding)


@jax.custom_jvp
def flat_derivative(x):
    return 2 * jnp.tanh(x)


flat_derivative.defjvp(lambda primals, tangents: (flat_derivative(*primals), 0 * tangents[0]))


@jax.custom_vjp
def reversed_derivative(x):
    return 3 * jnp.sin(x)


reversed_derivative.defvjp(lambda x: (reversed_derivative(x), x), lambda x, g: (0 * g,))


def scanned(x):
    return lax.scan(lambda carry, kernel: (carry @ kernel, None), x, np.stack([np.diag(DYADIC)] * 3))[0]


def stacked_backwards(x):  # [2 x, 4 x]; forwards it would be [x / 2, 2 x]
    return lax.scan(lambda carry, factor: 2 * (factor * carry,), x, np.float32([0.5, 4]), reverse=True)[1]


def looped(x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 2 * c[1]), (0, x))[1]


def written(x):
    return lax.dynamic_update_slice(2 * x, 3 * x[:1, :2], (1, 1))


def three_sided(x):
    return jnp.where(x < -1, -2, jnp.where(x > 1, 2, 2 * x))


def edges_of(matrix):
    """Where a matrix has its entries: what reads along them is a graph network."""
    places = np.nonzero(matrix)
    return (*places, np.asarray(matrix, DTYPE)[places])


def over_edges(x, matrix):
    rows, columns, weights = edges_of(matrix)
    return jax.ops.segment_sum(x[columns] * weights[:, None], rows, len(matrix))


def mean_over_edges(x, matrix):
    rows, columns, _ = edges_of(matrix)
    return jax.ops.segment_sum(x[columns], rows, len(matrix)) / np.bincount(rows, minlength=len(matrix))[:, None]


HUB = np.zeros((6, 6))
HUB[0, 1:] = HUB[1:, 0] = 1
RING = np.eye(6) + np.roll(np.eye(6), 1, 0) * [1, 2, 0, 0.5, 1, 1] + 3 * np.diag([1, 0, 0, 0, 0], -1)


S = (2, 3)
EXAMPLE = jax.ShapeDtypeStruct(S, jnp.float32)


# (function, shape of the input, its exact Lipschitz constant)
EMA = [[0.5 ** (i - j + 1) if j <= i else 0 for j in range(6)] for i in range(6)]


def haar(x):
    return jnp.concatenate([x[::2] + x[1::2], x[::2] - x[1::2]])


def pooled(n, size, stride=1, *, there=False):
    """The norm of means over windows of one axis with "SAME" padding, of all entries or of those that are there."""
    windows = -(-n // stride)
    low = max(0, (windows - 1) * stride + size - n) // 2
    inside = [[i for i in range(w * stride - low, w * stride - low + size) if 0 <= i < n] for w in range(windows)]
    rows = np.zeros((windows, n))
    for row, entries in zip(rows, inside, strict=True):
        row[entries] = 1 / (len(entries) if there else size)
    return norm(rows)


EXACT = {
    # calls.py
    "jit": (jax.jit(lambda x: jax.jit(lambda y: 2 * y)(x @ W)), S, 2 * norm(W)),
    "checkpoint": (jax.checkpoint(lambda x: jnp.tanh(2 * x)), S, 2.0),
    "custom_jvp": (flat_derivative, S, 2.0),
    "scan": (scanned, S, 8.0),
    "scan that stacks backwards": (stacked_backwards, S, 20**0.5),
    "map": (lambda x: lax.map(lambda row: 3 * row, x), S, 3.0),
    "while": (looped, S, 8.0),
    "fori_loop": (lambda x: lax.fori_loop(0, 3, lambda i, y: 2 * y, x), S, 8.0),
    "cond": (lambda x: lax.cond(jnp.sum(B) > 9, lambda y: 5 * y, lambda y: 2 * y, x), S, 2.0),
    "switch": (lambda x: lax.switch(2, [lambda y: y, lambda y: 3 * y, lambda y: 4 * y], x), S, 4.0),
    "vmap": (jax.vmap(lambda row: W @ row), S, norm(W)),
    # moves.py
    "reshape": (lambda x: 2 * x.reshape(3, 2), S, 2.0),
    "reshape in another order": (lambda x: x - lax.reshape(x, (2, 2), (1, 0)), (2, 2), 2.0),
    "ravel by columns": (lambda x: x - x.ravel(order="F").reshape(2, 2), (2, 2), 2.0),
    "squeeze": (lambda x: 2 * jnp.squeeze(x[None], 0), S, 2.0),
    "transpose": (lambda x: x.T - x.T * 3, S, 2.0),
    "rev": (lambda x: 2 * lax.rev(x, (0,)), S, 2.0),
    "slice with steps": (lambda x: 2 * x[:, ::2], S, 2.0),
    "split": (lambda x: [2 * part for part in jnp.split(x, 3, 1)], S, 2.0),
    "broadcast": (lambda x: jnp.broadcast_to(x, (7, 2, 3)), S, 7**0.5),
    "broadcast in a sum": (lambda x: x[:, :1] + jnp.zeros((2, 4)), S, 2.0),
    "pad": (lambda x: lax.pad(2 * x, np.float32(1).astype(x.dtype), ((1, -1, 1), (0, 2, 0))), S, 2.0),
    "concatenate": (lambda x: jnp.concatenate([x, x, x]), S, 3**0.5),
    "concatenate functions": (lambda x: jnp.concatenate([2 * x[:1], jnp.sin(x[1:])]), S, 2.0),
    "stack": (lambda x: jnp.stack([x, x[::-1]]), S, 2**0.5),
    "unstack": (lambda x: jnp.unstack(2 * x, axis=1), S, 2.0),
    "tile": (lambda x: jnp.tile(x, (2, 3)), S, 6**0.5),
    "repeat": (lambda x: jnp.repeat(x, 3, 1), S, 3**0.5),
    "roll": (lambda x: jnp.roll(2 * x, 1, 1), S, 2.0),
    "gather": (lambda x: x[:, np.array([0, 2, 0, 0])], S, 3**0.5),
    "gather out of bounds": (lambda x: x.at[np.array([1, 7])].get(mode="fill", fill_value=0), S, 1.0),
    "dynamic_slice": (lambda x: 2 * lax.dynamic_slice(x, (0, 1), (2, 2)), S, 2.0),
    "dynamic_update_slice of a constant": (lambda x: lax.dynamic_update_slice(x, jnp.ones((1, 1)), (0, 0)), S, 1.0),
    # scatter.py
    "write": (lambda x: 2 * x.at[np.array([1])].set(x[:1]), S, 8**0.5),
    "write a constant": (lambda x: 2 * x.at[:, np.array([0, 2])].set(1.0), S, 2.0),
    "write into a constant": (lambda x: 2 * jnp.ones((2, 7)).at[:, np.array([4, -1, 9])].set(x), S, 2.0),
    "add into other entries": (lambda x: x.at[np.array([0])].add(x[:1]), S, 2.0),
    "add a constant": (lambda x: 2 * x.at[np.array([0, 0])].add(3.0), S, 2.0),
    "add into one place": (lambda x: jnp.ones(2).at[np.array([1, 1, 1])].add(2 * x[0]), S, 2 * 3**0.5),
    "subtract from constants in places": (lambda x: x + jnp.ones(S).at[np.arange(2)].subtract(3 * x), S, 4.0),
    "largest in a place": (lambda x: jax.ops.segment_max(2 * x.T, np.array([0, 1, 0]), 2), S, 2.0),
    "smallest of several": (lambda x: x.at[np.array([0])].min(x[1:]), S, 2**0.5),
    "sum over edges": (lambda x: over_edges(x, HUB), (6, 3), norm(HUB)),
    "sum over edges with weights": (lambda x: over_edges(jnp.tanh(x), RING), (6, 1), norm(RING)),
    "mean over edges": (lambda x: mean_over_edges(x, RING), (6, 1), norm((RING > 0) / (RING > 0).sum(1)[:, None])),
    "gradient of reading": (lambda x: jax.grad(lambda y: jnp.sum(y[:, np.array([0, 1, 1])] ** 2))(x), S, 4.0),
    "convert": (lambda x: 2 * x.astype(jnp.float16).astype(jnp.float32), S, 2.0),
    "optimization_barrier": (lambda x: lax.optimization_barrier(2 * x), S, 2.0),
    "reduce_precision": (lambda x: 2 * lax.reduce_precision(x, 8, 23), S, 2.0),
    # scalars.py: more of its functions in ACTIVATIONS
    "neg": (lambda x: x - (-x), S, 2.0),
    "is_finite": (lambda x: jnp.where(jnp.isfinite(x), 2 * x, 0), S, 2.0),
    "add constants": (lambda x: 2 * (x + B), S, 2.0),
    "subtract from constants": (lambda x: B - 2 * x, S, 2.0),
    "add other entries": (lambda x: x + x[::-1], S, 2.0),
    "multiply by constants": (lambda x: x * DYADIC, S, 2.0),
    "divide by constants": (lambda x: x / DYADIC, S, 2.0),
    "divide by a number": (lambda x: x / 0.25, S, 4.0),
    "maximum with constants": (lambda x: jnp.maximum(2 * x, B), S, 2.0),
    "maximum with infinity": (lambda x: jnp.maximum(2 * x, -jnp.inf), S, 2.0),
    "minimum with infinity": (lambda x: jnp.minimum(2 * x, -jnp.inf), S, 0.0),
    "maximum of two": (lambda x: jnp.maximum(x[0], x[1]), S, 1.0),
    "maximum and minimum of two": (lambda x: [jnp.maximum(x[0], x[1]) + jnp.minimum(x[0], x[1])], S, 2**0.5),
    "maximum minus minimum": (lambda x: jnp.maximum(x[0], x[1]) - jnp.minimum(x[0], x[1]), S, 2**0.5),
    "clamp": (lambda x: lax.clamp(-1.0, 2 * x, 1.0), S, 2.0),
    "clamp between constants": (lambda x: jnp.clip(2 * x, -jnp.abs(B), jnp.abs(B)), S, 2.0),
    # choices.py
    "select greater": (lambda x: jnp.where(x > 0, x, 2 * x), S, 2.0),
    "select greater or equal": (lambda x: jnp.where(x >= 0, 2 * x, x), S, 2.0),
    "select less": (lambda x: jnp.where(x < 1, 2 * x, x + 1), S, 2.0),
    "select less or equal": (lambda x: jnp.where(x >= 1, 2.0, 2 * x), S, 2.0),
    "select nested": (three_sided, S, 2.0),
    "select and": (lambda x: jnp.where((x > -1) & (x < 1), 2 * jnp.abs(x), 2.0), S, 2.0),
    "select or": (lambda x: jnp.where((x < -1) | (x > 1), 2.0, 2 * jnp.abs(x)), S, 2.0),
    "select not": (lambda x: jnp.where(~(x > 0), 0.0, 2 * x), S, 2.0),
    "is_finite of a root that is": (lambda x: jnp.where(jnp.isfinite(jnp.sqrt(1 + x * x)), 2 * x, 0), S, 2.0),
    "is_finite of a root of a square": (
        lambda x: jnp.where(jnp.isfinite(jnp.sqrt((x - 1) ** 2 + 1e-6)), 2 * x, 0), S, 2.0
    ),
    "infinities of what has none": (lambda x: 2 * jnp.nan_to_num(x @ W), S, 2 * norm(W)),
    "smooth step": (lambda x: jnp.where(x < 0, 0, jnp.where(x < 1, 3 * x**2 - 2 * x**3, 1)), S, 1.5),
    "is_finite of a power": (lambda x: jnp.where(jnp.isfinite(jnp.exp(x)), 2 * x, 0), S, 2.0),
    "select if not a number": (lambda x: jnp.where(jnp.isnan(x), 0, 2 * x), S, 2.0),
    "select by constants": (lambda x: jnp.where(MASK, 2 * x, 0), S, 2.0),
    "select entries by constants": (lambda x: jnp.where(MASK, x, x[::-1]), S, 2**0.5),
    # linear.py
    "matrix on the right": (lambda x: x @ W, S, norm(W)),
    "matrix on the left": (lambda x: W @ x, (3, 2), norm(W)),
    "matrix of whole numbers": (lambda x: x @ np.arange(12).reshape(3, 4), S, norm(np.arange(12).reshape(3, 4))),
    "matrix of truth values": (lambda x: MASK @ x, (3, 2), norm(MASK)),
    "batched matrices": (lambda x: jnp.einsum("bi,bij->bj", x, STACK), S, max(map(norm, STACK))),
    "batched matrices on the left": (lambda x: jnp.einsum("bij,bkj->bki", STACK, x), (2, 3, 4), max(map(norm, STACK))),
    "matrix of several axes in another order": (
        lambda x: jnp.tensordot(x, STACK, ((1, 0), (1, 0))), S, norm(STACK.reshape(6, 4)),
    ),
    "matrix of several axes": (lambda x: jnp.tensordot(x, STACK, 2), S, norm(STACK.reshape(6, 4))),
    "outer product": (lambda x: jnp.einsum("bi,j->bij", x, B), S, norm(B[:, None])),
    "two matrices": (lambda x: x @ TALL @ WIDE, S, norm(TALL.astype(float) @ WIDE)),
    "two matrices and a bias": (lambda x: (x @ TALL + 1.5) @ WIDE, S, norm(TALL.astype(float) @ WIDE)),
    "matrix and scale": (lambda x: (x @ W) * B, S, norm(W * B.astype(float))),
    "matrix, bias and scale": (lambda x: 2 * ((x @ W) - B) * B + 1, S, 2 * norm(W * B.astype(float))),
    "conv of one tap": (lambda x: conv(x, W[None]), (1, 4, 3), norm(W)),
    "conv of ones, circular": (
        lambda x: conv(jnp.pad(x, ((0, 0), (1, 1), (0, 0)), mode="wrap"), np.ones((3, 1, 1))), (1, 6, 1), 3.0,
    ),
    "conv of patches": (lambda x: conv(x, STACK, 2), (1, 6, 3), norm(STACK.reshape(6, 4))),
    "conv transposed to patches": (lambda x: conv(x, STACK, 1, (1, 1), 2), (1, 3, 3), norm(np.hstack(STACK))),
    "conv by groups": (lambda x: conv(x, STACK[:1, :1], groups=2), (1, 4, 2), norm(np.sqrt((
        STACK[0, 0].reshape(2, 2) ** 2).sum(1).max())[None, None])),
    "conv and scale": (lambda x: conv(x, W[None]) * B - 1, (1, 4, 3), norm(W * B.astype(float))),
    # windows.py
    "sum": (lambda x: x.sum(1), S, 3**0.5),
    "mean": (lambda x: x.mean(), S, 6**-0.5),
    "max": (lambda x: x.max(1), S, 1.0),
    "max of one": (lambda x: 2 * x[:, :1].max(1), S, 2.0),
    "range": (lambda x: x.max(1) - x.min(1), S, 2**0.5),
    "max and min": (lambda x: (x.max(1) + x.min(1)) / 2, S, 2**-0.5),
    "sort": (lambda x: 2 * jnp.sort(x, 1), S, 2.0),
    "cumsum": (lambda x: jnp.cumsum(x, 1), S, norm(np.tri(3))),
    "cumsum backwards": (lambda x: lax.cumsum(x, 0, reverse=True), S, norm(np.tri(2))),
    "cummax": (lambda x: lax.cummax(x, axis=1), S, 3**0.5),
    "cummin": (lambda x: lax.cummin(x, axis=1, reverse=True), S, 3**0.5),
    "sum pool apart": (lambda x: pool(x, 0, lax.add, 3, 3), (9,), 3**0.5),
    "max pool apart": (lambda x: pool(x, -np.inf, lax.max, 3, 3), (9,), 1.0),
    "min pool apart": (lambda x: pool(x, np.inf, lax.min, 2, 2, "SAME"), (5,), 1.0),
    "max pool overlapping": (lambda x: pool(x, -np.inf, lax.max, 3), (5,), 3**0.5),
    # patterns.py
    "softmax": (lambda x: nn.softmax(x / 100), S, 0.005),
    "softmax of exponentials": (lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True), S, 0.5),
    "softmax with a temperature": (lambda x: nn.softmax(8 * x, axis=0), S, 4.0),
    "softmax over two axes": (lambda x: nn.softmax(x, axis=(0, 1)), S, 0.5),
    "softmax with a reciprocal": (lambda x: jnp.exp(x) * (1 / jnp.exp(x).sum(0)), S, 0.5),
    "log_softmax": (lambda x: nn.log_softmax(8 * x), S, 8 * 3**0.5),
    "logsumexp": (lambda x: nn.logsumexp(8 * x, axis=-1), S, 8.0),
    "centred": (lambda x: x - x.mean(1, keepdims=True), S, 1.0),
    # norms.py
    "reciprocal root of a variance": (
        lambda x: (x - x.mean()) * (jnp.var(x) + 0.25) ** -0.5 * 2 + jnp.zeros(3, DTYPE), S, 4.0
    ),
    "sum of squares less that of the sum": (
        lambda x: (x - x.mean()) / jnp.sqrt(jnp.sum(x**2) - jnp.sum(x) ** 2 / 6 + 0.25), S, 2.0
    ),
    "mean pool without a batch": (
        lambda x: nn.avg_pool(x[..., None], (3, 2), (2, 1), "SAME", count_include_pad=False),
        (5, 4),
        pooled(5, 3, 2, there=True) * pooled(4, 2, there=True),
    ),
    # branches.py
    "rotation": (lambda x: jnp.concatenate([0.6 * x[0] - 0.8 * x[1], 0.8 * x[0] + 0.6 * x[1]]), S, 1.0),
    "rotary embedding": (jax.vmap(eqx.nn.RotaryPositionalEmbedding(4)), (2, 5, 4), 1.0),
    "steps of a wavelet": (lambda x: haar(haar(x)), (8,), 2.0),
    "moving average": (
        lambda x: lax.scan(lambda c, v: (0.5 * c + 0.5 * v,) * 2, jnp.zeros(3), x)[1], (6, 3), norm(EMA)
    ),
    "second differences": (lambda x: x[2:] - 2 * x[1:-1] + x[:-2] + 1, (9,), norm(np.diff(np.eye(9), 2, axis=0))),
    "scaled and added": (lambda x: DYADIC * x[0] + DYADIC[::-1] * x[1], S, 8**0.5),
    "scaled with signs": (
        lambda x: jnp.stack([x[0] * NEGATIVE + x[1], x[0] + x[1]]), S, norm([[-0.5, 1], [1, 1]])
    ),
    "added to nothing": (lambda x: (x[0] - x[1]) + x[1] - x[0] + x[0], S, 1.0),
    "a rotation under a function": (lambda x: 0.5 * jnp.sin(2 * jnp.stack([x[0] - x[1], x[0] + x[1]])), S, 2**0.5),
    # numbers.py
    "relu of both signs": (lambda x: jnp.concatenate([nn.relu(2 * x), nn.relu(-2 * x)]), S, 2.0),
    "relu of both signs, of some": (lambda x: (nn.relu(x), nn.relu(-x[:, 1:])), S, 1.0),
    "larger of relu of both signs": (lambda x: jnp.maximum(nn.relu(x), nn.relu(-x[:, ::-1])), S, 1.0),
    "softplus of both signs": (lambda x: jnp.stack([nn.softplus(x), nn.softplus(-x)]), S, 1.0),
    "gelu beside relu, of some": (lambda x: (nn.relu(x), nn.gelu(x[:, 1:])), S, (1 + 1.1289940**2) ** 0.5),
    "gelu beside relu": (lambda x: jnp.concatenate([nn.gelu(x), nn.relu(x), x * 0]), S, (1 + 1.1289940**2) ** 0.5),
    "waves": (lambda x: jnp.concatenate([jnp.sin(3 * x), -jnp.cos(3 * x)]), S, 3.0),
    "waves of octaves": (
        lambda x: jnp.stack([f(2.0**k * x) for k in range(4) for f in (jnp.sin, jnp.cos)]), S, 85**0.5
    ),
    "waves, twice": (lambda x: (jnp.sin(x), jnp.cos(x[::-1]), jnp.sin(x), jnp.cos(x)), S, 2**0.5),
    # pooling.py
    "mean pool": (lambda x: nn.avg_pool(x, (3, 2), (1, 1), "SAME"), (1, 5, 4, 1), pooled(5, 3) * pooled(4, 2)),
    "mean pool of what is there": (
        lambda x: nn.avg_pool(x, (3, 2), (2, 1), "SAME", count_include_pad=False),
        (1, 5, 4, 1),
        pooled(5, 3, 2, there=True) * pooled(4, 2, there=True),
    ),
    "sums over windows, scaled by channel": (
        lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 3, 1), (1, 1, 1), "SAME") * DYADIC, (1, 5, 3), 6 * pooled(5, 3)
    ),
    "largest three": (lambda x: lax.top_k(2 * x, 2)[0], S, 2.0),
    "choice of seventy": (lambda x: lax.select_n(MANY, *[jnp.roll(x, k) for k in range(70)]), S, 2**0.5),
    # choices.py
    "power": (lambda x: jnp.power(jnp.tanh(x), 2.0), S, 4 / 27**0.5),
    "root as a power": (lambda x: 3 * jnp.power(x**2 + 4, 0.5), S, 3.0),
    "reciprocal root as a power": (lambda x: jnp.power(x**2 + 1, -0.5), S, 2 / 27**0.5),
    "masked by itself": (lambda x: 2 * x * (x > 0), S, 2.0),
    "masked gelu": (lambda x: nn.gelu(x) * (x > 0), S, 1.12899),
    "slopes of channels": (lambda x: jnp.where(x >= 0, x, DYADIC * x), S, 2.0),
    "slopes of channels, of differences": (
        lambda x: (lambda h: jnp.where(h > 0, STEEP * h, STEEP[::-1] * h))(x - x[::-1]), (2,), 6.0
    ),
    "slopes of channels, below": (lambda x: jnp.where(-x > 0, DYADIC * (3 * x), x), S, 6.0),
    "slopes of channels, or zero": (lambda x: jnp.where(-x < 0, DYADIC * x, 0), S, 2.0),
    "slopes of channels behind a layer": (
        lambda x: (lambda y: jnp.where(y > 0, y, DYADIC * y))(x @ (2 * np.eye(3, dtype=DTYPE)) + DYADIC), S, 4.0
    ),
    "slopes of channels behind a shift": (lambda x: (lambda y: jnp.where(y > 0, y, DYADIC * y))(x - 0.5), S, 2.0),
    "slopes of channels behind tanh": (
        lambda x: (lambda y: jnp.where(y < 0, -0.5 * y, DYADIC * y))(jnp.tanh(3 * x)), S, 6.0
    ),
    "matrices on both sides": (
        lambda x: jnp.diag(jnp.array([0.0, 1, 0])) @ (x @ jnp.diag(jnp.array([1.0, 0, 0]))), (3, 3), 1.0
    ),
    "a constant in another order of its axes": (
        lambda x: x @ lax.reshape(PERMUTED, (3, 4), dimensions=(2, 1, 0)), S, norm(PERMUTED.T.reshape(3, 4))
    ),
    "names and places": (lambda x: jax.device_put(checkpoint_name(2 * x, "twice")), S, 2.0),
    "slopes of repeated entries": (lambda x: jnp.where((y := jnp.tile(x, (2, 1))) > 0, y, DYADIC * y), S, 2 * 2**0.5),
    "smooth L1": (lambda x: jnp.where(jnp.abs(x) < 1, 0.5 * x**2, jnp.abs(x) - 0.5), S, 1.0),
    "smooth L1, the other way": (lambda x: jnp.where(jnp.abs(x) >= 2, 2 * jnp.abs(x) - 2, 0.5 * x**2), S, 2.0),
    "cut off above": (lambda x: jnp.where(jnp.maximum(x, 2 * x) < 3, 2 * x, 3.0), S, 2.0),
    "smooth L1 by the smaller": (lambda x: jnp.where(jnp.minimum(x, -x) < -1, jnp.abs(x) - 0.5, 0.5 * x**2), S, 1.0),
    "gradient of softplus": (lambda x: jax.grad(lambda y: nn.softplus(4 * y).sum())(x), S, 4.0),
    "norm": (lambda x: 2 * jnp.linalg.norm(x), S, 2.0),
    "the smaller of the same": (lambda x: nn.sigmoid(jnp.minimum(x, x)), S, 0.25),
    "a choice of the same": (lambda x: nn.sigmoid(jnp.where(x > 100, x, x)), S, 0.25),
    "logarithm of a norm": (lambda x: jnp.log(jnp.linalg.norm(x) + 0.1), S, 10.0),
    "root of a norm": (lambda x: jnp.sqrt(3 * jnp.linalg.norm(x) + 0.01), S, 15.0),
    "scaled, over its norm": (lambda x: (DYADIC * x) / (jnp.linalg.norm(x, axis=1, keepdims=True) + 0.1), S, 20.0),
    "norms of rows": (lambda x: jnp.linalg.norm(x - B, axis=1), S, 1.0),
    "norm of what is repeated": (lambda x: jnp.sqrt(1e-6 + jnp.sum(jnp.concatenate([x, x]) ** 2)), S, 2**0.5),
    "root of a mean of squares": (lambda x: jnp.sqrt(jnp.mean(x * x, 1)), S, 3**-0.5),
    "centred too far": (lambda x: x - 3 * x.mean(1, keepdims=True), S, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_known_constants(name):
    fn, shape, exact = EXACT[name]
    found = bound(fn, shape)
    assert exact * (1 - 1e-12) <= found <= exact * (1 + 1e-3)
    assert_sound(found, seen_of(EXACT, name))


@pytest.mark.parametrize("mode", ["full", "same", "valid"])
def test_a_constant_convolved_with_a_signal(mode):
    """What JAX does where the constant is larger."""
    constant = np.ones((2, 5, 7), DTYPE) * np.arange(1, 8)
    for taps, pads in ((3, (0, 0)), (3, (2, 1)), (2, (1, 4)), (6, (3, 5))):
        fn = lambda x: lax.conv_general_dilated(
            jnp.asarray(constant, x.dtype), x, (1,), [pads], dimension_numbers=("NCW", "OIW", "NWC")
        )
        assert_sound(bound(fn, (4, 5, taps)), steepest_seen(fn, (4, 5, taps), np.zeros((1, 20 * taps))))
    fn = lambda x: jax.scipy.signal.convolve(jnp.asarray(W, x.dtype), x, mode=mode)
    assert_sound(bound(fn, (2, 2)), steepest_seen(fn, (2, 2), np.zeros((1, 4))))


def test_a_slope_that_is_not_known_while_tracing():
    of = lambda slope: lipschitz.bound(
        lambda x: nn.PReLU().apply({"params": {"negative_slope": slope}}, x @ W - 0.5), EXAMPLE
    )
    for slope in (0.25, -3.0):
        np.testing.assert_allclose(jax.jit(of)(jnp.float32(slope)).value, of(np.float32(slope)).value, rtol=1e-5)


LOOPS = {
    "map": lambda x: lax.map(lambda i: 2 * x[0, i], jnp.arange(3)),
    "scan": lambda x: lax.scan(lambda c, i: (c + x[0, i], x[1, i]), x[0, 0], jnp.array([2, 0, 1]))[1],
    "scan by truth values": lambda x: lax.scan(lambda c, m: (jnp.where(m, 2 * c, c), None), x, jnp.arange(3) > 1)[0],
    "stacked places": lambda x: x[:, lax.map(lambda i: 2 - i, jnp.arange(3))],
}


@pytest.mark.parametrize("name", LOOPS)
def test_places_that_a_loop_reads_are_known_under_jit(name):
    of = lambda w: lipschitz.bound(lambda x: w * LOOPS[name](x), EXAMPLE).value
    np.testing.assert_allclose(jax.jit(of)(2.0), of(2.0), rtol=1e-5)


PAIRED = {
    "side by side": lambda x: jnp.concatenate([x, -x]),
    "the larger": lambda x: jnp.maximum(x, -x[:, ::-1]),
    "both": lambda x: jnp.stack([jnp.tanh(x), jnp.tanh(x)]),
}


@pytest.mark.parametrize("name", PAIRED)
def test_squares_that_vanish(name, x64):
    fn = lambda x: PAIRED[name](1e-170 * x) * 1e170
    assert 2**0.5 * (1 - 1e-12) <= lipschitz.bound(fn, jnp.ones(S)).value <= 2**0.5 * (1 + 1e-5)


def test_waves_whose_heights_vanish(x64):
    fn = lambda x: jnp.stack([1e-200 * (1e-200 * f(1e200 * x)) for f in (jnp.sin, jnp.cos)]) * 1e200
    assert lipschitz.bound(fn, jnp.ones(S)).value >= 1


def test_reciprocals_that_vanish_do_not_cancel():
    """Below the smallest normal float one number stands for all of them, in a bound from above."""
    large, less = np.linspace(2e38, 3e38, 16).astype(DTYPE), np.linspace(8.6e37, 9e37, 16).astype(DTYPE)
    apart = lambda x: x / large - x / less
    found = bound(lambda x: sum(apart(x)[i] for i in range(16)) * 1e38, (16,))
    assert_sound(found, 1e38 * np.linalg.norm(1 / np.float64(large) - 1 / np.float64(less)))


def test_parts_without_a_slope_of_waves_of_no_height():
    fn = lambda x: jnp.concatenate([0 * jnp.sin(x**3), 0 * jnp.cos(x**3), jnp.tanh(x)])
    try:
        found = bound(fn, S)
    except lipschitz.UnboundedError:
        return
    assert_sound(found, 1.0)


def rms_normalised(x):
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 0.25)


# (function, what it is at most): reached at 0, or nearly
BOUNDED = {
    "norm and a constant": (lambda x: 3 * x / (jnp.linalg.norm(x) + 0.5), 6.0),
    "norms of rows and a constant": (lambda x: x / (2 * jnp.linalg.norm(x, axis=1, keepdims=True) + 0.5), 2.0),
    "root of squares and a constant": (lambda x: x / jnp.sqrt(jnp.sum(x**2) + 0.25), 2.0),
    "root of squares, both constants": (lambda x: x / (jnp.sqrt(4 * jnp.sum(x**2) + 1) + 1), 0.5),
    "root of mean squares": (rms_normalised, 2.0),
    "RMS norm of Flax": (lambda x: nn.RMSNorm(epsilon=0.25).apply({"params": {"scale": DYADIC}}, x), 4.0),
    "root of the larger": (lambda x: x * lax.rsqrt(jnp.maximum(jnp.sum(x**2, 1, keepdims=True), 0.25)), 2.0),
    "norm, at least": (lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=0, keepdims=True), 0.5), 2.0),
    "root, at least": (lambda x: x / jnp.maximum(jnp.sqrt(jnp.sum(x**2) + 4), 0.5), 0.5),
    "normalised functions": (lambda x: jnp.sin(x) / (jnp.linalg.norm(jnp.sin(x)) + 0.5), 2.0),
    "RMS norm, new": (lambda x: nn.RMSNorm(epsilon=0.25).apply({"params": {"scale": np.ones(3)}}, x), 2.0),
    # bounded: products of what a softmax, a sort, an end of a row make
    "product of softmax and tanh": (lambda x: nn.softmax(x) * jnp.tanh(x), 1.5),
    "product of what is sorted": (lambda x: jnp.sort(jnp.tanh(x)) * jnp.sin(x), 2.0),
    "product with the largest": (lambda x: jnp.tanh(x).max(1, keepdims=True) * jnp.tanh(x), 1 + 3**0.5),
    "product of both side by side": (
        lambda x: jnp.concatenate([jnp.tanh(x[0]), jnp.sin(x[1])]) * jnp.cos(x).ravel(),
        2.0,
    ),
    # means.py
    "layer norm with scales": (
        lambda x: nn.LayerNorm(epsilon=0.25).apply({"params": {"scale": DYADIC, "bias": DYADIC}}, x),
        4.0,
    ),
    "layer norm, two passes": (
        lambda x: nn.LayerNorm(epsilon=0.25, use_scale=False, use_fast_variance=False).apply(
            {"params": {"bias": DYADIC}}, x
        ),
        2.0,
    ),
    "layer norm of Equinox": (eqx.nn.LayerNorm((2, 3), eps=0.25), 2.0),
    "group norm with scales": (
        lambda x: nn.GroupNorm(3, epsilon=0.25).apply(
            {"params": {"scale": DYADIC, "bias": DYADIC}}, x.T.reshape(1, 2, 1, 3)
        ),
        4.0,
    ),
    "batch norm in training": (
        lambda x: nn.BatchNorm(False, epsilon=0.25, use_scale=False, use_bias=False).apply(
            {"batch_stats": {"mean": np.zeros(3), "var": np.ones(3)}}, x, mutable=["batch_stats"]
        )[0],
        2.0,
    ),
    "standardised": (lambda x: 3 * jax.nn.standardize(x, axis=0, epsilon=0.25), 6.0),
    "less its mean, over the deviation": (
        lambda x: (x - x.mean(1, keepdims=True)) / (0.5 + jnp.std(x, axis=1, keepdims=True)),
        2.0,
    ),
    "product of bounded ones": (lambda x: jnp.tanh(x) * nn.sigmoid(2 * x[::-1]), 1.5),
    "product of clipped ones": (lambda x: jnp.clip(x, -1, 1) * jnp.clip(x.sum(), -2, 2), 8.0),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_divided_by_norms_or_bounded(name):
    fn, most = BOUNDED[name]
    found = bound(fn, S)
    assert found <= most * (1 + 1e-5)
    near = np.random.default_rng(0).standard_normal((60, 6)) * np.geomspace(1e-3, 3, 60)[:, None]
    truth = steepest_seen(fn, S, near)
    assert_sound(found, truth)
    assert "product" in name or "scales" in name or found <= truth * 1.01


ACTIVATIONS = {
    "abs": jnp.abs,
    "relu": nn.relu,
    "relu6": nn.relu6,
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "selu": nn.selu,
    "celu": nn.celu,
    "gelu": nn.gelu,
    "gelu, exact": lambda x: nn.gelu(x, approximate=False),
    "silu": nn.silu,
    "mish": jax.nn.mish,
    "softplus": nn.softplus,
    "log_sigmoid": nn.log_sigmoid,
    "sigmoid": nn.sigmoid,
    "hard_swish": nn.hard_swish,
    "hard_tanh": nn.hard_tanh,
    "soft_sign": nn.soft_sign,
    "squareplus": jax.nn.squareplus,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "exp": lambda x: jnp.exp(-jnp.abs(x)),
    "exp2": lambda x: lax.exp2(-jnp.abs(x)),
    "expm1": lambda x: jnp.expm1(-jnp.abs(x)),
    "log": lambda x: jnp.log(1 + jnp.abs(x)),
    "sqrt": lambda x: jnp.sqrt(x**2 + 1),
    "rsqrt": lambda x: lax.rsqrt(x**2 + 1),
    "integer_pow": lambda x: lax.integer_pow(x**2 + 1, -1),
    "square": lambda x: lax.square(x) / (1 + lax.square(x)),
    "sin": lambda x: jnp.sin(2 * x),
    "cos": jnp.cos,
    "x + tanh": lambda x: x + jnp.tanh(x),
    # forms.py
    "sigmoid, written out": lambda x: 1 / (1 + jnp.exp(-x)),
    "sigmoid, as a power": lambda x: 3 * (jnp.exp(-2 * x) + 1) ** -1,
    "sigmoid, of exponentials": lambda x: jnp.exp(2 * jnp.sin(x)) / (1 + jnp.exp(2 * jnp.sin(x))),
    "sigmoid, from the other side": lambda x: 1 - 1 / (1 + jnp.exp(x)),
    "swish, written out": lambda x: x / (1 + jnp.exp(-x)),
    "softplus, written out": lambda x: jnp.log(1 + jnp.exp(2 * x)) / 2,
    "softplus, written out with log1p": lambda x: jnp.log1p(jnp.exp(x - 1)),
    "tanh, written out": lambda x: (jnp.exp(x) - jnp.exp(-x)) / (jnp.exp(-x) + jnp.exp(x)),
    "tanh, of one exponential": lambda x: (jnp.exp(2 * x) - 1) / (1 + jnp.exp(2 * x)),
    "tanh, of one exponential backwards": lambda x: (1 - jnp.exp(-2 * x)) / (1 + jnp.exp(-2 * x)),
    "tanh, of expm1": lambda x: jnp.expm1(x) / (jnp.exp(x) + 1),
    "mish, written out": lambda x: x * jnp.tanh(jnp.log(1 + jnp.exp(x))),
    "atan": lambda x: x - jnp.arctan(5 * x),
    "atan times tanh": lambda x: jnp.arctan(x) * jnp.tanh(x),
    "asinh": lambda x: jnp.arcsinh(x**2 - 3 * x),
    "huber": lambda x: 0.5 * jnp.minimum(jnp.abs(x), 2) ** 2 + 2 * (jnp.abs(x) - jnp.minimum(jnp.abs(x), 2)),
    "soft threshold": lambda x: jnp.sign(x - 1) * jnp.maximum(jnp.abs(x - 1) - 0.5, 0),
    "symlog": lambda x: 3 * jnp.log1p(jnp.abs(x)) * jnp.sign(x),
    "size by its sign": lambda x: x * jnp.sign(-2 * x),
    "snake": lambda x: x + jnp.sin(3 * x) ** 2 / 3,
    "snake, of cosines": lambda x: x - jnp.cos(x) * jnp.cos(x),
    "less sine times cosine": lambda x: x - jnp.sin(2 * x) * jnp.cos(2 * x) / 2,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functions_of_one_number(name):
    fn = ACTIVATIONS[name]
    with jax.enable_x64(True):
        far = (
            [] if "written out" in name or "exponential" in name or "power" in name else [-1e4, 1e4]
        )  # ∞ / ∞ in floats
        grid = np.concatenate([np.linspace(-12, 12, 24_001) + 1e-7, [-1e-6, 1e-6, *far]])
        grid = jnp.asarray(grid)
        steepest = float(jnp.abs(jax.vmap(jax.grad(fn))(grid)).max())
    found = bound(fn, (2,))
    assert_sound(found, steepest)
    assert found <= steepest * (1 + 1e-3)


def folded_and_reused(x):
    y = x @ W
    return jnp.concatenate([y * B, y, jnp.tanh(y @ V), y @ V])


def branches(x):
    y = nn.relu(x @ W)
    return y @ V + jnp.sin(y)[:, ::-1] - jnp.roll(x, 1, 1) * B


def views(x):
    y = jnp.tanh(x @ W)
    parts = [y[:, :2], 2 * y[:, 1:], y.T[:2].T, jnp.pad(y, ((0, 0), (0, 1)))[:, 2:]]
    return jnp.concatenate(parts, 1) - jnp.tile(y, (1, 3))[:, :8]


def looped_layers(x):
    y, rows = lax.scan(lambda c, k: (jnp.tanh(c @ k) + c, c[0]), x, np.stack([W, V, W]))
    return y, rows, lax.fori_loop(0, 2, lambda i, c: nn.silu(c @ V), x)


def extremes(x):
    y = x @ W
    return jnp.maximum(x, y) - 2 * jnp.minimum(y, x) + x.max(1, keepdims=True) * y.min(1)[:, None].shape[0]


def two_convs(x):
    y = conv(x, STACK.reshape(2, 3, 4)[..., :3], 1, (1, 0))
    return nn.relu(y * B + 1) + conv(nn.relu(y), np.stack([W, V]), 1, (0, 1))


ODD = {
    "functions of the same": (lambda x: 3 * jnp.maximum(x, 0) - 2 * jnp.minimum(x, 0) - jnp.abs(x), S),
    "snake": (lambda x: x + jnp.sin(x) ** 2, S),
    "chosen functions": (lambda x: jnp.where(MASK, 2 * x, jnp.sin(x)), S),
    "written over": (written, (3, 4)),
    "a conv's output before and after its scale": (two_convs, (1, 4, 3)),
    "a matrix's output in four branches": (folded_and_reused, S),
    "branches": (branches, S),
    "views of one node": (views, S),
    "layers in loops": (looped_layers, S),
    "maximum, minimum and both of two": (extremes, S),
    "tree": (lambda x: {"a": x @ W, "b": [x.sum(), (x[0], 2 * x)]}, S),
    "edges": (lambda x: jnp.pad(x, 1, mode="edge") - jnp.pad(2 * x, 1), S),
    "prefix sums": (lambda x: lax.associative_scan(jnp.add, x, axis=1), S),
    "resized": (lambda x: jax.image.resize(x, (4, 5), "bilinear"), S),
    "median": (lambda x: jnp.median(x @ W, axis=1), S),
    "mean pool that counts": (lambda x: nn.avg_pool(x[None, :, :], (2,), (1,), "SAME", count_include_pad=False), S),
    "dilated": (lambda x: conv(x, STACK, 2, (2, 1), 3, 2), (1, 4, 3)),
    "softmax of a shift that is level elsewhere": (
        lambda x: nn.softmax(x - 10 * jnp.tanh(x.sum(0, keepdims=True)), axis=1),
        S,
    ),
    "softmax of the same input twice": (lambda x: nn.softmax(jnp.concatenate([x, x], 1)), S),
    "exponents that are no halves": (lambda x: (2 + jnp.tanh(x)) ** -1.7 + (1.5 + jnp.sin(x)) ** 0.3, S),
    "log_softmax twice": (lambda x: nn.log_softmax(nn.log_softmax(x) @ W), S),
}


@pytest.mark.parametrize("name", ODD)
def test_never_below_odd_combinations(name):
    fn, shape = ODD[name]
    assert_sound(bound(fn, shape), seen_of(ODD, name))


PADS = [
    (mode, low, high) for mode in ("wrap", "reflect", "edge", "symmetric") for low, high in ((1, 1), (0, 2), (2, 0))
]


@pytest.mark.parametrize(("mode", "low", "high"), PADS)
def test_padding_by_hand(mode, low, high):
    """Some of it is how Flax pads, some only looks like it."""
    for kernel in (np.ones((3, 1, 1)),):
        for strides in (1, 2):
            shape = (1, 4, kernel.shape[1])
            fn = lambda x: conv(jnp.pad(x, ((0, 0), (low, high), (0, 0)), mode=mode), kernel, strides)
            assert_sound(bound(fn, shape), steepest_seen(fn, shape, np.ones((1, math.prod(shape)))))


RINGS = {  # taps, strides, dilation, size, transposed kernel
    "a line": ((3,), (1,), 1, (8,), False),
    "strided": ((4,), (2,), 1, (7,), True),
    "dilated": ((3,), (2,), 2, (6,), False),
    "more taps than places": ((7,), (2,), 1, (2,), True),
    "gaps": ((3,), (5,), 1, (4,), False),
    "one place": ((3,), (1,), 1, (1,), False),
    "a plane": ((3, 2), (2, 1), 1, (4, 5), False),
    "a plane that turns once": ((3, 1), (2, 2), 1, (4, 3), False),
}


@pytest.mark.parametrize("name", RINGS)
def test_transposed_convolutions_with_circular_padding(name):
    """As Flax makes them: never below the matrix, and what `bound` says of the kernel."""
    taps, strides, dilation, size, turned = RINGS[name]
    layer = nn.ConvTranspose(3, taps, strides, "CIRCULAR", (dilation,) * len(taps), transpose_kernel=turned)
    shape = (1, *size, 3 if turned else 2)
    kernel = np.random.default_rng(5).standard_normal((*taps, shape[-1], 3)).astype(DTYPE)
    fn = lambda x: layer.apply({"params": {"kernel": kernel, "bias": B}}, x)
    found = bound(fn, shape)
    assert_sound(found, steepest_seen(fn, shape, np.zeros((1, math.prod(shape)))))
    spec = f4.ConvSpec(strides, dilation, padding="CIRCULAR", transposed=True)
    known = f4.bound(np.flip(kernel, range(len(taps))).swapaxes(-1, -2) if turned else kernel, spec)
    assert found <= known * (1 + 1e-5)


def ring(x, kernel, period, stride=1, cut=0, pads=None):
    """All outputs, but for those that are cut off at the end, added up around a ring."""
    reach = len(kernel) - 1
    y = conv(x, kernel, 1, (reach, reach) if pads is None else pads, stride)
    y = y[:, : y.shape[1] - cut]
    return jnp.pad(y, ((0, 0), (0, -y.shape[1] % period), (0, 0))).reshape(1, -1, period, y.shape[2]).sum(1)


SIGNED, RUGGED, UNEVEN = (
    np.array(taps, DTYPE).reshape(-1, 1, 1) for taps in ([1, -1, 1, 1], [3, 3, -2, 1], [-1, 2, 3, 1])
)
AROUND = {
    "whole": (lambda x: ring(x, np.ones((3, 1, 1), DTYPE), 4), (1, 4, 1), 3.0),
    "a ring with room": (lambda x: ring(x, np.ones((3, 1, 1), DTYPE), 6), (1, 4, 1), None),
    "inputs that meet on the ring": (lambda x: ring(x, np.ones((3, 1, 1), DTYPE), 2), (1, 4, 1), None),
    "a ring of no whole strides": (lambda x: ring(x, SIGNED, 5, 2), (1, 3, 1), None),
    "inputs between others": (lambda x: ring(x, SIGNED, 3, 2), (1, 3, 1), None),
    "some outputs cut off": (lambda x: ring(x, RUGGED, 4, 1, 2), (1, 4, 1), None),
    "some outputs cut off, the other way": (lambda x: ring(x, RUGGED[::-1], 4, 1, 2), (1, 4, 1), None),
    "some outputs never made": (lambda x: ring(x, RUGGED, 4, 1, 0, (1, 3)), (1, 4, 1), None),
    "some never made, the other way": (lambda x: ring(x, RUGGED[::-1], 4, 1, 0, (1, 3)), (1, 4, 1), None),
    "turned around": (lambda x: ring(x, SIGNED, 4)[:, ::-1] + ring(x, SIGNED, 4), (1, 4, 1), None),
    "halves reversed in one array": (
        lambda x: (lambda y: jnp.stack([y[:, :4], y[:, :3:-1]]).sum(0))(
            jnp.pad(conv(x, UNEVEN, 1, (3, 3)), ((0, 0), (0, 1), (0, 0)))
        ),
        (1, 4, 1),
        None,
    ),
    "channels added up": (lambda x: conv(x, STACK[:, :1], 1, (1, 1)).reshape(1, -1, 2, 2).sum(2), (1, 3, 1), None),
}  # fmt: skip


STRIDED = [(mode, s, n) for mode in ("CIRCULAR", "REFLECT") for s, n in ((2, 8), (3, 9), (3, 8))]


@pytest.mark.parametrize(("mode", "strides", "n"), STRIDED)
def test_strided_convolutions_with_padding_around(mode, strides, n):
    """Where strides divide the ring it is the strided kernel that counts, not the whole one."""
    layer, shape = nn.Conv(4, (3,), strides, mode), (1, n, 2)
    kernel = np.random.default_rng(8).standard_normal((3, 2, 4)).astype(DTYPE)
    fn = lambda x: layer.apply({"params": {"kernel": kernel, "bias": np.zeros(4, DTYPE)}}, x)
    found = bound(fn, shape)
    assert_sound(found, steepest_seen(fn, shape, np.zeros((1, math.prod(shape)))))
    known = f4.bound(kernel, f4.ConvSpec(strides)) * (2**0.5 if mode == "REFLECT" else 1)
    assert found <= known * (1 + 1e-5) or n % strides


@pytest.mark.parametrize("name", AROUND)
def test_outputs_around_a_ring(name):
    fn, shape, exact = AROUND[name]
    found = bound(fn, shape, method="interval")
    assert_sound(found, steepest_seen(fn, shape, np.zeros((1, math.prod(shape)))))
    assert exact is None or found <= exact * (1 + 1e-5)


# --- What looks like something else


def softmax_of_fillers(x):
    """Constants beside x, not the same above and below the line."""
    mask = np.array([True, False])
    return jnp.where(mask, jnp.exp(x), 100.0) / jnp.sum(jnp.where(mask, jnp.exp(x), 0.01), keepdims=True)


def softmax_over_other_groups(x):
    """Level along the rows of (2, 3), not along those of (3, 2)."""
    exponentials = jnp.exp((x - 10 * jnp.tanh(x.sum(1, keepdims=True))).reshape(3, 2))
    return exponentials / exponentials.sum(1, keepdims=True)


def logsumexp_over_other_groups(x):
    level = x.reshape(2, 2).sum(1)
    return jnp.log(jnp.exp((x - jnp.repeat(level, 2)).reshape(2, 2)).sum(1)) + level


def pair_in_another_shape(x):
    y = 2.0**-10 * (x @ np.eye(6, dtype=DTYPE)) + 50
    larger = jnp.maximum(x.reshape(2, 3), y.reshape(2, 3))
    return jnp.minimum(x.reshape(3, 2), y.reshape(3, 2)).sum(0) + 0 * larger.sum()


def extremes_of_fillers(x):
    low, high = (jnp.pad(x, (0, 1), constant_values=c) for c in (0.0, 5.0))
    return jnp.stack([low.max(), high.min()])


def pair_of_fillers(x):
    low, high = (jnp.pad(x[:1], (0, 1), constant_values=c) for c in (0.0, 50.0))
    other_low, other_high = (jnp.pad(2.0**-10 * x[1:], (1, 0), constant_values=c) for c in (0.0, 50.0))
    return jnp.stack([jnp.maximum(low, other_low)[0], jnp.minimum(high, other_high)[0]])


def compared_fillers(x):
    zero, one = (jnp.pad(x, (0, 1), constant_values=c) for c in (0.0, 1.0))
    return jnp.where(zero < one, 100 * jnp.pad(x, (1, 0)), jnp.pad(x, (1, 0)))


def infinite_filler(x):
    finite = jnp.isfinite(jnp.pad(x, (0, 1), constant_values=jnp.inf))
    return jnp.where(finite, jnp.pad(x, (1, 0)), 100 * jnp.pad(x, (1, 0)))


def filled_gather(x):
    return x.at[np.array([1, 7])].get(mode="fill", fill_value=0.0) - x[np.array([1, 0])]


def shared_kernel(x):
    """Stride 3 first: apart, the taps add up to less."""
    kernel = jnp.ones((3, 1, 1), x.dtype)
    return conv(x, kernel, 3), conv(x, kernel, 1)


def softmax_of_a_difference(x):
    """What is taken off its exponent differs along the axis: its slope is ½ |1 + 5|."""
    z = x - 5.0 * jnp.flip(x)
    return jnp.exp(z) / jnp.exp(z).sum()


def wrapped_and_padded(x):
    """Padding by the other end, and zeros around it: more than the circular convolution."""
    return conv(jnp.pad(x, ((0, 0), (1, 1), (0, 0)), mode="wrap"), jnp.ones((3, 1, 1), x.dtype), 1, (1, 1))


def scaled_in_another_shape(x):
    """Constants for the last axis, after that axis became another one."""
    kernel = jnp.diag(jnp.array([1.0, 5.0, 5.0, 1.0], x.dtype))
    return (x @ kernel).reshape(2, 2) * jnp.array([[1.0, 3.0]], x.dtype)


def scaled_by_columns(x):
    """Constants for the columns, of a matrix's outputs read by columns."""
    kernel = jnp.diag(jnp.array([5.0, 1.0], x.dtype))
    return lax.reshape(x @ kernel, (2, 2), (1, 0)) * jnp.array([[1.0, 3.0]], x.dtype)


def softmax_of_stacked_constants(x):
    """exp(x₀) / (exp(x₀) + exp(-100)) and 1 / (exp(x₀) + exp(-100)): not a softmax."""
    stacked = jnp.stack([x, jnp.array([0.0, -100.0], x.dtype)])
    return jnp.exp(stacked[:, 0]) / jnp.sum(jnp.exp(jnp.stack([stacked[0, 0], stacked[1, 1]])))


BIG = np.array([3e38, 2e38], np.float32)
TINY = np.eye(2, dtype=np.float32) * np.float32(3e-20)
VANISHING = {
    "the reciprocals of constants": (lambda x: (x / BIG) * BIG, 1.0),
    "the reciprocals of constants, brought back": (lambda x: x / BIG * np.float32(1e38) * np.float32(3), 1.0),
    "a product of matrices": (lambda x: ((x @ TINY) @ TINY) * np.float32(1e38), 0.09),
    "a number times constants": (
        lambda x: (x @ np.eye(2, dtype=np.float32)) * 1e-30 * 1e-30 * np.float32([1e30, 9e29]) * 1e30, 1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VANISHING)
def test_what_vanishes_on_the_way_is_not_lost(name):
    fn, truth = VANISHING[name]
    assert truth <= float(lipschitz.bound(fn, jnp.ones(2)).value)


def test_constants_of_another_type_are_not_rounded_down(x64):
    for numbers in ([25, 26], [31, 32], [41, 47], [49, 53]):
        by = np.array(numbers, np.float32)
        one = lipschitz.bound(lambda x, by=by: x.astype(jnp.float32) / by, jnp.ones(2)).value
        two = lipschitz.bound(lambda x, by=by: (x @ np.eye(2)).astype(jnp.float32) / by, jnp.ones(2)).value
        assert min(float(one), float(two)) >= Fraction(1, numbers[0])


def test_choosing_between_comparisons_is_refused():
    fn = lambda x: jnp.where(np.array([True, False]), x > 0, x < 1).astype(x.dtype)
    with pytest.raises(lipschitz.UnboundedError, match="chooses between comparisons"):
        lipschitz.bound(fn, jnp.ones(2))


def test_the_largest_of_nothing():
    assert 2**0.5 <= lipschitz.bound(lambda x: jnp.max(x[:0], initial=1.0) + x.sum(), jnp.ones(2)).value < 1.42


def steep_far_out(x):
    """Its slope is 4e-5 at 40 and 1 in the end."""
    return jnp.sqrt(x * x + 1e12)


def long_chain(length):
    """So many operations on one number, the steep one at the end."""

    def fn(x):
        for _ in range(length):
            x = x * 1.0
        return 1000.0 * x

    return fn


NEARLY_LEVEL = [[50.0, 50.01, 50.02, -50.0, -50.01, -50.0]]

TRAPS = {
    "softmax of constants that differ": (softmax_of_fillers, (2,), [[-4.6, 0.0]]),
    "softmax over other groups": (softmax_over_other_groups, S, [[0.0] * 6]),
    "logsumexp over other groups": (logsumexp_over_other_groups, (4,), [[0.0] * 4]),
    "maximum in one shape, minimum in another": (pair_in_another_shape, (6,), [[0.5] * 6]),
    "largest and smallest of constants that differ": (extremes_of_fillers, (1,), [[2.0]]),
    "maximum and minimum of constants that differ": (pair_of_fillers, (2,), [[2.0, 1.0]]),
    "constants that differ, compared": (compared_fillers, (3,), [[1.0, 2.0, 3.0]]),
    "a constant that is infinite": (infinite_filler, (3,), [[1.0, 2.0, 3.0]]),
    "gather that fills with a number": (filled_gather, (3,), [[1.0, 2.0, 3.0]]),
    "one kernel with two strides": (shared_kernel, (1, 30, 1), [[1.0] * 30]),
    "softmax of a difference that varies": (softmax_of_a_difference, (2,), [[0.0, 0.0]]),
    "circular padding with zeros around": (wrapped_and_padded, (1, 2, 1), [[0.0] * 2]),
    "constants in another shape than their product's": (scaled_in_another_shape, (1, 4), [[0.0] * 4]),
    "constants for columns that became rows": (scaled_by_columns, (2, 2), [[0.0] * 4]),
    "softmax of stacked constants that differ": (softmax_of_stacked_constants, (2,), [[-10.0, 0.0]]),
    "a slope that grows far out": (steep_far_out, (1,), [[1e9]]),
    "softmax along the wrong axis": (lambda x: jnp.exp(x) / jnp.exp(x).sum(0)[:, None], (3, 3), None),
    "softmax of another exponent": (lambda x: jnp.exp(2 * x) / jnp.exp(x).sum(-1, keepdims=True), S, None),
    "softmax without its exponential": (lambda x: x / x.sum(-1, keepdims=True), S, None),
    "softmax of reversed entries": (lambda x: jnp.exp(x[:, ::-1]) / jnp.exp(x).sum(-1, keepdims=True), S, None),
    "softmax with a part below": (lambda x: jnp.exp(x) / jnp.exp(x[:, :2]).sum(-1, keepdims=True), S, None),
    "log_softmax along the wrong axis": (lambda x: x - jnp.log(jnp.exp(x).sum(0))[:, None], (3, 3), None),
    "logsumexp with twice its shift": (
        lambda x: jnp.log(jnp.exp(x - x.max(1, keepdims=True)).sum(1)) + 2 * x.max(1), S, None,
    ),
    "centred by other entries": (lambda x: x - x[::-1].mean(1, keepdims=True), S, None),
    "a product with a sum of bounded ones": (
        lambda x: (2 * (jnp.tanh(x[0]) + jnp.tanh(x[1])) + 1) * nn.sigmoid(40 * (x[0] - x[1])), S, [[20.0] * 6]
    ),
    "a product with a product": (
        lambda x: 5 * jnp.tanh(x[0]) * (2 * jnp.tanh(x[1])) * nn.sigmoid(40 * (x[0] - x[1])), S, [[20.0] * 6]
    ),
    "windows scaled, but not by axes": (
        lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 1), (1, 1), "VALID") * APART,
        (4, 2),
        None,
    ),
    "slopes of channels in turn": (
        lambda x: (lambda y: jnp.where(y > 0, y, y * np.array([2, 0.1], DTYPE)))(x @ np.array([[1, -1]], DTYPE)),
        (1, 1),
        [[-1.0], [1.0]],
    ),
    "slopes of channels on one side, of differences": (
        lambda x: (lambda h: jnp.where(h > 0, h, STEEP * h))(x - x[::-1]), (2,), [[1.0, 0.0], [0.0, 1.0]]
    ),
    "logarithm of a norm that may vanish": (lambda x: jnp.log(jnp.linalg.norm(x)), S, [[1e-3] * 6]),
    "logarithm of less than a norm": (lambda x: jnp.log(jnp.linalg.norm(x) - 0.1), S, [[0.0408] * 6]),
    "scaled, over another norm": (
        lambda x: (DYADIC * x) / (jnp.linalg.norm(x[::-1], axis=1, keepdims=True) + 0.1), S, [[0.0] * 3 + [9.0] * 3]
    ),
    "waves of two lengths": (lambda x: (jnp.sin(x), jnp.cos(2 * x)), (1,), [[2.5], [2.2], [0.8]]),
    "waves of two heights": (lambda x: (3 * jnp.sin(x), jnp.cos(x)), (1,), [[0.0]]),
    "waves of other entries": (lambda x: (jnp.sin(x[:1]), jnp.cos(x)), (2,), [[0.0, 1.6]]),
    "waves that are read more often": (lambda x: (jnp.sin(x), jnp.cos(x), jnp.cos(x)), (1,), [[1.57]]),
    "slopes together, far out": (lambda x: (nn.relu(x), 3 * nn.relu(-x - 50)), (1,), [[-60.0]]),
    "a large constant beside bounded ones": (
        lambda x: jnp.pad(jnp.tanh(x[0]) * jnp.tanh(x[1]), (1, 0), constant_values=100)[:3] * nn.sigmoid(40 * x[1]),
        S,
        [[0.0] * 6],
    ),
    "less another mean, over the deviation": (
        lambda x: (x - x.mean(0, keepdims=True)) * lax.rsqrt(jnp.var(x, 1, keepdims=True) + 0.01), S, NEARLY_LEVEL
    ),
    "less the mean and a number, over the deviation": (
        lambda x: (x - (x.mean(1, keepdims=True) - 5)) * lax.rsqrt(jnp.var(x, 1, keepdims=True) + 0.01), S, NEARLY_LEVEL
    ),
    "not less its mean, over the deviation": (
        lambda x: x * lax.rsqrt(jnp.var(x, 1, keepdims=True) + 0.01), S, NEARLY_LEVEL
    ),
    "less too much, over the deviation": (
        lambda x: (x - 3 * x.mean(1, keepdims=True)) * lax.rsqrt(jnp.var(x, 1, keepdims=True) + 0.01), S, NEARLY_LEVEL
    ),
    "over the deviation of others": (
        lambda x: (x - x.mean(1, keepdims=True)) * lax.rsqrt(jnp.var(x[::-1], 1, keepdims=True) + 0.01),
        S,
        [[0.1, 0.11, 0.1, 90.0, 0.0, -90.0]],
    ),
    "a variance with too much taken off": (
        lambda x: (x - x.mean()) * lax.rsqrt(jnp.maximum(0, jnp.mean(x**2) - (1.1 * jnp.mean(x)) ** 2) + 0.01),
        S,
        [[0.54, 1.46, 0.54, 1.46, 0.54, 1.46]],
    ),
    "a variance over other axes": (
        lambda x: (x - x.mean(1, keepdims=True))
        * lax.rsqrt(jnp.maximum(0, jnp.mean(x**2, 1) - jnp.mean(x, 0) ** 2) + 0.01)[:, None],
        (2, 2),
        [[1.0, 2.0, 1.0, 2.0]],
    ),
}  # fmt: skip
TRAPS |= {f"{n} operations on one number": (long_chain(n), (1,), [[1.0]]) for n in range(196, 202)}


@pytest.mark.parametrize("name", TRAPS)
def test_lookalikes_are_bounded_or_refused(name):
    fn, shape, at = TRAPS[name]
    try:
        found = bound(fn, shape)
    except lipschitz.UnboundedError:
        return
    assert_sound(found, steepest_seen(fn, shape, at))


def test_constants_of_few_digits_lose_nothing():
    """A product or a reciprocal of bfloat16 numbers is rounded to 8 digits."""
    scale, divisor = jnp.array([1.5, 1.0], jnp.bfloat16), jnp.array([0.316, 0.5], jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, 2), jnp.bfloat16)
    for number in (0.7, 0.9):
        found = lipschitz.bound(lambda x: ((x @ jnp.eye(2, dtype=x.dtype)) * number) * scale, x).value
        assert_sound(float(found), float(jnp.bfloat16(number)) * 1.5)
    assert_sound(float(lipschitz.bound(lambda x: x / divisor, x).value), 1 / float(divisor[0]))


def test_derivatives_of_ones_own_are_not_believed():
    """They say 0; the function is what is bounded."""
    assert 2 <= bound(flat_derivative, S) <= 2.001
    assert 3 <= bound(reversed_derivative, S) <= 3.001


AFTER = {
    "leaky_relu after tanh": lambda x: nn.leaky_relu(jnp.tanh(x)),
    "leaky_relu after abs": lambda x: nn.leaky_relu(jnp.abs(x) - 1),
    "elu after gelu": lambda x: nn.elu(nn.gelu(x)),
    "gelu after silu": lambda x: nn.gelu(nn.silu(x)),
    "silu after silu": lambda x: nn.silu(nn.silu(x)),
}


@pytest.mark.parametrize("name", AFTER)
def test_an_activation_after_another_is_bounded(name):
    """Each has a finite constant, so their product is a bound."""
    assert_sound(bound(AFTER[name], S), steepest_seen(AFTER[name], S))


# --- Laws


def test_composition():
    inner, outer = lambda x: jnp.tanh(2 * x @ W), lambda x: jnp.sort(x, 1)
    np.testing.assert_allclose(bound(lambda x: outer(inner(x)), S), bound(outer, S) * bound(inner, S), rtol=1e-5)
    both = bound(lambda x: inner(x) + 3 * jnp.sort(x), S)
    np.testing.assert_allclose(both, bound(inner, S) + 3, rtol=1e-5)
    beside = bound(lambda x: (inner(x), 3 * jnp.sort(x)), S)
    np.testing.assert_allclose(beside, math.hypot(bound(inner, S), 3), rtol=1e-5)
    np.testing.assert_allclose(bound(lambda x: -4 * inner(x), S), 4 * bound(inner, S), rtol=1e-5)


def test_a_batch_is_as_steep_as_one_example():
    layer = lambda x: nn.relu(x @ TALL) @ WIDE
    assert bound(layer, (1, 3)) == bound(layer, (7, 3)) == bound(jax.vmap(layer), (7, 2, 3))


def test_a_constant_function_and_constant_outputs():
    assert bound(lambda x: jnp.ones(3), S) == 0
    assert bound(lambda x: 0 * x, S) == 0
    assert bound(lambda x: x.shape[0], S) == 0
    assert 2 <= bound(lambda x: (jnp.ones(3), 2 * x), S) <= 2.001


def test_leaves_of_the_input_count_together():
    tree = {"a": jnp.ones((2, 3)), "b": (jnp.ones(3),)}
    found = lipschitz.bound(lambda t: t["a"].sum(0) + t["b"][0], tree).value
    assert 3**0.5 <= found <= 1.001 * (2**0.5 + 1)
    assert float(lipschitz.bound(lambda t: jnp.concatenate([t["a"], t["b"][0][None]]).sum(0), tree).value) >= 3**0.5
    assert float(lipschitz.bound(lambda t: (t["b"], 2 * t["a"]), tree).value) >= 2


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_types(dtype, x64):
    kernel = jnp.asarray(W, dtype)
    found = lipschitz.bound(lambda x: jnp.tanh(x @ kernel), jax.ShapeDtypeStruct(S, dtype)).value
    assert found.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    truth = norm(kernel.astype(jnp.float64))
    assert truth <= found <= truth * 1.001


def test_empty_arrays():
    assert bound(lambda x: x.sum(0), (0, 3)) == 0
    assert bound(lambda x: x @ jnp.zeros((0, 3)), (2, 0)) == 0
    assert bound(lambda x: jnp.einsum("bi,bij->bj", x, jnp.zeros((0, 2, 3))), (0, 2)) == 0


def test_not_a_number_is_told():
    holes = jnp.asarray(W).at[0, 0].set(jnp.nan)
    for fn in (lambda x: x @ holes, lambda x: x * holes[0], lambda x: nn.relu(x @ W) * holes[0], lambda x: x * jnp.nan):
        assert math.isnan(bound(fn, S))


# --- Faults of other libraries


def test_overlapping_windows_stretch():
    """Max pooling counted as 1 is below the truth where windows overlap."""
    fn = lambda x: nn.max_pool(x, (3, 3), (1, 1))
    image = np.zeros((1, 5, 5, 1))
    image[0, 2, 2] = 1
    truth = steepest_seen(fn, image.shape, image.reshape(1, -1))
    assert truth == 3
    assert_sound(bound(fn, image.shape), truth)


def test_an_unknown_operation_is_not_taken_for_one():
    with pytest.raises(lipschitz.UnboundedError, match=r"'reduce_prod' .* has no rule"):
        bound(lambda x: jnp.prod(jnp.tanh(x)), S)


def test_what_nothing_depends_on_may_be_unknown():
    assert 2 <= bound(lambda x: (jnp.sign(x), 2 * x)[1], S) <= 2.001


# --- Networks


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = lambda y: nn.BatchNorm(use_running_average=True)(y)
        x = nn.relu(norm(nn.Conv(3, (3, 3), use_bias=False)(x)))
        y = norm(nn.Conv(3, (2, 2), strides=2, padding="CIRCULAR")(x))
        x = nn.gelu(y + nn.Conv(3, (1, 1), strides=2)(x))
        x = nn.max_pool(x, (2, 2), (1, 1), "SAME")
        return nn.Dense(4)(nn.tanh(nn.Dense(3)(x.mean((1, 2)))))


IMAGE = (1, 4, 4, 2)


@pytest.fixture(scope="module")
def residual():
    variables = jax.eval_shape(Residual().init, jax.random.key(0), jnp.ones(IMAGE))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.uniform(0.2, 1.5, leaf.shape).astype(DTYPE), variables)


def test_linen(residual):
    fn = lambda x: Residual().apply(residual, x)
    found = lipschitz.bound(fn, jnp.ones(IMAGE))
    assert_sound(float(found.value), steepest_seen(fn, IMAGE))
    text = str(found)
    assert "Conv_0" in text
    assert "Dense_1" in text
    assert "Lipschitz at most" in text
    assert found.rows[-1].total == found.value


def test_methods_by_name():
    layer = nn.Conv(4, (2, 3), name="wide")
    variables = {"params": {"kernel": STACK.reshape(2, 3, 1, 4), "bias": STACK[0, 0]}}
    fn, shape = lambda x: layer.apply(variables, x), (1, 4, 4, 1)
    four, grid = bound(fn, shape), bound(fn, shape, method="grid")
    assert four != grid
    assert bound(fn, shape, method={"*": "grid", "wid?": "four"}) == four
    assert bound(fn, shape, method={"*": "grid"}) == grid
    truth = steepest_seen(fn, shape)
    for found in (four, grid, bound(fn, shape, method="interval")):
        assert_sound(found, truth)
    with pytest.raises(ValueError, match="unknown method 'five'"):
        bound(fn, shape, method="five")


def test_batch_norm_is_folded():
    """The product of both norms is far above the norm of the product."""
    scale = np.array([8.0, 0.125, 0.125], DTYPE)
    kernel = (np.diag([0.125, 8.0, 8.0]) @ np.eye(3)).astype(DTYPE)
    statistics = {"mean": jnp.asarray(B), "var": jnp.asarray(1 / scale**2)}
    layer = nn.BatchNorm(use_running_average=True, epsilon=0)
    variables = {"params": {"scale": jnp.ones(3), "bias": jnp.asarray(B)}, "batch_stats": statistics}
    for first, shape in ((lambda x: x @ kernel, S), (lambda x: conv(x, kernel[None]), (1, 4, 3))):
        found = bound(lambda x: layer.apply(variables, first(x)), shape)
        assert 1 - 1e-12 <= found <= 1.001


def test_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 3, (3, 3), padding="REFLECT", rngs=rngs)
            self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
            self.up = nnx.ConvTranspose(3, 2, (3, 3), strides=(2, 2), rngs=rngs)
            self.out = nnx.Linear(2, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.norm(self.conv(x)))
            return nnx.softmax(self.out(nnx.silu(self.up(x)).mean((1, 2))))

    model = Model(nnx.Rngs(0))
    model.norm.var[...] = jnp.array([0.2, 1.0, 3.0])
    assert_sound(bound(model, IMAGE), steepest_seen(model, IMAGE))


# --- Errors

HIDES = "hides where its argument is not a number"
INFINITE = np.array([1, np.inf, 2], np.float32)


def no_level(x):
    return jax.nn.softmax(x - jnp.sqrt(x[:, :1]))


def no_log_level(x):
    return jax.nn.log_softmax(x - jnp.sqrt(x[:, :1]))


def no_sum_level(x):
    level = jnp.sqrt(x[:, :1])
    return jnp.log(jnp.sum(jnp.exp(x - level), 1, keepdims=True)) + level


def empty_window(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1), (1, 1), [(0, 0), (1, 0)])[:, :-1]


def no_place(x):
    return jnp.cumsum(jnp.take(x, np.array([7, 0, 1]), axis=1, mode="fill"), axis=1)


def after_infinity(x):
    return jnp.cumsum(jnp.concatenate([jnp.full((len(x), 1), jnp.inf), x], 1), 1)[:, :-1]


def behind(x):
    return lax.scan(lambda last, row: (row, last), jnp.full(3, jnp.inf), x)[1]


def written(x):
    held = jax.new_ref(jnp.zeros(x.shape))
    held[...] = 5 * x
    return held[...]


def added(x):
    held = jax.new_ref(jnp.zeros(3))
    held[0] += x[0, 0]
    return jax.freeze(held)


def blurred(x):
    return (jnp.tanh(x) + 1e16) - 1e16


JUMPS = {
    "sign": (lambda x: jnp.sign(x), "'sign'", "Leave it out"),
    "a type without a sign": (
        lambda x: jnp.where(jnp.isnan(x.astype(jnp.float8_e8m0fnu)), 9.0, x), "'ne'", "is not a number"
    ),
    "a mask over what is no number": (lambda x: (x > 1).astype(x.dtype) * jnp.log(x), "'mul'", "jumps at 1"),
    "a logarithm of nothing": (lambda x: x + jnp.log(0 * x - 7), "'add'", "no finite bound"),
    "sign times what is not 0": (lambda x: jnp.sign(x) * (1 + x), "'mul'", "it jumps at 0"),
    "sign about another place": (lambda x: jnp.sign(x - 1) * x, "'mul'", "it jumps at 1"),
    "a square of signs": (lambda x: jnp.sign(x) * jnp.sign(x), "'mul'", "at 0"),
    "sign of a function": (lambda x: jnp.sign(jnp.tanh(x)) * x, "'mul'", "not of affine functions"),
    "round": (lambda x: x + lax.stop_gradient(jnp.round(x) - x), "'round'", "Leave it out"),
    "argmax": (lambda x: nn.one_hot(jnp.argmax(x, 1), 3), "'argmax'", "Leave it out"),
    "step": (lambda x: (x > 0).astype(jnp.float32), "'convert_element_type'", "jump"),
    "jump": (lambda x: jnp.where(x > 1, x, 0), "'select_n'", "jumps at 1"),
    "one jump for all": (lambda x: jnp.where(x[0, 0] > 1, jnp.ones(6), jnp.zeros(6))[1:], "'select_n'", "jumps at 1"),
    "choice by another entry": (lambda x: jnp.where(x > x[::-1], x, 0), "'gt'", "use jnp.maximum"),
    "choice by a vector": (lambda x: jnp.where(x > B, x, 0), "'gt'", "may jump"),
    "choice by a sum": (lambda x: jnp.where(x.sum(1, keepdims=True) > 0, x, 0), "", "jump"),
    "choice by a part": (lambda x: jnp.where((x > 0)[:, :1], x, 0), "", "jump"),
    "choice by joined comparisons": (lambda x: jnp.where(jnp.concatenate([x > 0, x > 1]), 1.0, 0.0), "", "jump"),
    "choice of several": (lambda x: jnp.select([x < 0, x < 1], [x, x], 9.0), "", "jump"),
    "choice of branches": (lambda x: jnp.piecewise(x, [x < 0], [lambda y: y, lambda y: y + 1]), "", "jump"),
    "cond": (lambda x: lax.cond(x[0, 0] > 0, lambda y: y, lambda y: y + 1, x), "'cond'", "may jump"),
    "while": (lambda x: lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, x), "'while'", "use a fixed number"),
    "equality": (lambda x: jnp.where(x == 0, 1.0, x), "'eq'", "jumps"),
    "written to places by the input": (
        lambda x: jnp.zeros(3).at[lax.stop_gradient(x[0]).astype(int)].add(1.0), "'convert_element_type'", "jump"
    ),
    "written where it was promised not to": (
        lambda x: x.at[7].set(0.0, mode="promise_in_bounds"), "'scatter'", "use places inside, or another mode"
    ),
    "a divisor that may vanish": (
        lambda x: jnp.where(jnp.isnan(x / (jnp.linalg.norm(x) + 1e-39)), 5.0, x), "'div'", "Normalisation has one as"
    ),
    "a root that may vanish": (
        lambda x: x / (jnp.sqrt((jnp.sum(x**2) + 1e-30) * 1e-20)), "'div'", "Normalisation has one as"
    ),
    "both exponentials may vanish": (
        lambda x: jnp.where(jnp.isnan((jnp.exp(x) - jnp.exp(2 * x)) / (jnp.exp(x) + jnp.exp(2 * x))), 0.0, x), "", HIDES
    ),
    "written twice": (lambda x: x.at[np.array([0, 0])].set(2 * x), "'scatter'", "add them, or write each once"),
    "applied in places": (lambda x: x.at[np.array([0])].apply(jnp.tanh), "'scatter'", "choose with jnp.where"),
    "comparisons written": (
        lambda x: jnp.where(jnp.zeros(S, bool).at[np.array([0])].set(x[:1] > 0), 1.0, 0.0), "", "jump"
    ),
    "where a segment is empty": (
        lambda x: jnp.where(jnp.isfinite(jax.ops.segment_max(x, np.array([0, 0]), 2)), 0, x), "'is_finite'", HIDES
    ),
    "sorted places": (lambda x: x[:, jnp.argsort(x[0])], "'sort'", "jumps"),
    "places by the input": (lambda x: x[jnp.argmax(x[:, 0])], "'argmax'", "jumps"),
    "where a root is none": (lambda x: jnp.where(jnp.isnan(jnp.sqrt(x - 1)), 0, x), "'ne'", HIDES),
    "where a logarithm is one": (lambda x: jnp.where(jnp.isfinite(jnp.log(x)), 5, x), "'is_finite'", "not a number"),
    "where a reciprocal is one": (lambda x: jnp.where(jnp.isfinite(1 / x), 5.0, 0), "'is_finite'", "not a number"),
    "where a root is itself": (lambda x: jnp.where(jnp.sqrt(x) <= jnp.sqrt(x), 1.0, 0), "'le'", "not a number"),
    "where a product is none": (lambda x: jnp.where(jnp.isnan(jnp.log(x) @ W), 1.0, 0), "'ne'", "not a number"),
    "a sum of what are numbers": (lambda x: jnp.nansum(jnp.log(x)), "'ne'", "not a number"),
    "where an infinite scale gives none": (lambda x: jnp.where(jnp.isnan(x * np.inf), 1.0, 0), "'ne'", "not a number"),
    "where a division by 0 is none": (lambda x: jnp.where(jnp.isnan(x / np.arange(3)), 1, 0), "'ne'", "not a number"),
    "where a root is none between": (lambda x: jnp.where(jnp.isnan(jnp.sqrt(x * x - 1)), 1, 0), "'ne'", HIDES),
    "where zero has no logarithm": (lambda x: jnp.where(jnp.isfinite(jnp.log(0 * x)), 0, x), "'is_finite'", HIDES),
    "where a constant root is none": (
        lambda x: jnp.where(jnp.isnan(jnp.sqrt(jnp.clip(x, -2, -1))), x, 0), "'ne'", HIDES),
    "a logarithm over infinity": (lambda x: jnp.log(x) / jnp.inf, "'div'", HIDES),
    "infinity above a logarithm": (
        lambda x: jnp.where(jnp.maximum(jnp.log(x), np.inf) > 0, 1.0, 0), "'max'", HIDES),
    "where a level of softmax is none": (lambda x: jnp.where(jnp.isnan(no_level(x)), 1, 0), "'ne'", HIDES),
    "where a level of its logarithm is none": (lambda x: jnp.where(jnp.isnan(no_log_level(x)), 1, 0), "'ne'", HIDES),
    "where a level of a sum is none": (lambda x: jnp.where(jnp.isnan(no_sum_level(x)), 1, 0), "'ne'", HIDES),
    "where a largest is infinite": (
        lambda x: jnp.where(jnp.isfinite(jnp.maximum(x, INFINITE)), 0, x), "'is_fin", HIDES),
    "where a limit is infinite": (
        lambda x: jnp.where(jnp.isfinite(lax.clamp(np.inf, x, np.inf)), 0, x), "'is_fin", HIDES),
    "where a window is empty": (lambda x: jnp.where(jnp.isfinite(empty_window(x)), 0, x), "'is_finite'", HIDES),
    "where a place is none": (lambda x: jnp.where(jnp.isfinite(no_place(x)), 0, x), "'is_finite'", HIDES),
    "where a sum after infinity is": (
        lambda x: jnp.where(jnp.isfinite(after_infinity(x)), 0, x), "'is_finite'", HIDES),
    "where a filler of a loop is infinite": (lambda x: jnp.where(jnp.isfinite(behind(x)), 0, x), "'is_finite'", HIDES),
    "where a logarithm is of what vanishes": (
        lambda x: jnp.where(jnp.isfinite(jnp.log(jnp.maximum(x, 1e-40))), 0.0, 5.0), "'is_finite'", HIDES
    ),
    "where float16 overflows": (lambda x: jnp.where(jnp.isinf(x.astype(jnp.float16)), 0, x), "'eq'", HIDES),
    "where few bits overflow": (lambda x: jnp.where(jnp.isinf(lax.reduce_precision(x, 4, 10)), 0, x), "'eq'", HIDES),
    "where infinity is met": (lambda x: jnp.nan_to_num(jnp.log(x)), "'ne'", HIDES),
    "a write": (written, "'swap'", "return what is to be bounded"),
    "an added write": (added, "'swap'", "return what is to be bounded"),
    "a write inside": (jax.jit(written), "'swap'", "return what is to be bounded"),
    "jump of lines that cancel": (lambda x: jnp.where(x < 0, (x + 1e6) - 1e6, x + 1e-10), "'select_n'", "jumps at 0"),
    "jump below a slope far out": (
        lambda x: jnp.where(x < 0, (jnp.expm1(x) + 1e15) - 1e15, x + 0.05), "'select_n'", "too roughly at 0"
    ),
    "jump below a large slope": (
        lambda x: jnp.where(x < 0, (1e4 * jnp.tanh(x) + 1e10) - 1e10, 1e4 * jnp.tanh(x)), "'select_n'", "too roughly"
    ),
    "jump below rounding": (lambda x: jnp.where(x < 0, blurred(x), blurred(x) + 1), "'select_n'", "too roughly at 0"),
    "jump of a wave": (lambda x: jnp.where(x < 0, jnp.sin(x), 1e-9), "'select_n'", "jumps at 0"),
    "jump of a wave far out": (lambda x: jnp.where(x < 0, jnp.sin(1e9 + x), 0.5), "'select_n'", "jumps at 0"),
    "long chain": (lambda x: functools.reduce(lambda y, _: jnp.exp(-y), range(8), x), "'exp'", "finite slope"),
    "product": (lambda x: x * x[::-1], "'mul'", "bound both factors, as by jnp.clip or jnp.tanh, or register a rule"),
    "product with a bounded one": (lambda x: x * jnp.tanh(x[::-1]), "'mul'", "not both known to be bounded"),
    "square": (lambda x: x * x, "'mul'", "Bound its argument first"),
    "attention": (lambda x: x @ x.T, "'dot_general'", "no Lipschitz constant"),
    "normalisation": (lambda x: x / jnp.sum(jnp.abs(x)), "'div'", "x / (norm(x) + c)"),
    "normalisation without a constant": (lambda x: x / jnp.linalg.norm(x), "'div'", "with a constant c > 0"),
    "normalisation of negative numbers": (lambda x: x / jnp.sqrt(jnp.sum(x**2) - 1), "'div'", "x / sqrt(sum(x²) + c)"),
    "normalisation less a constant": (
        lambda x: x / (jnp.sqrt(jnp.sum(x**2) + 1) - 2), "'div'", "x / maximum(norm(x), c)"
    ),
    "normalisation by others": (
        lambda x: x / (jnp.linalg.norm(x[::-1], axis=1, keepdims=True) + 1), "'div'", "Normalisation has one as"
    ),
    "reciprocal": (lambda x: 1 / x, "'div'", "without a finite slope"),
    "root": (lambda x: jnp.sqrt(jnp.abs(x)), "'sqrt'", "without a finite slope"),
    "kernel of the input": (lambda x: conv(x[None], jnp.ones((1, 3, 1)) * x[0, 0]), "'conv_general_dilated'", "kernel"),
    "square of complex numbers": (lambda x: (jnp.fft.fft(x) ** 2).real, "'integer_pow'", "of complex numbers"),
    "no rule": (lambda x: lax.lgamma(x), "'lgamma'", "register_rule"),
    "power of the input": (lambda x: jnp.power(2.0, x), "'pow'", "exponents that are constants"),
    "places of the largest": (lambda x: lax.top_k(x, 2)[1] * x[0, 0], "'top_k'", "take their values alone"),
    "a mask": (lambda x: (x > 0).astype(x.dtype), "'convert_element_type'", "jumps at 0"),
    "a mask elsewhere": (lambda x: x * (x > 0.5), "'mul'", "jumps at 0.5"),
    "slopes that do not meet": (lambda x: jnp.where(x < 1, DYADIC * x, x), "'select_n'", "not a function of the same"),
    "slopes of a layer that do not meet": (
        lambda x: (lambda y: jnp.where(y > 0, y, DYADIC * y + B))(x @ W), "'select_n'", "not a function of the same"
    ),
    "a number hidden": (
        lambda x: jnp.where(jnp.isnan(jnp.where(x > 0, 0.0, 0.0) * (1 / x)), 5.0, x), "'ne'", HIDES
    ),
    "a large power": (lambda x: jnp.tanh(x) ** 1e5, "'pow'", "up to 100"),
    "slopes of others": (lambda x: jnp.where(x < 0, DYADIC * x[::-1], x), "'select_n'", "not a function of the same"),
    "by infinity": (lambda x: jnp.inf / (1 + jnp.exp(x)), "'div'", "div"),
}  # fmt: skip


@pytest.mark.parametrize("name", JUMPS)
def test_errors_name_operation_and_remedy(name):
    fn, operation, remedy = JUMPS[name]
    with pytest.raises(lipschitz.UnboundedError, match=re.escape(remedy)) as caught:
        bound(fn, S)
    assert operation in str(caught.value)


@pytest.mark.parametrize("shift", [-1.0, -1e-6])
def test_a_root_that_begins_away_from_zero_is_steep_there(shift):
    square = lambda x: jnp.sum(x * x) + shift
    roots = [lambda x: jnp.sqrt(square(x)), lambda x: jnp.sqrt(jnp.maximum(square(x), 0))]
    for fn in (*roots, lambda x: x / jnp.sqrt(square(x))):
        with pytest.raises(lipschitz.UnboundedError):
            bound(fn, S)


NO_NUMBERS = {
    "added": lambda x: jnp.tanh(x + jnp.nan),
    "subtracted from": lambda x: jnp.nan - x,
    "multiplied": lambda x: x * jnp.nan,
    "divided by": lambda x: x / jnp.nan,
    "maximum": lambda x: jnp.maximum(x, jnp.nan),
    "clipped": lambda x: jnp.clip(x, jnp.nan, 1.0),
    "clipped above": lambda x: lax.clamp(0.0, x, np.full(x.shape, np.nan, np.float32)),
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_constants_that_are_no_numbers_are_told(name):
    assert np.isnan(bound(NO_NUMBERS[name], S))


def test_one_comparison_that_chooses_for_all_entries():
    same = lambda x: jnp.where(x[0, 0] > 1, jnp.ones(6), jnp.ones(6))[1:].reshape(5, 1)
    assert bound(same, S) == 0
    assert 1 <= bound(lambda x: x + same(x).sum(), S) <= 1 + 1e-5


def at_this_line(x):
    return jnp.where(x @ W > 1, 1.0, 0.0)  # the line that errors name


def at_that_line(x):
    return lax.lgamma(x)


@pytest.mark.parametrize("fn", [at_that_line, at_this_line, lambda x: at_this_line(2 * x)])
def test_errors_name_the_line(fn):
    line = (at_that_line if fn is at_that_line else at_this_line).__code__.co_firstlineno + 1
    with pytest.raises(lipschitz.UnboundedError, match=rf"test_lipschitz\.py:{line} in at_th"):
        bound(fn, S)


ELSEWHERE = """
import sysconfig
paths = sysconfig.get_paths()
sysconfig.get_paths = lambda *args, **kwargs: {**paths, "purelib": "/nowhere"}
import jax
from fantastic4 import lipschitz
def steep(x):
    return x * x @ x
try:
    lipschitz.bound(steep, jax.numpy.ones(3))
except lipschitz.UnboundedError as error:
    print(error)
"""


def test_errors_name_the_users_line_wherever_jax_lives(tmp_path):
    script = tmp_path / "fantastic4_script.py"
    script.write_text(ELSEWHERE)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert "fantastic4_script.py:8 in steep" in done.stdout


def test_errors_name_the_module():
    class Jumps(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.floor(nn.Dense(3, name="head")(x))

    variables = Jumps().init(jax.random.key(0), jnp.ones(S))
    with pytest.raises(lipschitz.UnboundedError, match=r"'floor' in Jumps \(test_lipschitz\.py:\d+ in .*__call__\)"):
        bound(lambda x: Jumps().apply(variables, x), S)


def test_wrong_methods_and_narrow_inputs():
    for method in (None, ["four"], "five"):
        with pytest.raises(ValueError, match="unknown method"):
            bound(jnp.tanh, S, method=method)
    with pytest.raises(ValueError, match="maps globs of layer names"):
        bound(jnp.tanh, S, method={3: "four"})
    with pytest.raises(ValueError, match="16 bits a number or more"):
        lipschitz.bound(jnp.tanh, jnp.ones(3, jnp.float8_e4m3fn))
    assert lipschitz.bound(jnp.tanh, np.ones(3)).value.dtype == jnp.float32  # of float64 without x64, no warning


def test_bad_input():
    for x in (jnp.ones(3, jnp.int32), 1.0, jnp.ones(2, jnp.complex64)):
        with pytest.raises(ValueError, match="must be an array of a real floating dtype, or a tree of such, got"):
            lipschitz.bound(lambda x: x, x)
    with pytest.raises(ValueError, match="no arrays"):
        lipschitz.bound(lambda x: x, {})
    with pytest.raises(ValueError, match="a primitive is"):
        lipschitz.register_rule(3, lambda x: 1.0)
    with pytest.raises(ValueError, match="margins are of one array of logits"):
        lipschitz.margins(lambda x: (x, x), jnp.ones(S))


# --- Transformations


def mlp(params):
    def fn(x):
        y = nn.relu((x @ params["first"] + params["bias"]) * params["scale"])
        return jnp.concatenate([y @ params["second"], x])

    return fn


PARAMS = {"first": W, "bias": B, "scale": DYADIC, "second": V}


def test_the_same_under_jit_and_vmap():
    params = jax.tree.map(jnp.asarray, PARAMS)
    of = lambda p: lipschitz.bound(mlp(p), jnp.ones(S)).value
    np.testing.assert_allclose(jax.jit(of)(params), of(params), rtol=1e-5)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    np.testing.assert_allclose(jax.vmap(of)(many)[0], of(params), rtol=1e-5)
    whole = jax.jit(lambda p: lipschitz.bound(mlp(p), jnp.ones(S)))(params)
    assert "Lipschitz at most" in str(whole)


def alike(params):
    """Layers of one kind, with and without a scale behind them, and one matrix twice."""

    def fn(x):
        for i, (matrix, kernel, scale) in enumerate(zip(*params, strict=True)):
            y = conv(jnp.tanh(x @ matrix)[None], kernel, pads=(1, 1))[0]
            x = jnp.tanh(y * scale if i % 2 else y) + x @ params[0][0]
        return x

    return fn


def test_kernels_of_one_kind_share_a_program_under_jit():
    """With the numbers of each, whatever has been folded in; a NaN in one of them is told."""
    rng = np.random.default_rng(5)
    params = [rng.standard_normal(shape).astype(DTYPE) for shape in ((4, 3, 3), (4, 3, 3, 3), (4, 3))]
    of = lambda p: lipschitz.bound(alike(p), jnp.ones((5, 3))).value
    value, gradient = jax.jit(jax.value_and_grad(of))(params)
    assert value == pytest.approx(float(of(params)), rel=1e-5)
    for one, other in zip(gradient, jax.grad(of)(params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-4 * np.abs(other).max())
    sizes = [len(jax.jit(of).lower([x[:n] for x in params]).as_text()) for n in (2, 4)]
    assert sizes[1] < 1.5 * sizes[0]
    for i in range(3):
        broken = [x.copy() for x in params]
        broken[i].ravel()[-1] = np.nan
        assert np.isnan(jax.jit(of)(broken))


def test_gradients_are_finite_differences(x64):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), PARAMS)
    of = jax.jit(lambda p: lipschitz.bound(mlp(p), jnp.ones(S, jnp.float64)).value)
    gradient = jax.grad(of)(params)
    for name in params:
        direction = jnp.asarray(np.random.default_rng(1).standard_normal(params[name].shape))
        step = lambda t: of(params | {name: params[name] + t * direction})
        slope = (step(1e-5) - step(-1e-5)) / 2e-5
        np.testing.assert_allclose(jnp.sum(gradient[name] * direction), slope, rtol=1e-3, atol=1e-6)


def test_gradients_at_zero_are_finite():
    of = lambda p: lipschitz.bound(mlp(p), jnp.ones(S)).value + lipschitz.margins(mlp(p), jnp.ones(S)).sum()
    for zero in ("first", "scale", "second"):
        params = jax.tree.map(jnp.asarray, PARAMS)
        gradient = jax.grad(of)(params | {zero: jnp.zeros_like(params[zero])})
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))


UNDER_JIT = {
    "places": lambda p: lambda x: (x @ p)[:, jnp.array([0, 2])],
    "places from the end": lambda p: lambda x: (x @ p)[:, jnp.array([-1, 0])],
    "diagonal": lambda p: lambda x: jnp.diagonal(x @ p),
    "weights of edges": lambda p: lambda x: over_edges((x @ p).T / jnp.arange(1, 4)[:, None], HUB[:3, :3]),
    "means over edges": lambda p: lambda x: mean_over_edges((x @ p).T, RING[:3, :3]),
    "counted loop": lambda p: lambda x: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] @ p), (0, x))[1],
    "known branch": lambda p: lambda x: lax.cond(jnp.arange(3).sum() > 2, lambda y: y @ p, lambda y: jnp.sign(y), x),
    "masked": lambda p: lambda x: jnp.where(jnp.tril(jnp.ones(S, bool)), x @ p, 0),
}


@pytest.mark.parametrize("name", UNDER_JIT)
def test_constants_stay_known_under_jit(name):
    make = UNDER_JIT[name]
    of = lambda p: lipschitz.bound(make(p), jnp.ones(S)).value
    np.testing.assert_allclose(jax.jit(of)(jnp.asarray(W)), of(jnp.asarray(W)), rtol=1e-5)


def test_interval_is_not_for_jit():
    of = lambda kernel: lipschitz.bound(lambda x: conv(x, kernel), jnp.ones((1, 4, 3)), method="interval").value
    with pytest.raises(ValueError, match="works on numbers, not inside jit"):
        jax.jit(of)(jnp.asarray(STACK))


# --- Rules of users


@pytest.fixture
def rules():
    """The table of users' rules, put back afterwards."""
    before = dict(USER_RULES)
    yield
    USER_RULES.clear()
    USER_RULES.update(before)


def test_a_rule_for_a_new_primitive(rules):
    twice = core.Primitive("twice")
    twice.def_abstract_eval(lambda x: x)
    fn = lambda x: twice.bind(jnp.tanh(x)) @ W
    with pytest.raises(lipschitz.UnboundedError, match=r"'twice' .* has no rule: write one with .*register_rule"):
        bound(fn, S)
    seen = []
    lipschitz.register_rule(twice, lambda x: seen.append(x.shape) or 2)
    found = bound(fn, S)
    assert 2 * norm(W) <= found <= 2.002 * norm(W)
    assert seen == [S]
    lipschitz.register_rule("twice", lambda x: None)
    with pytest.raises(lipschitz.UnboundedError, match="has no Lipschitz constant, by the rule"):
        bound(fn, S)


def test_a_rule_of_constants_and_several_results(rules):
    both = core.Primitive("both")
    both.multiple_results = True
    both.def_abstract_eval(lambda x, c: [x, x])
    lipschitz.register_rule("both", lambda x, c: jnp.max(jnp.abs(c)))
    assert bound(lambda x: both.bind(x, jnp.array([3.0, 1.0])), (2,)) == pytest.approx(3, rel=1e-5)
    # Two results of one node, side by side: not √2 times it.
    assert bound(lambda x: jnp.stack(both.bind(x, jnp.array([3.0]))), (2,)) == pytest.approx(3, rel=1e-5)


def test_a_rule_in_place_of_another(rules):
    lipschitz.register_rule("tanh", lambda x, **params: 5.0)
    assert bound(jnp.tanh, S) == pytest.approx(5, rel=1e-5)


# --- Margins


def margins_seen(fn, shape):
    """The steepest of each z_i - z_j that plain JAX finds."""
    classes = jax.eval_shape(fn, jax.ShapeDtypeStruct(shape, jnp.float32)).shape[-1]
    pairs = np.zeros((classes, classes))
    for i in range(classes):
        for j in range(classes):
            pairs[i, j] = i != j and steepest_seen(lambda x: fn(x)[..., i] - fn(x)[..., j], shape)
    return pairs


LOGITS = {
    "matrix": lambda x: x @ W,
    "matrix and bias": lambda x: x @ W + B,
    "network": lambda x: jnp.tanh(x @ TALL) @ WIDE - B,
    "scaled": lambda x: (jnp.tanh(x @ V) @ W) * B,
    "no last matrix": lambda x: nn.relu(x @ W),
    "log_softmax": lambda x: nn.log_softmax(x @ W),
    "twice": lambda x: 2 * (jnp.tanh(x) @ W),
    "from entries that repeat": lambda x: jnp.concatenate([x, x], 1) @ np.concatenate([W, V]),
}


@pytest.mark.parametrize("name", LOGITS)
def test_margins_are_never_below(name):
    fn = LOGITS[name]
    found = np.asarray(lipschitz.margins(fn, jnp.ones((1, 3))), np.float64)
    assert np.all(found >= margins_seen(fn, (1, 3)) * (1 - 1e-12))
    assert np.all(np.diag(found) == 0)
    assert np.all(found == found.T)


def test_margins_of_a_matrix_are_distances_of_columns():
    columns = W.astype(np.float64).T
    distances = np.linalg.norm(columns[:, None] - columns[None], axis=-1)
    found = np.asarray(lipschitz.margins(lambda x: x @ W + B, jnp.ones((1, 3))))
    np.testing.assert_allclose(found, distances, rtol=1e-3)


def test_margins_of_reshaped_logits():
    fn = lambda x: (x @ np.concatenate([W, V], 1)).reshape(2, 3)
    found = np.asarray(lipschitz.margins(fn, jnp.ones((1, 3))), np.float64)
    assert np.all(found >= margins_seen(fn, (1, 3)) * (1 - 1e-12))


# --- Random networks


def random_layer(rng, depth):
    """A function of (4, 4) into (4, 4), with its name."""
    matrix = (rng.standard_normal((4, 4)) * (rng.random((4, 4)) < rng.choice([0.3, 1]))).astype(DTYPE)
    vector = (rng.standard_normal(4) * (rng.random(4) < 0.8)).astype(DTYPE)
    taps = rng.standard_normal((3, 4, 4)).astype(DTYPE) if rng.random() < 0.7 else np.ones((3, 4, 4), DTYPE)
    mask, places, axis = rng.random((4, 4)) < 0.5, rng.integers(0, 4, 4).astype(np.int32), int(rng.integers(2))
    number = float(np.float32(rng.choice([-3, 0.5, 1, 2])))
    mode = str(rng.choice(["wrap", "reflect", "edge", "constant"]))
    fill = float(rng.integers(-2, 3))
    layers = {
        "dense": lambda x: x @ matrix,
        "dense on the left": lambda x: matrix @ x,
        "bias": lambda x: x + vector,
        "from constants": lambda x: vector - x,
        "scale": lambda x: x * vector,
        "division": lambda x: x / (vector + np.copysign(DTYPE(0.5), vector)),
        "scale of rows": lambda x: x * vector[:, None],
        "number": lambda x: number * x,
        "relu": nn.relu,
        "tanh": jnp.tanh,
        "gelu": nn.gelu,
        "silu": nn.silu,
        "leaky": lambda x: jnp.where(x > fill, x - fill, 0.25 * (x - fill)),
        "abs": lambda x: jnp.abs(x - 1),
        "clip": lambda x: jnp.clip(x, -1, 2),
        "reverse": lambda x: jnp.flip(x, axis),
        "roll": lambda x: jnp.roll(x, 1, axis),
        "transpose": lambda x: x.T,
        "regroup": lambda x: x.reshape(2, 8).T.reshape(4, 4),
        "by columns": lambda x: lax.reshape(x, (2, 8), (1, 0)).reshape(4, 4),
        "stack": lambda x: jnp.stack([x[:2], matrix[:2], x[2:]])[np.array([0, 1 + axis])].reshape(4, 4),
        "contraction": lambda x: x + jnp.tensordot(x, matrix[:, :, None] * vector, ((1, 0), (0, 1))),
        "softmax": lambda x: nn.softmax(number * x, axis=axis),
        "log_softmax": lambda x: nn.log_softmax(x, axis=axis),
        "picked": lambda x: nn.log_softmax(x, axis=axis)[places][:, :1] * vector - x,
        "cross-entropy": lambda x: jnp.sum(taps[0] * nn.log_softmax(x, axis), axis)[:, None] * vector,
        "labels": lambda x: jax.vmap(optax.softmax_cross_entropy_with_integer_labels)(x, places) - x[:, :1],
        "log ratios": lambda x: nn.log_softmax(x, axis) - nn.log_softmax(x, axis)[places],
        "binary": lambda x: vector * nn.log_sigmoid(number * x) - (1 - vector) * nn.log_sigmoid(-number * x),
        "threshold": lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - abs(number), 0),
        "snake": lambda x: x + jnp.sin(number * x) ** 2,
        "logsumexp": lambda x: x - nn.logsumexp(x, axis=axis, keepdims=True),
        "centre": lambda x: x - number * x.mean(axis, keepdims=True),
        "level": lambda x: jnp.broadcast_to(x.max(axis, keepdims=True), (4, 4)),
        "range": lambda x: (x.max(axis, keepdims=True) - x.min(axis, keepdims=True)) * np.ones((4, 4), DTYPE),
        "sort": lambda x: jnp.sort(x, axis),
        "cumsum": lambda x: jnp.cumsum(x, axis),
        "norm": lambda x: x * 0 + jnp.linalg.norm(x, axis=axis, keepdims=True),
        "normalise": lambda x: number * x / (jnp.sqrt(jnp.sum(x**2, axis, keepdims=True) + abs(fill)) + 0.3),
        "standardise": lambda x: vector * jax.nn.standardize(x, axis, epsilon=0.1),
        "group norm": lambda x: number * group_normalised(x.reshape(2, 2, 2, 2)).reshape(4, 4),
        "both signs": lambda x: jnp.concatenate([nn.relu(x[:2]), nn.relu(-x[:2])]),
        "beside": lambda x: jnp.concatenate([nn.gelu(number * x[:2]), jnp.tanh(x[1:3])]),
        "waves": lambda x: jnp.concatenate([jnp.sin(number * x[:2]), jnp.cos(number * x[:2])]),
        "masked": lambda x: number * x * (x > 0),
        "rotate": lambda x: jnp.concatenate([number * x[:2] - x[2:] * vector, number * x[2:] + x[1:3]]),
        "wavelet": lambda x: haar(x if axis else haar(x)),
        "slopes": lambda x: jnp.where(x > 0, x, vector * x),
        "mean window": lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 1), (1, 1), "SAME") / (1 + np.abs(vector)),
        "shorten": lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=axis, keepdims=True), 0.7),
        "gate": lambda x: jnp.tanh(x @ matrix) * nn.sigmoid(number * x),
        "gather": lambda x: x[places],
        "write": lambda x: x.at[places[:1]].set(number * x[1:2]),
        "write across": lambda x: x.T.at[:, np.unique(places)].set(x[:, : len(np.unique(places))]),
        "edges": lambda x: jnp.zeros((4, 4), x.dtype).at[places].add(x[places[::-1]] * matrix),
        "edges and self": lambda x: x.at[places[:3]].add(nn.softplus(x[1:]) * vector),
        "means": lambda x: jnp.zeros((4, 4), x.dtype).at[:, places].add(x[places]) / (1 + np.abs(vector)),
        "largest": lambda x: x.at[places].max(number * x),
        "mask": lambda x: jnp.where(mask, x, fill),
        "mix": lambda x: jnp.where(mask, x, x.T),
        "shift": lambda x: jnp.pad(x, ((1, 0), (0, 0)), constant_values=fill)[:4],
        "window": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "SAME"),
        "conv": lambda x: conv(jnp.pad(x[None], ((0, 0), (1, 1), (0, 0)), mode=mode), taps)[0],
        "halves": lambda x: jnp.concatenate([x[:2], 2 * x[1:3]]),
    }
    if depth:
        parts = [random_network(rng, depth - 1) for _ in range(2)]
        (one, first), (two, second) = parts
        joined = {
            "residual": lambda x: x + first(x),
            "difference": lambda x: first(x) - second(x),
            "maximum": lambda x: jnp.maximum(first(x), second(x)),
            "extremes": lambda x: jnp.maximum(first(x), x) + jnp.minimum(first(x), x),
            "beside": lambda x: jnp.concatenate([first(x)[:2], second(x)[1:3]]),
            "chosen": lambda x: jnp.where(mask, first(x), second(x)),
        }
        name = str(rng.choice([*joined]))
        if rng.random() < 0.3:
            return f"{name}({one}; {two})", joined[name]
    name = str(rng.choice([*layers]))
    return name, layers[name]


def group_normalised(x):
    return (x - x.mean((0, 3), keepdims=True)) / (0.3 + jnp.std(x, (0, 3), keepdims=True))


def random_network(rng, depth=2):
    """A few random layers, one after the other."""
    layers = [random_layer(rng, depth) for _ in range(rng.integers(1, 4 if depth < 2 else 6))]

    def fn(x):
        for _, layer in layers:
            x = layer(x)
        return x

    return " → ".join(name for name, _ in layers), fn


def check_random_network(number):
    """Whether it was bounded at all: compositions of activations may be refused."""
    rng = np.random.default_rng((SEED, number))
    text, fn = random_network(rng)
    try:
        found = bound(fn, (4, 4))
    except lipschitz.UnboundedError:
        return False
    with jax.enable_x64(True):
        jacobians = jax.jit(jax.vmap(jax.jacfwd(flat(fn, (4, 4)))), compiler_options=QUICK)
        at = points((4, 4), number, 8)
        for _ in range(2):  # near the steepest of them, the steepest again
            found_here = np.asarray(jacobians(jnp.asarray(at)))
            finite = np.all(np.isfinite(found_here), axis=(1, 2), keepdims=True)  # far out, plain JAX may overflow
            norms = np.linalg.norm(np.where(finite, found_here, 0), 2, axis=(1, 2))
            assert found >= norms.max() * (1 - 1e-12), f"FUZZ_SEED={SEED}, network {number}: {text}: {found}, {norms}"
            best = at[norms.argmax()]
            at = best + rng.standard_normal(at.shape) * np.geomspace(1e-2, 1, 8)[:, None] * np.abs(best).mean()
    return True


@pytest.mark.parametrize("tenth", range(10))
def test_random_networks(tenth):
    bounded = [check_random_network(number) for number in range(tenth, FEW, 10)]
    assert sum(bounded) >= len(bounded) / 2


@pytest.mark.parametrize("spread", [0, 3, 40])
def test_the_norm_of_few_entries_is_never_below_and_near(spread):
    """Several entries in one place, components apart, sizes far apart."""
    rng = np.random.default_rng((SEED, spread))
    for _ in range(100):
        m, n, count = rng.integers(1, 9, 3)
        rows, columns = rng.integers(0, m, count), rng.integers(0, n, count)
        values = np.exp(spread * rng.standard_normal(count)) * (rng.random(count) < 0.9)
        dense = np.zeros((m, n))
        np.add.at(dense, (rows, columns), values)
        assert norm(dense) * (1 - 1e-14) <= norm_above(rows, columns, values) <= norm(dense) * 1.05
    assert norm_above(rows[:0], columns[:0], values[:0]) == 0
    assert np.isnan(norm_above(rows, columns, values * np.nan))


FAR = {
    "norm": lambda x: jnp.sqrt(jnp.sum(x**2) * 1e-200 * 1e-200) * 1e200,
    "large norm": lambda x: jnp.sqrt(jnp.sum(x**2) * 1e150 * 1e150) * 1e-150,
    "normalised": lambda x: (x / ((jnp.linalg.norm(x) + 1e200) * 1e100)) * 1e200 * 1e100,
    "edges": lambda x: jnp.zeros(2).at[np.arange(2)].add(x * MINUTE) * MINUTE / MINUTE / MINUTE,
}
MINUTE = np.array([1e-200, 2e-200])


@pytest.mark.parametrize("name", FAR)
def test_factors_that_leave_the_floats_on_the_way_are_not_lost(name):
    with jax.enable_x64(True):
        assert lipschitz.bound(FAR[name], jnp.ones(2)).value >= 1 - 1e-12


def test_nothing_may_be_written():
    assert bound(lambda x: jax.ops.segment_sum(x, np.zeros(4, int), num_segments=0), (4,)) == 0
    assert bound(lambda x: x.at[np.zeros(0, int)].set(jnp.zeros(0)), (4,)) == 1


@pytest.mark.fuzz
def test_many_random_networks():
    for number in range(CASES):
        check_random_network(number)
        if number % 200 == 199:
            jax.clear_caches()


def test_a_nan_in_one_of_two_branches_is_not_lost():
    broken, whole = jnp.full((2, 2), jnp.nan), jnp.eye(2)
    value = lipschitz.bound(lambda x: jnp.concatenate([x @ broken, jnp.tanh(x @ whole)], 1), jnp.ones((1, 2))).value
    assert np.isnan(value)


def test_slopes_that_cancel_in_floats_do_not_vanish():
    assert float(lipschitz.bound(lambda x: (1e17 * x + x) - 1e17 * x, jnp.ones(2)).value) >= 1


def test_a_comparison_carried_by_a_loop_or_a_branch_is_refused():
    def loop(x):
        return jax.lax.scan(lambda c, _: (c, x > 0), x, length=2)[1][0]

    def branch(x, flag):
        return jax.lax.cond(flag, lambda: x > 0, lambda: x > 1)

    with pytest.raises(lipschitz.UnboundedError, match="comparison"):
        lipschitz.bound(lambda x: jnp.where(loop(x), 1.0, 0.0), jnp.ones(2))
    with pytest.raises(lipschitz.UnboundedError, match="comparison"):
        jax.jit(lambda flag: lipschitz.bound(lambda x: jnp.where(branch(x, flag), 1.0, 0.0), jnp.ones(2)).value)(True)


def test_a_method_for_a_layer_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"'Cnov\*', but no such layer"):
        lipschitz.bound(lambda x: x @ jnp.eye(2), jnp.ones((1, 2)), method={"Cnov*": "grid"})


def test_equinox_and_haiku_modules():
    equinox, haiku = pytest.importorskip("equinox"), pytest.importorskip("haiku")
    dense = equinox.nn.Linear(3, 2, key=jax.random.key(0))
    exact = np.linalg.norm(np.asarray(dense.weight, np.float64), 2)
    assert exact <= float(lipschitz.bound(dense, jnp.ones(3)).value) <= exact * 1.001
    model = haiku.without_apply_rng(haiku.transform(lambda x: jnp.tanh(haiku.Linear(2)(x))))
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))
    exact = np.linalg.norm(np.asarray(params["linear"]["w"], np.float64), 2)
    found = float(lipschitz.bound(lambda x: model.apply(params, x), jnp.ones((1, 3))).value)
    assert exact <= found <= exact * 1.001


def test_nnx_modules_that_change_when_they_are_called():
    norm, x = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), jnp.ones((2, 3))
    with pytest.raises(
        ValueError, match=r"bound lambda x: nnx\.clone\(model\)\(x\), of a trained one after model\.eval"
    ):
        lipschitz.bound(norm, x)
    assert float(lipschitz.bound(lambda x: nnx.clone(norm)(x), x).value) == pytest.approx(1e5**0.5, rel=1e-4)
    norm.eval()
    assert float(lipschitz.bound(norm, x).value) == pytest.approx(1, rel=1e-4)

    layers = nnx.vmap(lambda rngs: nnx.Linear(3, 3, rngs=rngs))(nnx.Rngs(0).split(2))
    chain = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    with pytest.raises(ValueError, match=r"runs nnx\.scan .* bound lambda x: nnx\.clone\(model\)\(x\)"):
        lipschitz.bound(lambda x: chain(x, layers), x)
    product = np.linalg.multi_dot(np.asarray(layers.kernel[...], np.float64))
    found = float(lipschitz.bound(lambda x: chain(x, nnx.clone(layers)), x).value)
    assert np.linalg.norm(product, 2) <= found <= 1.001 * np.linalg.norm(product, 2)


class Block(nn.Module):
    """As in ConvNeXt, and an LSTM behind it."""

    recurrent: bool = True

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(epsilon=0.1)(nn.Conv(4, (3,), feature_group_count=4, padding="CIRCULAR")(x))
        x = x + self.param("scale", nn.initializers.constant(0.1), (4,)) * nn.Dense(4)(nn.gelu(nn.Dense(8)(y)))
        x = nn.GroupNorm(2)(x)
        return nn.RNN(nn.LSTMCell(2, param_dtype=x.dtype))(x) if self.recurrent else x


@pytest.mark.parametrize("recurrent", [True, False])
def test_networks_with_norms_and_gates(recurrent):
    x, net = jnp.ones((1, 3, 4)), Block(recurrent)
    noise = lambda leaf: leaf + jax.random.normal(jax.random.key(SEED + leaf.size), leaf.shape) / 4
    variables = jax.tree.map(noise, net.init(jax.random.key(SEED), x))
    of = lambda v: lipschitz.bound(lambda x: net.apply(v, x), x).value
    found = float(of(variables))
    assert_sound(found, steepest_seen(lambda x: net.apply(variables, x), x.shape))
    if not recurrent:
        value, slope = jax.jit(jax.value_and_grad(of))(variables)
        assert value == pytest.approx(found, rel=1e-5)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(slope))


class TestStep:
    """`lipschitz.step`, an estimate: it comes to the bound, follows the weights, and knows its function."""

    x = jnp.ones((1, 4, 4, 2))
    kernel = jnp.asarray(np.random.default_rng(SEED).normal(size=(3, 3, 2, 3)), jnp.float32) / 4
    scale = jnp.array([0.5, 2.0, 1.0])

    def net(self, kernel):
        def fn(x):
            y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return jnp.tanh(y * self.scale.reshape(1, 1, 1, 3)).reshape(1, -1)[:, :6] @ jnp.eye(6)[:, :2]

        return fn

    def test_it_comes_to_the_bound_from_below(self):
        state = lipschitz.init(self.net(self.kernel), self.x, key=jax.random.key(0), warmup=60)
        value, _ = lipschitz.step(self.net(self.kernel), self.x, state)
        bound = float(lipschitz.bound(self.net(self.kernel), self.x).value)
        assert bound * 0.98 <= float(value) <= bound * 1.0001

    def test_it_follows_the_weights_under_jit_with_a_gradient(self):
        state = lipschitz.init(self.net(self.kernel), self.x, key=jax.random.key(0))

        @jax.jit
        def step(kernel, state):
            return jax.value_and_grad(lambda k, s: lipschitz.step(self.net(k), self.x, s), has_aux=True)(kernel, state)

        (one, state), gradient = step(self.kernel, state)
        (two, _), _ = step(3 * self.kernel, state)
        np.testing.assert_allclose(two, 3 * one, rtol=1e-2)
        np.testing.assert_allclose(jnp.sum(gradient * self.kernel), one, rtol=1e-3)  # homogeneous

    def test_a_state_of_another_function_is_refused(self):
        state = lipschitz.init(self.net(self.kernel), self.x, key=jax.random.key(0))
        for other in (lambda x: x, lambda x: (self.net(self.kernel)(x) @ jnp.ones((2, 5))).ravel()):
            with pytest.raises(ValueError, match="another"):
                lipschitz.step(lambda x, fn=other: jnp.sin(fn(x)) @ jnp.ones(fn(x).shape[-1]), self.x, state)

    def test_batch_norm_stays_beside_the_kernel(self):
        """The gradient of a convolution and its batch norm holds neither the folded kernel nor its gradient."""
        kernel, scale = jnp.ones((3, 3, 64, 128)), jnp.ones(128)

        def net(kernel, scale):
            layout = ("NHWC", "HWIO", "NHWC")
            conv = lambda x: lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
            return lambda x: (conv(x) - 0.5) * scale + 1

        x = jnp.ones((1, 8, 8, 64))
        state = lipschitz.init(net(kernel, scale), x, key=jax.random.key(0), warmup=0)
        step = jax.jit(jax.grad(lambda k, s: lipschitz.step(net(k, s), x, state)[0], argnums=(0, 1)))
        assert step.lower(kernel, scale).compile().memory_analysis().temp_size_in_bytes < kernel.nbytes / 2


@pytest.mark.parametrize("other", ["one entry", "shape", "dtype"])
def test_only_equal_weights_are_one_layer(other):
    """Weights that are made anew in each call are; those that differ in one entry, or in what their bytes mean, not."""
    weights = np.random.default_rng(SEED).normal(size=(4, 4)).astype(np.float32)
    larger = weights.copy()
    larger[3, 2] = 9
    second = {
        "one entry": lambda x: x @ larger.copy(),
        "shape": lambda x: x[:, :1] @ weights.copy().reshape(1, 16),
        "dtype": lambda x: x @ weights.copy().view(np.int32),
    }[other]
    assert bound(lambda x: x @ weights.copy() - x @ weights.copy(), (1, 4)) == 0
    both = lambda x: jnp.concatenate([1e-3 * (x @ weights.copy()), second(x)], axis=1)
    assert_sound(bound(both, (1, 4)), steepest_seen(both, (1, 4)))


MASKED = {
    "quotient": (lambda x, c: x / c, (0.0, math.nan), (math.inf, -2.0)),
    "shift": (lambda x, c: jnp.tanh(x + c), (math.inf, math.nan), (0.0, -2.0)),
    "scale": (lambda x, c: x * c, (math.inf, math.nan), (0.0, -2.0)),
    "maximum": (jnp.maximum, (math.inf, math.nan), (-math.inf, 0.0)),
    "minimum": (jnp.minimum, (-math.inf, math.nan), (math.inf, 0.0)),
    "filler": (lambda x, c: jnp.concatenate([x, c])[1:4], (math.inf, math.nan), (0.0, -2.0)),
}


@pytest.mark.parametrize("name", MASKED)
def test_masks_ask_constants_that_are_not_known_while_tracing(name):
    """Of 5x where h(x) is no number, 0 elsewhere, the constant is 0 if all of h is numbers, or else not known."""
    h, bad, good = MASKED[name]
    of = jax.jit(lambda c: lipschitz.bound(lambda x: jnp.where(jnp.isfinite(h(x, c)), 0, 5 * x), jnp.ones(3)).value)
    for number in bad:
        assert math.isnan(of(jnp.array([1, number, 2])))
    for number in good:
        assert of(jnp.array([1, number, 2])) == 0


def test_masks_ask_branches_that_are_not_known_while_tracing():
    def either(x, flag):
        return lax.cond(flag, lambda x: x, lambda x: jnp.full(3, jnp.inf), x)

    def of(flag):
        return lipschitz.bound(lambda x: jnp.where(jnp.isfinite(either(x, flag)), 0, 5 * x), jnp.ones(3)).value

    with pytest.raises(lipschitz.UnboundedError, match=HIDES):
        jax.jit(of)(False)


def test_mutable_arrays_are_not_written_while_the_bound_is_made():
    count = jax.new_ref(jnp.zeros(()))

    def counting(x):
        count[...] += 1
        return 2 * x

    with pytest.raises(lipschitz.UnboundedError, match="writes to a mutable array"):
        bound(counting, S)
    assert count[...] == 0


def test_mutable_arrays_are_read_when_the_bound_is_made():
    held = jax.new_ref(jnp.array([1.0, 2.0]))
    of = jax.jit(lambda: lipschitz.bound(lambda x: x * held[...], jnp.ones(2)).value)
    for number in (2.0, 7.0):
        held[...] = jnp.array([1.0, number])
        for found in (of(), lipschitz.bound(lambda x: x * held[...], jnp.ones(2)).value):
            assert number <= found <= number * (1 + 1e-6)
