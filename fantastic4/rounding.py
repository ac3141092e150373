"""From a computed number to one that is never too small.

Model of arithmetic (N. Higham, *Accuracy and Stability of Numerical Algorithms*, 2002, §2-3):
every operation returns its exact result times 1 + δ, |δ| ≤ u, where u is half the spacing of
floats at 1; a sum of products of length n, added in *any* order, fused or not, is off by at most
γ_n Σ|a_i b_i| with γ_n = n u / (1 - n u).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike


def unit_roundoff(dtype: DTypeLike) -> float:
    """U of the floating type ``dtype``: 2⁻²⁴ for float32, 2⁻⁵³ for float64."""
    return float(jnp.finfo(dtype).eps) / 2


def gamma(length: int, dtype: DTypeLike) -> float:
    """γ_n = n u / (1 - n u), the relative error of a sum of ``length`` products of one sign.

    Raises:
      ValueError: n u ≥ 1/2, where the model says nothing useful.
    """
    nu = length * unit_roundoff(dtype)
    if nu >= 0.5:
        raise ValueError(
            f"a sum of {length} terms cannot be bounded in {jnp.dtype(dtype).name}: "
            "use a wider type (jax.config.update('jax_enable_x64', True))"
        )
    return nu / (1 - nu)


def round_up(x: Array, operations: int) -> Array:
    """A float that is at least the exact value of which ``x`` ≥ 0 is the computed one.

    ``operations`` counts roundings between exact inputs and ``x``. With c = 1 + 2(operations + 2)u,
    itself a float, fl(c x) ≥ c (1 - u) x ≥ x / (1 - u)^operations for every operations ≤ 1/(8u).
    Square roots and divisions count four: accelerators return them off by up to two units in the
    last place.
    """
    u = unit_roundoff(x.dtype)
    return x * jnp.asarray(1 + 2 * (operations + 2) * u, x.dtype)


def product_up(first: Array, *rest: Array) -> Array:
    """A product of numbers ≥ 0, not rounded down: what vanishes below the smallest float has not become 0."""
    tiny = jnp.finfo(first.dtype).tiny
    for factor in rest:
        product = round_up(first * factor, 2)
        vanished = (first > 0) & (factor > 0) & (product < tiny)
        first = jnp.where(vanished, 2 * tiny, product)
    return first


def constant_up(value: float, dtype: DTypeLike) -> np.ndarray:
    """The smallest float of ``dtype`` that is not below the Python float ``value``, a few units up."""
    kind = np.dtype(dtype).type
    return np.asarray(kind(value * (1 + 4 * unit_roundoff(dtype))))


def power_of_two(x: Array) -> tuple[Array, Array]:
    """The power of two p ≤ x < 2p of every entry of ``x`` ≥ 0, and 1/p: scaling by them is exact.

    Both are normal floats: p is held within the exponents that have a normal reciprocal.
    Zeros, subnormals, infinities and NaNs come out as the nearest of those.
    """
    info = jnp.finfo(x.dtype)
    word = {4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize]
    exponent = jax.lax.bitcast_convert_type(x, word) >> info.nmant
    highest = 2 * info.maxexp - 3  # biased; its reciprocal has the biased exponent 1
    exponent = jnp.clip(exponent, jnp.asarray(1, word), jnp.asarray(highest, word))

    def as_float(biased: Array) -> Array:
        return jax.lax.bitcast_convert_type(biased << info.nmant, x.dtype)

    return as_float(exponent), as_float(jnp.asarray(highest + 1, word) - exponent)


@functools.partial(jax.jit, inline=True)
def subnormal_norm(x: Array) -> Array:
    """An upper bound of the Frobenius norm of what flushing subnormals to zero takes from ``x``.

    Compilers may flush them, so they are found by their bits. 0 where there are none.
    """
    info = jnp.finfo(x.dtype)
    word = {4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, word) << 1  # without the sign
    subnormal = (bits != 0) & (bits < (jnp.asarray(2, word) << info.nmant))
    size = constant_up(float(info.tiny) * 1.01 * x.size**0.5, x.dtype)
    return jnp.where(jnp.any(subnormal), size, jnp.zeros((), x.dtype))


TINY = 2.3e-308
"""What vanishes in Python's floats is taken for this number, which does not."""


def times_up(*factors: float) -> float:
    """A product of numbers that are not negative, a little up: only of zeros it is zero, and of what is none none."""
    if any(map(math.isnan, factors)):
        return math.nan
    if 0 in factors:
        return 0.0
    product = 1.0
    for factor in factors:  # one after the other: what has vanished may grow again
        product = max(product * factor * (1 + 1e-13), TINY)
    return product
