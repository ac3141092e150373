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

from fantastic4.conv import polyphase_taps
from fantastic4.linalg import HIGHEST, generic, unit
from fantastic4.unfolding import Pairs, distinct, others

_ROWS = 216  # taps times unfoldings up to which they are one matrix: 7×7, 3×3×3


class _Reading(NamedTuple):
    """Which vector each tap of an unfolding reads: T has one for all taps on its output side, U one for each.

    Attributes:
      reads: ``(taps · m, vectors)``, 1 where a tap of an unfolding reads that vector.
      belongs: ``(m, vectors)``, 1 for the vectors of an unfolding.
    """

    reads: np.ndarray
    belongs: np.ndarray

    @property
    def plain(self) -> bool:
        """Whether each row is a vector of its own: kernels with a single tap."""
        return self.reads.shape == self.belongs.shape


@functools.cache
def _reading(spatial: tuple[int, ...], phases: tuple[int, ...], repeats: int) -> tuple[_Reading, _Reading]:
    """For the output vectors and for the input vectors of the distinct unfoldings, ``repeats`` times over.

    Of a strided kernel the polyphase one is unfolded, whose inputs are those of each phase: taps of different phases
    share no input vector, and taps that a stride apart are neighbours.
    """
    grid = np.indices(spatial).reshape(len(spatial), -1)
    tap, phase = np.divmod(grid, np.array(phases)[:, None])

    def reading(sides: list[np.ndarray]) -> _Reading:
        # Taps with the same row of numbers share a vector.
        places = [np.unique(side.T, axis=0, return_inverse=True)[1].ravel() for side in sides]
        counts = [1 + max(place) for place in places]
        reads = np.zeros((grid.shape[1], len(sides), sum(counts)), np.float32)
        for m, place in enumerate(places):
            reads[np.arange(grid.shape[1]), m, sum(counts[:m]) + place] = 1
        belongs = np.repeat(np.eye(len(sides), dtype=np.float32), counts, axis=1)
        return _Reading(reads.reshape(-1, sum(counts)), belongs)

    taps = polyphase_taps(spatial, phases)
    # Two at least: a CPU has products of matrices at hand, but compiles one with a vector, which takes far longer than
    # to run it.
    outputs = distinct(taps)[0] * (2 if math.prod(taps) == repeats == 1 else repeats)
    inputs = [[*others(taps, axes)] for axes in outputs]
    return reading([tap[[*axes]] for axes in outputs]), reading([np.concatenate([tap[i], phase]) for i in inputs])


def _is_flat(side: _Reading, x: Array) -> bool:
    """Whether few numbers go into the products of matrices that save XLA's compiling something for each shape.

    They are many for depthwise kernels, which have more taps than channels.
    """
    rows = len(side.reads)
    return rows <= _ROWS and (len(x) == 1 or rows <= x.shape[-1])


def _collect(side: _Reading, product: Array) -> tuple[Array, Array]:
    """Add up what all taps give to each vector, and take the squared norms of the vectors of each unfolding.

    Args:
      side: which vectors.
      product: ``(batch, taps, m, channels)``.

    Returns:
      ``(batch, vectors, channels)`` and ``(batch, m)``.
    """
    batch, channels, (rows, count) = len(product), product.shape[-1], side.reads.shape
    summed = lax.reshape(product, (batch, rows, channels))
    if not side.plain:
        reads = side.reads.astype(product.dtype)
        summed = lax.dot_general(reads, summed, (((0,), (1,)), ((), ())), precision=HIGHEST)
        summed = lax.transpose(summed, (1, 0, 2))
    if _is_flat(side, product):  # XLA takes far longer to compile a sum of squares
        products = lax.dot_general(summed, summed, (((2,), (2,)), ((0,), (0,))), precision=HIGHEST)
        squares = lax.slice(lax.reshape(products, (batch, count**2)), (0, 0), (batch, count**2), (1, count + 1))
    else:
        squares = jnp.sum(summed * summed, axis=-1)
    return summed, _by_unfolding(side, squares)


def _by_unfolding(side: _Reading, x: Array) -> Array:
    """Sums over the vectors of each unfolding, ``(batch, vectors)`` -> ``(batch, m)``."""
    return _map(x, side.belongs)


