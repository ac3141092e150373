r"""The 2^D unfoldings of a kernel: which they are, their singular pairs, and sound bounds of their norms.

An unfolding turns a kernel with taps L_t (``c_out × c_in``) into a matrix. Each spatial axis goes
either with the output channels (rows) or with the input channels (columns); in 2-D

    R: (c_out·h) × (c_in·w)    S: (c_out·w) × (c_in·h)    T: c_out × (c_in·h·w)    U: (c_out·h·w) × c_in

and √(hw)·‖M‖ bounds the convolution for each M of these (Singla & Feizi 2021, Theorem 1).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from fantastic4.dense import Certified, certified_tall, frobenius_bound, sizing
from fantastic4.linalg import HIGHEST, each, with_pairs
from fantastic4.rounding import constant_up, round_up, unit_roundoff

Axes = tuple[int, ...]


@functools.cache
def unfoldings(rank: int) -> tuple[Axes, ...]:
    """The spatial axes that go with the outputs, one entry an unfolding.

    First those that split the axes, in the order of the axes; then T, none of them; then U, all.
    In 2-D that is R, S, T, U; in 1-D T, U; in 3-D eight.
    """
    sizes = range(1, rank)
    mixed = [axes for size in sizes for axes in itertools.combinations(range(rank), size)]
    return (*mixed, (), tuple(range(rank)))


@functools.cache
def names(rank: int) -> tuple[str, ...]:
    """What the unfoldings are called: R, S, T, U; those of 3-D by the axes that go with the outputs."""
    if rank == 2:
        return ("R", "S", "T", "U")
    return (*("".join(map(str, axes)) for axes in unfoldings(rank)[:-2]), "T", "U")


@functools.cache
def distinct(taps: tuple[int, ...]) -> tuple[tuple[Axes, ...], tuple[int, ...]]:
    """The unfoldings that differ for this kernel size, and which of them each of the 2^D is.

    An axis with one tap makes no difference: a 1×1 kernel has one matrix, not four.
    """
    kept: dict[Axes, int] = {}
    which = []
    for axes in unfoldings(len(taps)):
        reduced = tuple(a for a in axes if taps[a] > 1)
        which.append(kept.setdefault(reduced, len(kept)))
    return tuple(kept), tuple(which)


def others(taps: tuple[int, ...], axes: Axes) -> Axes:
    """The spatial axes that are not among ``axes``."""
    return tuple(a for a in range(len(taps)) if a not in axes)


class Pairs(NamedTuple):
    """Singular values of all distinct unfoldings with their vectors, as each tap meets them.

    Attributes:
      values: ``(batch, m)``.
      inputs: ``(batch, taps, m, c_in)``, right vectors, times the weights of the taps where there are any.
      outputs: ``(batch, taps, m, c_out)``, left vectors, times the scale of the outputs where there is one.
      gains: ``(batch, m, c_out)``, derivatives of the values by that scale; None without.
    """

    values: Array
    inputs: Array
    outputs: Array
    gains: Array | None = None


def over_groups(pairs: Pairs) -> Pairs:
    """Of every unfolding the largest value of the batch: ``values (m,)``, ``inputs`` zero for all other kernels."""
    batch = len(pairs.values)
    if batch == 1:
        return pairs._replace(values=pairs.values[0])
    # Asked of every group: on a CPU, a maximum over thousands may drop a NaN.
    poisoned = jnp.any(jnp.isnan(pairs.values), axis=0)
    values = jnp.where(poisoned, jnp.nan, jnp.max(pairs.values, axis=0))
    chosen = (jnp.arange(batch)[:, None] == jnp.argmax(pairs.values, axis=0)).astype(values.dtype)
    gains = None if pairs.gains is None else pairs.gains * chosen[:, :, None]
    return pairs._replace(values=values, inputs=pairs.inputs * chosen[:, None, :, None], gains=gains)


def pick_smallest(top: Pairs) -> Pairs:
    """Of `over_groups` the smallest value, with its vectors: the axis of unfoldings is gone."""
    if len(top.values) == 1:
        pick = lambda x, axis: lax.index_in_dim(x, 0, axis, keepdims=False)  # noqa: E731
    else:
        # Unsigned: no index counts from the end.
        least = lax.argmin(top.values, 0, jnp.uint32)
        pick = functools.partial(lax.dynamic_index_in_dim, index=least, keepdims=False)
    gains = None if top.gains is None else pick(top.gains, axis=1)
    return Pairs(pick(top.values, axis=0), pick(top.inputs, axis=2), pick(top.outputs, axis=2), gains)


def smallest(kernels: Array, top: Pairs, scale: Array | None = None) -> Array:
    """The smallest value of `over_groups`, with the derivative of that one alone, by kernels and scale of outputs."""
    taps = kernels.reshape(len(kernels), -1, *kernels.shape[-2:])
    least = pick_smallest(top)
    value = with_pairs(least.values, taps, least.inputs, least.outputs)
    if scale is None or least.gains is None:
        return value
    gains = least.gains[:, None]
    return value + with_pairs(jnp.zeros_like(value), scale[:, None, None], jnp.ones_like(gains[..., :1]), gains)


def unfold(kernels: Array, axes: Axes) -> Array:
    """The unfolding whose spatial ``axes`` go with the outputs, as matrices.

    Args:
      kernels: ``(batch, *spatial, c_in, c_out)``.
      axes: spatial axes, counted from 0.

    Returns:
      ``(batch, Π taps of axes · c_out, Π taps of the others · c_in)``.
    """
    rank = kernels.ndim - 3
    rest = others(kernels.shape[1:-2], axes)
    order = (0, *(1 + a for a in axes), rank + 2, *(1 + a for a in rest), rank + 1)
    moved = jnp.transpose(kernels, order)
    split = 2 + len(axes)
    return moved.reshape(moved.shape[0], math.prod(moved.shape[1:split]), -1)


class Weights(NamedTuple):
    """How much each tap counts in each unfolding.

    Attributes:
      taps: ``(batch, taps, m)``, positive.
      factor: ``(batch, m)``: σ∞ ≤ factor · ‖unfolding with its blocks scaled by ``taps``‖.
    """

    taps: Array
    factor: Array


def tap_squares(kernels: Array) -> Array:
    """Squared Frobenius norm of every tap, ``(batch, *spatial)``, in one pass at the speed of memory.

    It overflows or vanishes for kernels beyond 1e18 or below 1e-18: then `weights` are 1.
    """
    return jnp.einsum("b...io,b...io->b...", kernels, kernels, precision=HIGHEST)


def weights(squares: Array, powers: Sequence[float]) -> Weights:
    r"""Weights for all distinct unfoldings, one set for each power.

    For positive a over the row taps of an unfolding and b over its column taps, F = (e/a ⊗ I) M (e/b ⊗ I)
    where M has its block (k, l) scaled by a_k b_l, so σ∞ ≤ ‖1/a‖₂ ‖1/b‖₂ ‖M‖₂. With a_k = (Frobenius norm of
    the taps in row k)^-p, and b likewise; p = 0 gives the four bounds. Any weights are sound, these too if
    rounded: the factor is computed from them. Taps of almost nothing get a weight as if they had 1e-6 of the largest.

    Args:
      squares: squared Frobenius norms of the taps, ``(batch, *spatial)``, from `tap_squares`; a rough value will do.
      powers: the p.
    """
    batch, *spatial = squares.shape
    rank, dtype = len(spatial), squares.dtype
    kinds = distinct(tuple(spatial))[0]
    exponents = jnp.asarray(powers, dtype).reshape(-1, *(1,) * (1 + rank)) / 2

    @functools.cache
    def side(axes: Axes) -> tuple[Array, Array]:
        """Weights of the taps on one side, ``(powers, batch, *)``, and the norms of their inverses."""
        # One sum for each value of the taps on this side, over the other side.
        sums = jnp.sum(squares, axis=tuple(1 + a for a in others(tuple(spatial), axes)), keepdims=True)
        top = jnp.max(sums, axis=tuple(range(1, 1 + rank)), keepdims=True)
        usable = jnp.isfinite(top) & (top > 1e12 * jnp.finfo(dtype).tiny)
        size = jnp.where(usable, jnp.maximum(sums / jnp.where(usable, top, 1), 1e-12), 1)
        weight = size**-exponents
        inverse = 1 / weight
        return weight, jnp.sqrt(jnp.sum(inverse * inverse, axis=tuple(range(2, 2 + rank))))

    both = [(side(axes), side(others(tuple(spatial), axes))) for axes in kinds]
    taps = jnp.stack([(a * b).reshape(len(powers), batch, -1) for (a, _), (b, _) in both], -1)
    factor = jnp.stack([a * b for (_, a), (_, b) in both], -1)
    return Weights(_beside(taps, 2), _beside(factor, 1))


def _beside(x: Array, axis: int) -> Array:
    """Sets of weights side by side: ``(sets, batch, …, kinds, …)`` -> ``(batch, …, sets · kinds, …)``."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def certified_pairs(kernels: Array, scaling: Weights | None = None) -> Pairs:
    """Upper bounds of the norms of all distinct unfoldings, rounding included, with their top pairs.

    Args:
      kernels: ``(batch, *spatial, c_in, c_out)``.
      scaling: of the taps; the bounds are then those of the weighted unfoldings, without the factor.

    Returns:
      `Pairs`; ``values`` are never below the norms (`fantastic4.dense.certified_norm`).
    """
    kinds = distinct(kernels.shape[1:-2])[0]
    if scaling is None:
        return _certified(kernels[None])
    # The sets of weights of one unfolding go side by side: one program for all of them.
    sets, batch = scaling.taps.shape[-1] // len(kinds), len(kernels)
    taps = scaling.taps.reshape(batch, -1, sets, len(kinds))
    taps = jnp.moveaxis(taps, (3, 2), (0, 1))  # (kinds, sets, batch, taps)
    scaled = kernels * taps.reshape(*taps.shape[:-1], *kernels.shape[1:-2], 1, 1)
    scaled = scaled.reshape(len(kinds), sets * batch, *kernels.shape[1:])
    pairs = _certified(scaled)
    # A scaled entry is off by two roundings: the weight's product and its own.
    size = jax.vmap(jax.vmap(lambda k: frobenius_bound(k.reshape(-1, k.shape[-1]))))(scaled)
    lost = constant_up(2.1 * unit_roundoff(kernels.dtype), kernels.dtype) * size.T
    values = round_up(pairs.values + lost, 4)
    inputs = pairs.inputs * jnp.moveaxis(taps, 0, -1).reshape(sets * batch, -1, len(kinds))[..., None]
    apart = [x.reshape(sets, batch, *x.shape[1:]) for x in (values, inputs, pairs.outputs)]
    return Pairs(_beside(apart[0], 1), _beside(apart[1], 2), _beside(apart[2], 2))


