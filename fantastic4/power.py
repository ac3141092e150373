"""The power step of all unfoldings of a kernel at once, in two passes over it.

The matrices are never built. At each tap the vectors of all of them form a skinny matrix: T has one vector
for every tap, U one of its own at each, R one for each row of taps. So one product ``K[t] @ X[t]`` a tap
serves all of them, followed by sums over the taps that share a vector.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fantastic4.linalg import HIGHEST, generic, unit
from fantastic4.unfolding import Axes, Pairs, distinct, others

_ROWS = 100  # taps times unfoldings up to which they are one matrix: 5×5
_LARGE = 2**20  # entries of a kernel from which on a CPU waits for memory, not for arithmetic
_COLUMNS, _UNROLLED = 4, 16  # columns, and rows of a kernel, of which LLVM still unrolls all the products


class _Sharing(NamedTuple):
    """Which taps of an unfolding read the same vector.

    Attributes:
      same: ``(m, taps, taps)``, 1 where two taps share: to sum what each contributes and hand the sum
        to all of them is a product with this.
      readers: ``(m,)``, how many taps share one vector.
    """

    same: np.ndarray
    readers: np.ndarray


@functools.cache
def _sharing(taps: tuple[int, ...], repeats: int = 1) -> tuple[_Sharing, _Sharing]:
    """For the output vectors and for the input vectors of the distinct unfoldings, ``repeats`` times over."""
    grid = np.indices(taps).reshape(len(taps), -1)

    def sharing(owned: list[Axes]) -> _Sharing:
        same = [np.all(grid[list(axes), :, None] == grid[list(axes), None, :], axis=0) for axes in owned]
        readers = [s[0].sum() for s in same]
        return _Sharing(np.array(same * repeats, np.float32), np.array(readers * repeats, np.float32))

    outputs = distinct(taps)[0]
    return sharing(list(outputs)), sharing([others(taps, axes) for axes in outputs])


def _is_flat(shape: tuple[int, ...]) -> bool:
    """Whether the vectors of all unfoldings, ``(batch, taps, m, channels)``, go into one matrix of few rows.

    Products of all rows are many for depthwise kernels, which have more taps than channels.
    """
    batch, taps, m, channels = shape
    return taps * m <= _ROWS and (batch == 1 or taps * m <= channels)


def _share(product: Array, side: _Sharing) -> tuple[Array, Array]:
    """Add up what belongs to one vector, at all taps that read it, and take the vectors' squared norms.

    Args:
      product: ``(batch, taps, m, channels)``.
      side: how the taps share.

    Returns:
      The same shape, and squared norms ``(batch, m)``.
    """
    batch, taps, m, channels = product.shape
    rows, readers = taps * m, np.broadcast_to(side.readers.astype(product.dtype), (batch, m))
    if not _is_flat(product.shape):
        summed = jnp.einsum("mst,btmc->bsmc", side.same, product, precision=HIGHEST)
        return summed, jnp.einsum("btmc,btmc->bm", summed, summed, precision=HIGHEST) / readers
    # One matrix for all unfoldings, and norms from a product of matrices: of few rows neither costs anything, and XLA
    # takes far longer to compile a transposition, or a sum of squares.
    flat = lax.reshape(product, (batch, rows, channels))
    if taps > 1:
        block_diagonal = np.zeros((taps, m) * 2, product.dtype)
        block_diagonal[:, np.arange(m), :, np.arange(m)] = side.same
        flat = lax.dot_general(block_diagonal.reshape(rows, rows), flat, (((1,), (1,)), ((), ())), precision=HIGHEST)
        flat = lax.transpose(flat, (1, 0, 2))
    products = lax.dot_general(flat, flat, (((2,), (2,)), ((0,), (0,))), precision=HIGHEST)
    squares = lax.slice(lax.reshape(products, (batch, rows * rows)), (0, 0), (batch, rows * rows), (1, rows + 1))
    if taps > 1:
        squares = lax.div(lax.reduce_sum(lax.reshape(squares, (batch, taps, m)), (1,)), readers)
    return lax.reshape(flat, product.shape), squares


def _over_root(squares: Array) -> Array:
    """1/√x; of zero, a large number."""
    return lax.rsqrt(lax.max(squares, np.full(squares.shape, np.finfo(squares.dtype).tiny)))


def _times(x: Array, factors: Array) -> Array:
    """``(batch, taps, m, channels)`` times ``(batch, m)``."""
    return lax.mul(x, lax.broadcast_in_dim(factors, x.shape, (0, 2)))


def _rows_times(x: Array, factors: Array) -> Array:
    """The same as a product of matrices, of which XLA compiles one for all numbers of channels."""
    batch, taps, m, channels = x.shape
    if not _is_flat(x.shape):
        return _times(x, factors)
    rows = taps * m
    diagonal = lax.broadcast(np.eye(rows, dtype=x.dtype).reshape(rows, taps, m), (batch,))
    diagonal = lax.mul(diagonal, lax.broadcast_in_dim(factors, diagonal.shape, (0, 3)))
    diagonal, flat = lax.reshape(diagonal, (batch, rows, rows)), lax.reshape(x, (batch, rows, channels))
    return lax.reshape(lax.dot_general(diagonal, flat, (((2,), (1,)), ((0,), (0,))), precision=HIGHEST), x.shape)


def _each_tap(x: Array, taps: Array) -> Array:
    """``(batch, taps, m, c_in)`` times ``(batch, taps, c_in, c_out)``."""
    return lax.dot_general(x, taps, (((3,), (2,)), ((0, 1), (0, 1))), precision=HIGHEST)


def _each_tap_streamed(x: Array, taps: Array) -> Array:
    """The same, and reads the kernel once.

    A CPU's product of matrices packs its right operand first: it reads a kernel, writes it and reads it again. Here
    one loop reads each row once, for all m columns, and sums `_UNROLLED` of them in registers. They are neighbours, so
    that each device sums its own of a kernel whose inputs are sharded.
    """
    batch, count, c_in, c_out = taps.shape
    m = x.shape[2]
    # XLA would make x anew for each row, but does not look through a product.
    x = lax.dot_general(jnp.eye(m, dtype=x.dtype), x, (((0,), (2,)), ((), ())), precision=HIGHEST)
    rows = taps.reshape(batch * count, c_in // _UNROLLED, _UNROLLED, c_out)
    x = x.reshape(m, batch * count, c_in // _UNROLLED, _UNROLLED, 1)
    zero = jnp.zeros((), taps.dtype)
    add = lambda a, b: [p + q for p, q in zip(a, b, strict=True)]  # noqa: E731
    parts = lax.reduce([rows * x[i] for i in range(m)], [zero] * m, add, (2,))
    return jnp.stack([jnp.sum(part, axis=1) for part in parts], axis=1).reshape(batch, count, m, c_out)


def _back(x: Array, taps: Array) -> Array:
    """What the inputs ``(batch, taps, m, c_in)`` give at the outputs of each tap, ``(batch, taps, m, c_out)``."""
    if math.prod(taps.shape[1:]) < _LARGE or x.shape[2] != _COLUMNS or taps.shape[2] % _UNROLLED:
        return _each_tap(x, taps)
    return lax.platform_dependent(x, taps, cpu=_each_tap_streamed, default=_each_tap)


class PowerState(NamedTuple):
    """What the next power step starts from, for all distinct unfoldings.

    Attributes:
      vectors: ``(batch, taps, m, c_out)``, left singular vectors as each tap reads them, divided by
        their singular values: so the squares inside a step are near 1, and neither overflow nor vanish.
        A kernel with a single tap has a second one, that nobody reads.
      scales: ``(batch, m)``, one over the singular values; of a zero kernel those before it.
    """

    vectors: Array
    scales: Array


def step(
    kernels: Array, state: PowerState, weights: Array | None = None, scale: Array | None = None
) -> tuple[Pairs, PowerState]:
    """One power iteration of every unfolding, in two passes over the kernels.

    Args:
      kernels: ``(batch, *spatial, c_in, c_out)``.
      state: of kernels of this shape.
      weights: ``(batch, taps, m)``, by which each tap counts in each unfolding, m a multiple of the number
        of distinct ones; 1 without.
      scale: ``(batch, c_out)``, by which the outputs are multiplied: the kernels with it are never written down.

    Returns:
      The singular values reached (from below) with their vectors, and the new state. Where a value is
      0 the old state stays.
    """
    # Written in lax: a step is traced for each shape in a network, and jnp takes three times as long.
    batch, *spatial, c_in, c_out = kernels.shape
    m, kinds = state.vectors.shape[2], len(distinct(tuple(spatial))[0])
    used = kinds if weights is None else weights.shape[2]
    out, inp = _sharing(tuple(spatial), m // kinds)
    by_weight = (lambda x: x) if weights is None else (lambda x: x * weights[..., None])
    by_scale = (lambda x: x) if scale is None else (lambda x: x * scale[:, None, None])
    taps = lax.reshape(kernels, (batch, math.prod(spatial), c_in, c_out))
    each_tap = ((0, 1), (0, 1))
    zero, largest = (np.full(state.scales.shape, x, taps.dtype) for x in (0, np.finfo(taps.dtype).max))
    vectors = by_scale(state.vectors)
    # Operand order and layout matter on a CPU: vectors along the last axis on both ways, and the
    # kernel as the right operand on the way back, or XLA copies the whole kernel to transpose it.
    # The number of operations matters too: for small kernels a step takes as long as there are many, and XLA compiles
    # those that are not products of matrices anew for each number of channels.
    if math.prod(spatial) == 1:
        product = lax.dot_general(vectors, taps, (((3,), (3,)), each_tap), precision=HIGHEST)
    else:  # the product runs in half the time, and its transposition is small
        product = lax.dot_general(taps, vectors, (((3,), (3,)), each_tap), precision=HIGHEST)
        product = lax.transpose(product, (0, 1, 3, 2))
    product, squares = _share(by_weight(product), inp)
    over = _over_root(squares)
    inputs = by_weight(_times(product, over))
    # Of a zero kernel the factor may be infinite, and its product with zero no number.
    scaled = by_weight(_rows_times(product, lax.min(lax.mul(over, state.scales), largest)))
    bare = _back(scaled, taps)
    product, squares = _share(by_scale(bare), out)
    over = _over_root(squares)
    outputs, scales = _times(product, over), lax.mul(state.scales, over)
    alive = lax.gt(squares, zero)
    new = lax.select(lax.broadcast_in_dim(alive, outputs.shape, (0, 2)), _times(outputs, scales), state.vectors)
    values = lax.div(lax.mul(squares, over), state.scales)
    after = PowerState(new, lax.select(alive, scales, state.scales))
    if used < m:
        cut = lambda x, axis: lax.slice_in_dim(x, 0, used, axis=axis)  # noqa: E731
        values, inputs, outputs, bare = cut(values, 1), cut(inputs, 2), cut(outputs, 2), cut(bare, 2)
    if scale is None:
        return Pairs(values, inputs, outputs), after
    gains = jnp.sum(outputs * bare, axis=1) / state.scales[:, :used, None]
    return Pairs(values, inputs, by_scale(outputs), gains), after


def state_shape(kernels: Array, repeats: int = 1) -> tuple[int, int, int, int]:
    """Shape of the vectors of a `PowerState` for ``(batch, *spatial, c_in, c_out)``."""
    batch, *spatial, _, c_out = kernels.shape
    # Two at least: a CPU has products of matrices at hand, but compiles one with a vector, which takes far longer than
    # to run it.
    return batch, math.prod(spatial), max(2, repeats * len(distinct(tuple(spatial))[0])), c_out


def start(key: Array, kernels: Array, repeats: int = 1) -> PowerState:
    """Random vectors for `step`, scaled by the Frobenius norms of the kernels, near enough to start."""
    shape = state_shape(kernels, repeats)
    random = generic(key, shape, kernels.dtype)
    spatial = kernels.shape[1:-2]
    vectors, squares = _share(random, _sharing(spatial, shape[2] // len(distinct(spatial)[0]))[0])
    vectors = _times(vectors, _over_root(squares))
    size = jax.vmap(lambda kernel: unit(kernel)[0])(kernels)
    scales = jnp.broadcast_to((1 / jnp.where(size > 0, size, 1))[:, None], (shape[0], shape[2]))
    return PowerState(_times(vectors, scales), scales)
