"""How large the entries of an array are at most, and how long rows of them: what is known, and its arithmetic.

Each entry has a bound of its absolute value. Entries that are known to lie in a ball, as those that have been
normalised together, have its radius too, which for a row of n is up to √n smaller than their largest values say.
Everything here is rounded up.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fantastic4.rounding import constant_up, gamma, product_up, round_up, subnormal_norm


@dataclasses.dataclass(frozen=True)
class Size:
    """Upper bounds, for all inputs, of an array that depends on the input.

    Attributes:
      entries: of each entry's absolute value.
      balls: for each entry, in which ball it lies with others; None where nothing is known of several together.
      radii: of the balls: the root of the sum of squares of all entries in one is at most that.
    """

    entries: Array
    balls: np.ndarray | None = None
    radii: Array | None = None

    @property
    def most(self) -> Array:
        """Of all entries."""
        return top(self.entries)

    def length(self, axes: Sequence[int]) -> Array:
        """Of the root of the sum of squares over axes, which are gone."""
        by_entries = _root_sum_squares(self.entries, tuple(axes))
        if self.balls is None or self.radii is None:
            return by_entries
        count = math.prod(self.balls.shape[a] for a in axes)
        rows = np.moveaxis(self.balls, axes, range(-len(axes), 0)).reshape(*by_entries.shape, count)
        rows = np.sort(rows, axis=-1)
        first = np.diff(rows, axis=-1, prepend=-1) != 0
        return _by_balls(by_entries, self.radii, rows, first)

    def norm(self, rows: Sequence[int], columns: Sequence[int]) -> Array:
        """Of the ℓ2 norms of all matrices with these axes, which between them are those that no batch is along."""
        found = []
        for one, other in ((columns, rows), (rows, columns)):
            lengths = self.length(one)
            gone = sorted(one)
            left = tuple(a - sum(g < a for g in gone) for a in other)
            found.append(top(_root_sum_squares(lengths, left)))
        return jnp.minimum(*found)

    def moved(self, move: Callable[[Any], Any]) -> Size:
        """What moves entries does so to these: balls are kept where none is there twice."""
        entries = move(self.entries)
        if self.balls is None:
            return Size(entries)
        places = np.asarray(move(np.arange(self.balls.size, dtype=np.int32).reshape(self.balls.shape)))
        if places.size and (places.min() < 0 or np.bincount(places.ravel()).max() > 1):
            return Size(entries)
        return Size(entries, self.balls.ravel()[places], self.radii)


@functools.partial(jax.jit, static_argnames="axes")
def top(x: Array, axes: tuple[int, ...] | None = None) -> Array:
    """The largest of numbers that are not negative: on a CPU, a maximum over thousands may drop a NaN."""
    return jnp.where(jnp.any(jnp.isnan(x), axis=axes), jnp.nan, jnp.max(x, axis=axes, initial=0))


def up(value: float | Fraction) -> Array:
    """A number in the widest type there is, rounded up: not 0, where it vanishes there."""
    dtype = jnp.result_type(float)
    try:
        number = float(value) * (1 + 1e-15)
    except OverflowError:
        number = math.inf
    return jnp.asarray(constant_up(max(number, float(jnp.finfo(dtype).tiny)) if value > 0 else 0.0, dtype))


# Compiled together: one by one, these operations would be a hundred programs.
@functools.partial(jax.jit, static_argnames="axes")
def _root_sum_squares(x: Array, axes: tuple[int, ...]) -> Array:
    """Of numbers that are not negative, rounded up."""
    count = math.prod(x.shape[a] for a in axes)
    return _root_of_squares(x, lambda squares: jnp.sum(squares, axis=axes), count)


def _root_of_squares(x: Array, add: Callable[[Array], Array], count: int) -> Array:
    """√ of sums of squares of numbers that are not negative, at most ``count`` in each, rounded up."""
    most = lax.stop_gradient(top(x))
    scale = jnp.where((most > 0) & (most < jnp.inf), most, 1)
    # Squares that vanish are below the smallest float each; the root of zero has no derivative.
    vanished = float(jnp.finfo(x.dtype).tiny) * count
    inside = round_up((add((x / scale) ** 2) + vanished) * (1 + gamma(count + 2, x.dtype)), 8)
    return jnp.where(most == 0, 0, product_up(round_up(jnp.sqrt(inside), 4), scale))


@jax.jit
def _by_balls(by_entries: Array, radii: Array, rows: Array, first: Array) -> Array:
    """Lengths of rows by the balls that their entries lie in, each counted once."""
    found = jnp.where(first, radii[rows], 0)
    return jnp.minimum(by_entries, _root_sum_squares(found, (found.ndim - 1,)))


@functools.partial(jax.jit, static_argnames="count")
def _of_balls(x: Array, balls: Array, count: int) -> Array:
    """Of the entries in each ball the root of the sum of squares, rounded up."""
    add = functools.partial(jax.ops.segment_sum, segment_ids=balls, num_segments=count)
    return _root_of_squares(x, add, x.size)


@functools.partial(jax.jit, static_argnames="count")
def _largest_of_balls(x: Array, balls: Array, count: int) -> Array:
    return jnp.maximum(jax.ops.segment_max(x, balls, count), 0)


@jax.jit
def product(a: Array, b: Array) -> Array:
    """Of numbers that are not negative, spread to one shape."""
    return product_up(*jnp.broadcast_arrays(a, b))


@jax.jit
def _sum_of(a: Array, b: Array) -> Array:
    return round_up(a + b, 2)


@jax.jit
def sizes_of(x: Array) -> Array:
    """Absolute values of constants, those of numbers that compilers may take for 0 too."""
    if jnp.iscomplexobj(x):  # |a + ib| ≤ |a| + |b|, which neither vanishes nor overflows
        return _sum_of(sizes_of(x.real), sizes_of(x.imag))
    return jnp.maximum(jnp.abs(x), subnormal_norm(x))


def scaled(of: Size, by: Fraction) -> Size:
    """Of entries times a number."""
    if by == 1:
        return of
    factor = up(by)
    return Size(product(of.entries, factor), of.balls, None if of.radii is None else product(of.radii, factor))


def times(a: Size, b: Size) -> Size:
    """Of products of entries; the balls are those of the first, by the largest in each."""
    entries = product(a.entries, b.entries)
    if a.balls is None or a.radii is None or a.balls.shape != entries.shape:
        return Size(entries)
    by = jnp.broadcast_to(b.entries, entries.shape).ravel()
    return Size(entries, a.balls, product(a.radii, _largest_of_balls(by, a.balls.ravel(), len(a.radii))))


def plus(a: Size, b: Size) -> Size:
    """Of sums of entries."""
    entries = _sum_of(a.entries, b.entries)
    for one, other in ((a, b), (b, a)):
        if one.balls is None or one.radii is None or one.balls.shape != entries.shape:
            continue
        if other.balls is not None and other.radii is not None and np.array_equal(one.balls, other.balls):
            radii = other.radii
        else:
            spread = jnp.broadcast_to(other.entries, entries.shape).ravel()
            radii = _of_balls(spread, one.balls.ravel(), len(one.radii))
        return Size(entries, one.balls, _sum_of(one.radii, radii))
    return Size(entries)


def largest_of(*sizes: Size) -> Size:
    """Of entries of one of several arrays."""
    return Size(functools.reduce(jnp.maximum, [s.entries for s in sizes]))


@jax.jit
def reciprocals(x: Array) -> Array:
    """1 / x of numbers that are not negative: 0 for infinity alone."""
    over = jnp.maximum(round_up(1 / x, 4), float(jnp.finfo(x.dtype).tiny))
    return jnp.where(x == jnp.inf, 0, over)


@functools.partial(jax.jit, static_argnames=("numbers", "count"))
def dot_product(a: Array, b: Array, numbers: Any, count: int) -> Array:
    """Of numbers that are not negative, with ``lax.dot_general``'s dimension numbers, ``count`` products in each."""
    product = lax.dot_general(a, b, numbers, precision=lax.Precision.HIGHEST)
    # Products that vanish are below the smallest float each.
    vanished = float(jnp.finfo(product.dtype).tiny) * count
    return round_up(product * (1 + gamma(count + 2, product.dtype)) + vanished, 4)