_SMALL = 512  # entries of a kernel for which another program costs more than products with zeros


def stacks(matrices: Sequence[Array]) -> Iterator[tuple[list[int], Array]]:
    """Matrices of the same norms that can share a program: none wider than tall, those of one shape in one array.

    Those of a small kernel count as of one shape: zeros behind their rows and columns do not change a norm.

    Args:
      matrices: ``(batch, rows, columns)`` each, all of one kernel.

    Yields:
      Which of them, and ``(them, batch, rows, columns)``.
    """
    tall = [m if m.shape[1] >= m.shape[2] else jnp.swapaxes(m, 1, 2) for m in matrices]
    shapes = [m.shape[1:] for m in tall]
    if tall[0].size <= _SMALL:
        shapes = [tuple(map(max, *shapes)) if len(shapes) > 1 else shapes[0]] * len(tall)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(i)
    for (rows, columns), same in groups.items():

        def padded(m: Array, rows: int = rows, columns: int = columns) -> Array:
            behind = rows - m.shape[1], columns - m.shape[2]
            return jnp.pad(m, ((0, 0), (0, behind[0]), (0, behind[1]))) if any(behind) else m

        yield same, jnp.stack([padded(tall[i]) for i in same])


def _certified(arrays: Array) -> Pairs:
    """`fantastic4.dense.certified_norm` of each distinct unfolding: each of its own array, or all of one.

    Args:
      arrays: ``(kinds or 1, batch, *spatial, c_in, c_out)``.
    """
    _, batch, *spatial, c_in, c_out = arrays.shape
    taps = math.prod(spatial)

    def spread(vector: Array, owned: Sequence[int], channels: int) -> Array:
        shape = [k if a in owned else 1 for a, k in enumerate(spatial)]
        full = jnp.broadcast_to(vector.reshape(batch, *shape, channels), (batch, *spatial, channels))
        return full.reshape(batch, taps, channels)

    kinds = distinct(tuple(spatial))[0]
    # Scaled before they are unfolded: the entries of an array are those of all its unfoldings.
    size = jax.vmap(jax.vmap(sizing))(arrays)
    arrays = arrays * size.inverse.reshape(*arrays.shape[:2], *(1,) * (arrays.ndim - 2))
    matrices = [unfold(arrays[i % len(arrays)], axes) for i, axes in enumerate(kinds)]
    found: dict[int, Certified] = {}
    for same, stacked in stacks(matrices):
        # One after the other, each with as many steps as it needs.
        together = lax.map(functools.partial(each, certified_tall), stacked)
        for place, i in enumerate(same):
            bound, long, short = jax.tree.map(lambda x: x[place], together)  # noqa: B023
            left, right = (long, short) if matrices[i].shape[1] >= matrices[i].shape[2] else (short, long)
            found[i] = Certified(bound, left[:, : matrices[i].shape[1]], right[:, : matrices[i].shape[2]])
    pairs = [(axes, found[i]) for i, axes in enumerate(kinds)]
    return Pairs(
        size.restore(jnp.stack([c.bound for _, c in pairs])).T,
        jnp.stack([spread(c.right, others(tuple(spatial), axes), c_in) for axes, c in pairs], 2),
        jnp.stack([spread(c.left, axes, c_out) for axes, c in pairs], 2),
    )
