r"""Bounds from a few frequencies: some axes of a kernel by Fourier transform, the others by unfolding.

On N ≥ k points of an axis with k taps, a trigonometric polynomial with k frequencies attains its maximum up to a
factor: sup ‖F‖ ≤ max on the grid · 1/cos(π(k-1)/2N) (Ehlich & Zeller 1964), and also ≤ (1 - (k-1)/N)^(-1/2)
(Pfister & Bresler 2018), smaller where N is close to k. Axis by axis the factors multiply. What remains of the kernel
at a frequency is a complex kernel over the other axes, which Theorem 1 of the fantastic four bounds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fantastic4 import unfolding
from fantastic4.dense import frobenius_bound
from fantastic4.linalg import HIGHEST, generic, map_rows, with_pairs
from fantastic4.rounding import constant_up, gamma, power_of_two, round_up, subnormal_norm
from fantastic4.symbol import CHUNK_BYTES, at_once, half_grid, phase_error, places, turns


def grid_factor(taps: tuple[int, ...], sizes: tuple[int, ...]) -> float:
    """By how much the maximum of ‖F‖ can exceed that on the grid.

    Raises:
      ValueError: fewer points than taps on an axis: then there is no such factor.
    """
    if any(n < k for n, k in zip(sizes, taps, strict=True)):
        raise ValueError(
            f"a grid of {sizes} points is too coarse for {taps} taps: each axis needs at least as many points as taps, "
            f"{tuple(max(n, k) for n, k in zip(sizes, taps, strict=True))}"
        )
    axes = zip(taps, sizes, strict=True)
    factors = (min(1 / math.cos(math.pi * (k - 1) / (2 * n)), (1 - (k - 1) / n) ** -0.5) for k, n in axes)
    return math.prod(factors) * (1 + 1e-12)  # the cosine of an angle near π/2 loses digits


class Top(NamedTuple):
    """A singular value at one frequency, and its vectors as two real pairs, as each tap meets them.

    Attributes:
      value: scalar.
      inputs: ``(batch, taps, 2, c_in)``, zero for all kernels but one.
      outputs: ``(batch, taps, 2, c_out)``.
    """

    value: Array
    inputs: Array
    outputs: Array


def differentiable(kernels: Array, top: Top) -> Array:
    """``top.value`` with the derivative Re(xᴴ dF y) of its vectors, held constant."""
    value, inputs, outputs = lax.stop_gradient(top)
    batch, *_, c_in, c_out = kernels.shape
    both = jnp.stack([value, jnp.zeros_like(value)])
    return jnp.sum(with_pairs(both, kernels.reshape(batch, -1, c_in, c_out), inputs, outputs))


def _turn_back(x: Array, cosines: Array, sines: Array) -> Array:
    """Complex vectors ``(..., 2, c)`` times e^{-iω·t}: real and imaginary part of what each tap meets."""
    real, imag = x[..., 0, :], x[..., 1, :]
    c, s = cosines[..., None], sines[..., None]
    return jnp.stack([c * real + s * imag, c * imag - s * real], -2)


def certified_top(kernels: Array, fourier: unfolding.Axes, size: int | tuple[int, ...]) -> Top:
    """Upper bound of σ∞, rounding included: ``fourier`` axes on a grid, the others unfolded.

    Args:
      kernels: ``(batch, *spatial, c_in, c_out)``.
      fourier: spatial axes to transform, at least one.
      size: points on each of them; one int is for all axes with more than one tap.

    Returns:
      `Top`, its value already times every factor.
    """
    batch, *spatial, c_in, c_out = kernels.shape
    # Scaled exactly, so that what vanishes in a product is nothing beside the slack; subnormals are found before.
    flushed = subnormal_norm(kernels) * constant_up(math.sqrt(math.prod(spatial)), kernels.dtype)
    up, down = power_of_two(jnp.max(jnp.abs(kernels), initial=0))
    kernels = kernels * down
    rest = unfolding.others(tuple(spatial), fourier)
    taps = tuple(spatial[a] for a in fourier)
    sizes = size if isinstance(size, tuple) else tuple(size if k > 1 else 1 for k in taps)
    left_over = tuple(spatial[a] for a in rest)
    scale = grid_factor(taps, sizes) * math.sqrt(math.prod(left_over))
    points = half_grid(sizes)
    cosines, sines = (jnp.asarray(t, kernels.dtype) for t in turns(points, sizes, places(taps)))
    order = (0, *(1 + a for a in fourier), *(1 + a for a in rest), -2, -1)
    moved = jnp.transpose(kernels, [a % kernels.ndim for a in order]).reshape(batch, -1, *left_over, c_in, c_out)
    count = moved.shape[1]
    # Entries are sums over the transformed taps; cos and sin are right to a unit, of phases that float64 rounds.
    every = jnp.sum(jnp.abs(moved), axis=1)
    lost = jax.vmap(lambda k: frobenius_bound(k.reshape(-1, c_out)))(every)
    lost = lost * constant_up(
        1.01 * math.sqrt(2) * (gamma(2 * count + 6, kernels.dtype) + phase_error(taps)), kernels.dtype
    )

    def at(tables: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        cosine, sine = (jnp.tensordot(t, moved, (0, 1), precision=HIGHEST) for t in tables)
        # A complex matrix A + iB has the norm of the real [[A, -B], [B, A]].
        whole = jnp.concatenate([jnp.concatenate([cosine, sine], -2), jnp.concatenate([-sine, cosine], -2)], -1)
        pairs = unfolding.certified_pairs(whole)
        values = pairs.values + lost[:, None]
        best = jnp.argmin(values, axis=1)
        pick = lambda v: jnp.take_along_axis(v, best[:, None, None, None], axis=2)[:, :, 0]  # noqa: E731
        value = jnp.where(jnp.any(jnp.isnan(values), axis=1), jnp.nan, jnp.min(values, axis=1))
        return value, pick(pairs.inputs), pick(pairs.outputs)

    one = 16 * batch * math.prod(left_over) * c_in * c_out * kernels.dtype.itemsize
    chunk = at_once(len(points), one, CHUNK_BYTES)
    values, inputs, outputs = map_rows(at, (cosines, sines), chunk)  # (points, batch, rest taps, 2c)
    poisoned = jnp.any(jnp.isnan(values))
    point, group = jnp.divmod(jnp.argmax(values), batch)
    value = round_up(jnp.max(values) * constant_up(scale, kernels.dtype) * up + flushed, 6)
    value = jnp.where(poisoned, jnp.nan, value)

    def spread(x: Array, channels: int) -> Array:
        """``(rest taps, 2 c)`` -> ``(transformed taps, rest taps, 2, c)``."""
        return jnp.broadcast_to(x.reshape(1, -1, 2, channels), (count, len(x), 2, channels))

    inputs = spread(inputs[point, group], c_in)
    inputs = _turn_back(inputs, cosines[point][:, None], sines[point][:, None])
    outputs = spread(outputs[point, group], c_out)
    back = np.argsort([*fourier, *rest])

    def to_taps(x: Array) -> Array:
        x = jnp.transpose(x.reshape(*taps, *left_over, *x.shape[-2:]), [*back, len(spatial), len(spatial) + 1])
        x = x.reshape(-1, *x.shape[-2:])
        return x * (jnp.arange(batch) == group).astype(x.dtype)[:, None, None, None]

    factor = jnp.asarray(scale, kernels.dtype)  # of the derivative
    return Top(value, to_taps(inputs) * factor, to_taps(outputs))


class GridState(NamedTuple):
    """What the next step on a grid starts from.

    Attributes:
      vectors: ``(batch, points, 2, c_out)``, real and imaginary part of a right singular vector at each frequency.
    """

    vectors: Array


def state_shape(kernels: Array, points: int) -> tuple[int, int, int, int]:
    """Shape of the vectors of a `GridState` for so many frequencies."""
    return len(kernels), points, 2, kernels.shape[-1]


def start(key: Array, kernels: Array, points: int) -> GridState:
    """Random vectors for `power_step` at so many frequencies."""
    return GridState(_normalise(generic(key, state_shape(kernels, points), kernels.dtype))[1])


def _normalise(x: Array) -> tuple[Array, Array]:
    """Norms over the last two axes, and ``x`` over them, without overflow; zeros stay zeros."""
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    return (norm * largest)[..., 0, 0], x / jnp.where(norm > 0, norm, 1)


def power_step(
    kernels: Array, state: GridState, points: np.ndarray, sizes: tuple[int, ...], phases: tuple[int, ...] | None = None
) -> tuple[Top, GridState]:
    """One power iteration of F at every frequency of a grid, all in two passes over the kernels.

    Every frequency adds two columns to the vectors that the kernel is multiplied by.

    Args:
      kernels: ``(batch, *spatial, c_in, c_out)``.
      state: of kernels of this shape and this grid.
      points: frequencies, ``(count, rank)``.
      sizes: of the grid, one an axis.
      phases: of every axis, as in `fantastic4.conv.Phased`: F is that of the polyphase kernels, which are not written
        down.

    Returns:
      The largest singular value reached (from below), without any factor, and the new state.
    """
    batch, *spatial, c_in, c_out = kernels.shape
    phases = phases or (1,) * len(spatial)
    turn, remainder = np.divmod(places(tuple(spatial)), phases)
    phase = np.ravel_multi_index(tuple(remainder.T), phases)
    cosines, sines = (jnp.asarray(t, kernels.dtype) for t in turns(points, sizes, turn))  # (points, taps)
    count, frequencies = cosines.shape[1], len(points)
    own = np.arange(math.prod(phases))[:, None] == phase  # (phases, taps)

    def over_phase(x: Array) -> Array:
        """``(points, taps, c_in)`` added up over the taps of each phase: ``(points, phases, c_in)``."""
        if len(own) == 1:
            return jnp.sum(x, axis=1, keepdims=True)
        return jnp.einsum("pt,ftc->fpc", own.astype(x.dtype), x, precision=HIGHEST)

    def one(kernel: Array, vectors: Array) -> tuple[Array, Array, Array]:
        """Values ``(points,)``, inputs as each tap meets them ``(points, 2, taps, c_in)``, outputs."""
        # Two plain matrix products, the kernel's rows along its memory in both: nothing of its size is copied.
        rows = kernel.reshape(-1, c_out)
        columns = vectors.reshape(-1, c_out)
        product = lax.dot_general(rows, columns, (((1,), (1,)), ((), ())), precision=HIGHEST)
        product = product.T.reshape(frequencies, 2, count, c_in)
        real, imag = product[:, 0], product[:, 1]  # F y: each tap meets the same vectors, and turns what comes out
        c, s = cosines[..., None], sines[..., None]
        image = jnp.stack([over_phase(c * real - s * imag), over_phase(s * real + c * imag)], 1)
        _, x = _normalise(image.reshape(frequencies, 2, -1))
        at_taps = jnp.swapaxes(x.reshape(frequencies, 2, -1, c_in), 1, 2)[:, phase]
        turned = jnp.swapaxes(_turn_back(at_taps, cosines, sines), 1, 2)  # Fᴴ x: each tap meets its phase turned back
        image = lax.dot_general(turned.reshape(2 * frequencies, -1), rows, (((1,), (0,)), ((), ())), precision=HIGHEST)
        return *_normalise(image.reshape(frequencies, 2, c_out)), turned

    if batch == 1:
        values, outputs, turned = (x[None] for x in one(kernels[0], state.vectors[0]))
    else:
        values, outputs, turned = jax.vmap(one)(kernels, state.vectors)
    vectors = jnp.where(values[..., None, None] > 0, outputs, state.vectors)
    group, point = jnp.divmod(jnp.argmax(values), frequencies)
    chosen = (jnp.arange(batch) == group).astype(kernels.dtype)[:, None, None, None]
    at_taps = jnp.swapaxes(turned[group, point], 0, 1)[None] * chosen
    spread = jnp.broadcast_to(outputs[group, point], (batch, count, 2, c_out))
    return Top(jnp.where(jnp.any(jnp.isnan(values)), jnp.nan, jnp.max(values)), at_taps, spread), GridState(vectors)
