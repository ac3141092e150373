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


def _share(product: Array, side: _Sharing) -> tuple[Array, Array]:
    """Add up what belongs to one vector, at all taps that read it, and take the vectors' squared norms.

    Args:
      product: ``(batch, taps, m, channels)``.
      side: how the taps share.

    Returns:
      The same shape, and squared norms ``(batch, m)``.
    """
    batch, taps, m, channels = product.shape
    rows = taps * m
    # Products of all rows are many for depthwise kernels, which have more taps than channels.
    if rows > _ROWS or (batch > 1 and rows > channels):
        summed = jnp.einsum("mst,btmc->bsmc", side.same, product, precision=HIGHEST)
        return summed, jnp.einsum("btmc,btmc->bm", summed, summed, precision=HIGHEST) / side.readers
    # One matrix for all unfoldings, and norms from a product of matrices: of few rows neither costs anything, and XLA
    # takes far longer to compile a transposition, or a sum of squares.
    flat = product.reshape(batch, rows, channels)
    if taps > 1:
        block_diagonal = np.zeros((taps, m) * 2, np.float32)
        block_diagonal[:, np.arange(m), :, np.arange(m)] = side.same
        flat = lax.dot_general(block_diagonal.reshape(rows, rows), flat, (((1,), (1,)), ((), ())), precision=HIGHEST)
        flat = jnp.swapaxes(flat, 0, 1)
    products = lax.dot_general(flat, flat, (((2,), (2,)), ((0,), (0,))), precision=HIGHEST)
    squares = lax.slice(products.reshape(batch, -1), (0, 0), (batch, rows * rows), (1, rows + 1))
    if taps > 1:
        squares = jnp.sum(squares.reshape(batch, taps, m), axis=1) / side.readers
    return flat.reshape(product.shape), squares


def _over_root(squares: Array) -> Array:
    """1/√x; of zero, a large number."""
    return lax.rsqrt(jnp.maximum(squares, jnp.finfo(squares.dtype).tiny))


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
      scales: ``(batch, m)``, one over the singular values; 1 where the kernel was zero.
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
      0 the old vectors stay.
    """
    batch, *spatial, c_in, c_out = kernels.shape
    out, inp = _sharing(tuple(spatial), state.vectors.shape[2] // len(distinct(tuple(spatial))[0]))
    by_weight = (lambda x: x) if weights is None else (lambda x: x * weights[..., None])
    taps = kernels.reshape(batch, -1, c_in, c_out)
    each_tap = ((0, 1), (0, 1))
    # A CPU has products of matrices at hand, but compiles one with a vector, which takes far longer than to run it:
    # so there are two vectors at least.
    alone = state.vectors.shape[1:3] == (1, 1)
    vectors = jnp.repeat(state.vectors, 2, axis=2) if alone else state.vectors
    by_scale = (lambda x: x) if scale is None else (lambda x: x * scale[:, None, None])
    vectors = by_scale(vectors)
    # Operand order and layout matter on a CPU: vectors along the last axis on both ways, and the
    # kernel as the right operand on the way back, or XLA copies the whole kernel to transpose it.
    # The number of operations matters too: for small kernels a step takes as long as there are many.
    if alone:
        product = lax.dot_general(vectors, taps, (((3,), (3,)), each_tap), precision=HIGHEST)
    else:  # the product runs in half the time, and its transposition is small
        product = jnp.swapaxes(lax.dot_general(taps, vectors, (((3,), (3,)), each_tap), precision=HIGHEST), 2, 3)
    product, squares = _share(by_weight(product), inp)
    inputs = by_weight(product * _over_root(squares)[:, None, :, None])
    bare = _back(inputs * state.scales[:, None, :, None], taps)
    product, squares = _share(by_scale(bare), out)
    if alone:
        squares, inputs, product, bare = squares[:, :1], inputs[:, :, :1], product[:, :, :1], bare[:, :, :1]
    over = _over_root(squares)
    outputs = product * over[:, None, :, None]
    alive = squares > 0
    scales = jnp.where(alive, state.scales * over, 1)
    new = jnp.where(alive[:, None, :, None], outputs * scales[:, None, :, None], state.vectors)
    values, after = squares * over / state.scales, PowerState(new, scales)
    if scale is None:
        return Pairs(values, inputs, outputs), after
    gains = jnp.sum(outputs * bare, axis=1) / state.scales[..., None]
    return Pairs(values, inputs, by_scale(outputs), gains), after


def state_shape(kernels: Array, repeats: int = 1) -> tuple[int, int, int, int]:
    """Shape of the vectors of a `PowerState` for ``(batch, *spatial, c_in, c_out)``."""
    batch, *spatial, _, c_out = kernels.shape
    return batch, math.prod(spatial), repeats * len(distinct(tuple(spatial))[0]), c_out


def start(key: Array, kernels: Array, repeats: int = 1) -> PowerState:
    """Random vectors for `step`, scaled by the Frobenius norms of the kernels, near enough to start."""
    shape = state_shape(kernels, repeats)
    random = generic(key, shape, kernels.dtype)
    vectors, squares = _share(random, _sharing(kernels.shape[1:-2], repeats)[0])
    vectors = vectors * _over_root(squares)[:, None, :, None]
    size = jax.vmap(lambda kernel: unit(kernel)[0])(kernels)
    scale = 1 / jnp.where(size > 0, size, 1)
    return PowerState(vectors * scale[:, None, None, None], jnp.broadcast_to(scale[:, None], (shape[0], shape[2])))