def _by_vector(side: _Reading, x: Array) -> Array:
    """What each vector's unfolding has, ``(batch, m)`` -> ``(batch, vectors)``."""
    return _map(x, side.belongs.T)


def _map(x: Array, matrix: np.ndarray) -> Array:
    if matrix.shape[0] == matrix.shape[1]:
        return x
    # Not a product of matrices: with a single vector XLA compiles one anew each time, and this once for all layers.
    each = lax.broadcast(matrix.astype(x.dtype), (len(x),))
    return lax.reduce_sum(lax.mul(lax.broadcast_in_dim(x, each.shape, (0, 2)), each), (2,))


def _read(side: _Reading, vectors: Array, factors: Array | None = None) -> Array:
    """The vectors as each tap reads them, ``(batch, taps, m, channels)``, times ``factors (batch, m)``."""
    batch, channels, (rows, count) = len(vectors), vectors.shape[-1], side.reads.shape
    m = len(side.belongs)
    shape = (batch, rows // m, m, channels)
    reads = side.reads.astype(vectors.dtype)
    if factors is not None and _is_flat(side, vectors):
        # XLA compiles a product of matrices once for all numbers of channels.
        scaled = lax.mul(
            lax.broadcast(reads.reshape(rows // m, m, count), (batch,)),
            lax.broadcast_in_dim(factors, (batch, rows // m, m, count), (0, 2)),
        )
        scaled = lax.reshape(scaled, (batch, rows, count))
        return lax.reshape(lax.dot_general(scaled, vectors, (((2,), (1,)), ((0,), (0,))), precision=HIGHEST), shape)
    if not side.plain:
        vectors = lax.dot_general(reads, vectors, (((1,), (1,)), ((), ())), precision=HIGHEST)
        vectors = lax.transpose(vectors, (1, 0, 2))
    vectors = lax.reshape(vectors, shape)
    return vectors if factors is None else _times(vectors, factors)


def _over_root(squares: Array) -> Array:
    """1/√x; of zero, a large number."""
    return lax.rsqrt(lax.max(squares, np.full(squares.shape, np.finfo(squares.dtype).tiny)))


def _times(x: Array, factors: Array) -> Array:
    """``(batch, taps, m, channels)`` times ``(batch, m)``."""
    return lax.mul(x, lax.broadcast_in_dim(factors, x.shape, (0, 2)))


class PowerState(NamedTuple):
    """What the next power step starts from, for all distinct unfoldings.

    Attributes:
      vectors: ``(batch, vectors, c_out)``, left singular vectors of one unfolding after the other, divided by
        their singular values: so the squares inside a step are near 1, and neither overflow nor vanish.
        A (polyphase) kernel with a single tap has a second one, that nobody reads.
      scales: ``(batch, m)``, one over the singular values; of a zero kernel those before it.
    """

    vectors: Array
    scales: Array


def step(
    kernels: Array,
    state: PowerState,
    phases: tuple[int, ...],
    *,
    weights: Array | None = None,
    scale: Array | None = None,
) -> tuple[Pairs, PowerState]:
    """One power iteration of every unfolding, in two passes over the kernels.

    Args:
      kernels: ``(batch, *spatial, c_in, c_out)``.
      state: of kernels of this shape.
      phases: of every axis: it is the polyphase kernels that are unfolded, without being written down.
      weights: ``(batch, taps, m)``, by which each tap counts in each unfolding, m a multiple of the number
        of distinct ones; 1 without.
      scale: ``(batch, c_out)``, by which the outputs are multiplied: the kernels with it are never written down.

    Returns:
      The singular values reached (from below) with their vectors, and the new state. Where a value is
      0 the old state stays.
    """
    # Written in lax: a step is traced for each shape in a network, and jnp takes three times as long.
    batch, *spatial, c_in, c_out = kernels.shape
    m, kinds = state.scales.shape[1], len(distinct(polyphase_taps(tuple(spatial), phases))[0])
    used = kinds if weights is None else weights.shape[2]
    out, inp = _reading(tuple(spatial), phases, m // kinds)
    by_weight = (lambda x: x) if weights is None else (lambda x: x * weights[..., None])
    by_scale = (lambda x: x) if scale is None else (lambda x: x * scale.reshape(batch, *(1,) * (x.ndim - 2), -1))
    taps = lax.reshape(kernels, (batch, math.prod(spatial), c_in, c_out))
    each_tap = ((0, 1), (0, 1))
    zero, largest = (np.full(state.scales.shape, x, taps.dtype) for x in (0, np.finfo(taps.dtype).max))
    vectors = _read(out, by_scale(state.vectors))
    # Operand order and layout matter on a CPU: vectors along the last axis on both ways, and the
    # kernel as the right operand on the way back, or XLA copies the whole kernel to transpose it.
    # The number of operations matters too: for small kernels a step takes as long as there are many, and XLA compiles
    # those that are not products of matrices anew for each number of channels.
    # On the way in the kernel is the left operand: that takes half the time, and what is then transposed is small.
    product = lax.dot_general(taps, vectors, (((3,), (3,)), each_tap), precision=HIGHEST)
    product = lax.transpose(product, (0, 1, 3, 2))
    rights, squares = _collect(inp, by_weight(product))
    over = _over_root(squares)
    # Of a zero kernel the factor may be infinite, and its product with zero no number.
    scaled = by_weight(_read(inp, rights, lax.min(lax.mul(over, state.scales), largest)))
    if inp.plain:  # to scale numbers is part of what is done with them
        inputs = by_weight(_times(_read(inp, rights), over))
    else:
        inputs = lax.div(scaled, lax.broadcast_in_dim(state.scales, scaled.shape, (0, 2)))
    bare = lax.dot_general(scaled, taps, (((3,), (2,)), each_tap), precision=HIGHEST)
    lefts, squares = _collect(out, by_scale(bare))
    # Where nothing came out the state stays: a factor of 0 says so.
    alive = lax.gt(squares, zero)
    over = lax.select(alive, _over_root(squares), zero)
    scales = lax.select(alive, lax.mul(state.scales, over), state.scales)
    outputs = _times(_read(out, lefts), over) if out.plain else _read(out, lefts, over)
    to_unit, to_scale = (lax.broadcast_in_dim(_by_vector(out, x), lefts.shape, (0, 1)) for x in (over, scales))
    reached = lax.gt(to_unit, lax.full_like(to_unit, 0))
    after = PowerState(lax.select(reached, lax.mul(lax.mul(lefts, to_unit), to_scale), state.vectors), scales)
    values = lax.div(lax.mul(squares, over), state.scales)
    if used < m:
        cut = lambda x, axis: lax.slice_in_dim(x, 0, used, axis=axis)  # noqa: E731
        values, inputs, outputs, bare = cut(values, 1), cut(inputs, 2), cut(outputs, 2), cut(bare, 2)
    if scale is None:
        return Pairs(values, inputs, outputs), after
    gains = jnp.sum(outputs * bare, axis=1) / state.scales[:, :used, None]
    return Pairs(values, inputs, by_scale(outputs), gains), after


def state_shape(
    kernels: Array, phases: tuple[int, ...], repeats: int = 1
) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Shapes of a `PowerState` for ``(batch, *spatial, c_in, c_out)``, each unfolding ``repeats`` times over."""
    batch, *spatial, _, c_out = kernels.shape
    m, vectors = _reading(tuple(spatial), phases, repeats)[0].belongs.shape
    return (batch, vectors, c_out), (batch, m)


def start(key: Array, kernels: Array, phases: tuple[int, ...], repeats: int = 1) -> PowerState:
    """Random vectors for `step`, scaled by the Frobenius norms of the kernels, near enough to start."""
    shape, scales_shape = state_shape(kernels, phases, repeats)
    side = _reading(kernels.shape[1:-2], phases, repeats)[0]
    vectors = generic(key, shape, kernels.dtype)
    squares = _by_unfolding(side, jnp.sum(vectors * vectors, axis=-1))
    size = jax.vmap(lambda kernel: unit(kernel)[0])(kernels)
    scales = jnp.broadcast_to((1 / jnp.where(size > 0, size, 1))[:, None], scales_shape)
    return PowerState(vectors * (_by_vector(side, _over_root(squares)) * _by_vector(side, scales))[..., None], scales)
