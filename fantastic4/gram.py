r"""Bounds by Gram iteration after a fixed number of steps: sound without convergence.

Of matrices: with A = MᵀM, the Schatten norm (tr A^(2^t))^(2^-(t+1)) of order 2^(t+1) lies above ‖M‖ and falls to it as
t grows (Delattre et al. 2023). Of convolutions: K_{t+1} = K_t ⋆ K_tᵀ squares the norm, and any crude bound of that of
K_t gives its 2^t-th root; with the largest absolute row sum, t = 1 is the bound of AOL (Prach & Lampert 2022).
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from fantastic4.dense import certified_norm, frobenius_bound
from fantastic4.linalg import HIGHEST
from fantastic4.rounding import constant_up, gamma, power_of_two, round_up, subnormal_norm


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def schatten_bound(matrix: Array, iterations: int) -> Array:
    """Upper bound of ‖matrix‖₂: its Schatten norm of order 2^(iterations + 1), rounding included.

    The derivative is that of the Schatten norm itself, σ <M A^(q-1), dM> / tr A^q with A = MᵀM and
    q = 2^iterations, to first order: it pushes on all large singular values, not on one alone.

    Args:
      matrix: ``(rows, columns)``.
      iterations: t ≥ 1; t = 1 is ‖MᵀM‖_F^(1/2).
    """
    return certified_norm(matrix, iterations - 1).bound


@schatten_bound.defjvp
def _schatten_jvp(iterations, primals, tangents):
    (matrix,), (tangent,) = primals, tangents
    value = schatten_bound(matrix, iterations)
    constant = lax.stop_gradient(matrix)
    _, inverse = power_of_two(jnp.max(jnp.abs(constant), initial=0))
    tall = (constant if matrix.shape[0] >= matrix.shape[1] else constant.T) * inverse
    times = partial(jnp.matmul, precision=HIGHEST)

    def normalise(x: Array) -> Array:
        trace = jnp.trace(x)
        return x / jnp.where(trace > 0, trace, 1)

    power = normalise(times(tall.T, tall))  # A^(2^i), and the product of those so far
    product = power
    for _ in range(iterations - 1):
        power = normalise(times(power, power))
        product = normalise(times(product, power))
    gradient = times(tall, product)
    size = jnp.sum(gradient * tall)
    gradient = gradient / jnp.where(size > 0, size, 1) * inverse  # Euler: <gradient, M> is the value
    gradient = gradient if matrix.shape[0] >= matrix.shape[1] else gradient.T
    return value, jnp.sum(tangent * lax.stop_gradient(gradient * value))


def _correlate(kernels: Array) -> Array:
    """K ⋆ Kᵀ: ``(batch, *spatial, n, m)`` -> ``(batch, *(2 spatial - 1), n, n)``, the lags Q_d of FFᴴ."""
    rank = kernels.ndim - 3
    spatial = "DHW"[3 - rank :]
    pads = [(k - 1, k - 1) for k in kernels.shape[1:-2]]

    def one(kernel: Array) -> Array:
        image = jnp.moveaxis(kernel, -2, 0)  # (n, *spatial, m)
        taps = jnp.swapaxes(kernel, -1, -2)  # (*spatial, m, n)
        numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
        lags = lax.conv_general_dilated(image, taps, (1,) * rank, pads, dimension_numbers=numbers, precision=HIGHEST)
        return jnp.moveaxis(lags, 0, -2)

    return jax.vmap(one)(kernels)


def convolutional_bound(kernels: Array, iterations: int) -> Array:
    r"""Upper bound of σ∞ by convolutional Gram iteration, rounding included.

    σ∞ ≤ (max_i Σ_jd |K_t[d]_ij|)^(2^-t), K_{t+1} = K_t ⋆ K_tᵀ. A computed lag is off by γ times what absolute
    values give, an operator of norm at most ‖Σ_d |K_t[d]|‖_F²; that much is carried back through every root. With many
    channels it adds up, and the kernels grow to 2^t (k - 1) + 1 taps an axis: for those take a grid.

    Args:
      kernels: ``(batch, *spatial, c_in, c_out)``.
      iterations: t ≥ 1.

    Returns:
      Scalar, the largest of the batch; differentiable, as what it computes.
    """
    if kernels.shape[-2] > kernels.shape[-1]:
        kernels = jnp.swapaxes(kernels, -1, -2)
    dtype = kernels.dtype
    finite = jnp.all(jnp.isfinite(kernels))
    flushed = subnormal_norm(kernels) * math.sqrt(math.prod(kernels.shape[1:-2]))
    first, inverse = power_of_two(jnp.max(jnp.abs(lax.stop_gradient(kernels))))
    kernels = jnp.where(finite, kernels, 0) * inverse
    scales, slacks = [], []
    for _ in range(iterations):
        length = math.prod(kernels.shape[1:-2]) * kernels.shape[-1]
        every = jnp.sum(jnp.abs(lax.stop_gradient(kernels)), axis=tuple(range(1, kernels.ndim - 2)))
        size = jnp.max(jax.vmap(frobenius_bound)(every))
        size = round_up(size, math.prod(kernels.shape[1:-2]) + 4)
        slacks.append(round_up(size * size, 4) * constant_up(1.02 * gamma(length + 2, dtype), dtype))
        kernels = _correlate(kernels)
        # The lag of every group stays near 1: scaled by powers of two, exactly.
        scale, inverse = power_of_two(jnp.max(jnp.abs(lax.stop_gradient(kernels))))
        scales.append(scale)
        kernels = kernels * inverse
    # ‖·‖₂² ≤ ‖·‖₁ ‖·‖_∞: as computed, the lags are Hermitian up to rounding only.
    every = jnp.sum(jnp.abs(kernels), axis=tuple(range(1, kernels.ndim - 2)))
    sums = jnp.maximum(jnp.max(jnp.sum(every, axis=-1)), jnp.max(jnp.sum(every, axis=-2)))
    terms = kernels.size // (kernels.shape[0] * kernels.shape[-2])
    value = sums * constant_up(1 + gamma(terms + 2, dtype), dtype)
    for scale, slack in zip(reversed(scales), reversed(slacks), strict=True):
        inside = value * scale + lax.stop_gradient(slack)
        positive = inside > 0
        value = round_up(jnp.where(positive, jnp.sqrt(jnp.where(positive, inside, 1)), 0), 8)
    value = round_up(value * first, 2) + flushed
    return jnp.where(finite, value, jnp.nan)
