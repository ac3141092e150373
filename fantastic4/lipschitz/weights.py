"""Constants of entries that are multiplied: never 0, and never infinite, on the way to a product that is neither."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from fantastic4.rounding import product_up, round_up, subnormal_norm, unit_roundoff


class Weights(NamedTuple):
    """Numbers (values ± error) 2^exponent.

    Attributes:
      values: an array, whose largest entry is about 1, or 0.
      error: what an entry may be off by; a scalar.
      exponent: a whole number; a scalar.
    """

    values: Array
    error: Array
    exponent: Array

    @property
    def largest(self) -> Array:
        """The largest size of a value; NaN where one is none."""
        # Asked of every entry: on a CPU, a maximum over thousands may drop a NaN.
        sizes = jnp.abs(lax.stop_gradient(self.values))
        return jnp.where(jnp.any(jnp.isnan(sizes)), jnp.nan, jnp.max(sizes, initial=0))

    def times(self, other: Weights) -> Weights:
        """Products of entries, of shapes that broadcast."""
        one, two = self.largest, other.largest
        info = jnp.finfo(self.values.dtype)
        # A product is rounded, or vanishes; so does what is computed of errors.
        error = self.error * two + other.error * one + self.error * other.error + float(info.eps) * one * two
        return _at_one(
            self.values * other.values, round_up(error, 8) + 2 * float(info.tiny), self.exponent + other.exponent
        )


def times_power_up(size: Array, exponent: Array) -> Array:
    """A number ≥ 0 times 2^exponent, as a float that is no smaller."""
    info, half = jnp.finfo(size.dtype), exponent // 2
    exponents = (jnp.clip(e, info.minexp, info.maxexp - 1) for e in (half, exponent - half))
    return product_up(size, *(jnp.ldexp(jnp.ones((), size.dtype), e) for e in exponents))


def _at_one(values: Array, error: Array, exponent: Array) -> Weights:
    """The same in units of about the largest."""
    sizes = jnp.abs(lax.stop_gradient(values))
    largest = jnp.max(sizes, initial=0)
    info = jnp.finfo(values.dtype)
    shift = jnp.where(jnp.isfinite(largest) & (largest > 0), jnp.frexp(largest)[1], 0)
    shift = jnp.clip(shift, info.minexp + 2, info.maxexp - 2)
    unit = jnp.ldexp(jnp.ones((), values.dtype), -shift)
    return Weights(values * unit, lax.stop_gradient(error) * unit, exponent + shift)


def weights(x: Array) -> Weights:
    """An array as it is."""
    return _at_one(x, subnormal_norm(lax.stop_gradient(x)), jnp.zeros((), jnp.int32))


def number(x: Fraction, dtype: DTypeLike) -> Weights:
    """One number, rounded where it must be."""
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    unit = x / Fraction(2) ** exponent
    value = np.asarray(float(unit), dtype)
    error = 0.0 if Fraction(float(value)) == unit else 2 * unit_roundoff(value.dtype)
    return Weights(jnp.asarray(value), jnp.asarray(error, value.dtype), jnp.asarray(exponent, jnp.int32))
