r"""Losses of logits: log-softmax of which few entries are read, or a weighted sum, moves far less than √n.

Entries K of z - log Σ exp(z) have the Jacobian I_K - 1pᵀ, which is convex in the probabilities p: its norm is largest
at a p that is one entry, √(|K| + 1) where that is not in K. Of a weighted sum with weights y, y - (Σy) p is the
gradient, (Σy) (p pᵀ - diag p) the Hessian: cross-entropy moves by √2 for a label, and bends by ½.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jax import Array

from fantastic4.expression import X, affine
from fantastic4.lipschitz.fixed import SILENT, Fixed, LogSoftmax, LogSumExp, Scaled
from fantastic4.lipschitz.graph import Label, Signal, multiplicity, whole
from fantastic4.lipschitz.operands import at_once
from fantastic4.lipschitz.weights import Weights, number, times_power_up, weights
from fantastic4.rounding import gamma, round_up


@dataclasses.dataclass(eq=False)
class Picked(Fixed):
    """Some entries of log-softmax.

    Attributes:
      whole: all of it.
      held: which, in order.
    """

    whole: LogSoftmax | None = None
    held: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))


def _groups(shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    """The places of an array, ``(groups, entries)``: those along axes together."""
    places = np.arange(math.prod(shape)).reshape(shape)
    count = math.prod(shape[a] for a in axes)
    return np.moveaxis(places, axes, range(-len(axes), 0)).reshape(-1, count)


def picked(signal: Signal) -> Signal:
    """A signal that reads entries of log-softmax, as of those entries alone where they are few of each sum."""
    node = signal.node
    if signal.index is None or not isinstance(node, LogSoftmax | Picked):
        return signal
    taken = np.unique(signal.index[signal.index >= 0])
    if isinstance(node, Picked):
        source, held = node.whole, node.held[taken]
    else:
        source, held = node, taken
    if source is None or not len(held) or len(held) == math.prod(node.shape):
        return signal
    most = int(np.bincount(_which_sum(source, held)).max())
    if most + 1 >= math.prod(source.shape[a] for a in source.axes):
        return signal
    few = Picked(
        source.label, held.shape, source.inputs, math.sqrt(most + 1) * (1 + 1e-15),
        bend=math.sqrt(most) / 2 * (1 + 1e-15), unmoved=source.unmoved, whole=source, held=held,
    )  # fmt: skip
    index = np.where(signal.index >= 0, np.searchsorted(taken, signal.index), signal.index)
    return dataclasses.replace(signal, node=few, index=index)


def _entries(signal: Signal) -> tuple[LogSoftmax, np.ndarray] | None:
    """Of a signal that is entries of log-softmax all of it, and which."""
    node, places = signal.node, signal.places
    if signal.expr != X or np.any(places < 0):
        return None
    if isinstance(node, Picked) and node.whole is not None:
        return node.whole, node.held[places]
    return (node, places) if isinstance(node, LogSoftmax) else None


def _which_sum(node: LogSoftmax, places: np.ndarray) -> np.ndarray:
    """For each entry a number for the sum that was taken from it."""
    at = np.unravel_index(places, node.shape)
    kept = [a for a in range(len(node.shape)) if a not in node.axes]
    if not kept:
        return np.zeros_like(places)
    return np.ravel_multi_index([at[a] for a in kept], [node.shape[a] for a in kept])


def _logits(node: LogSoftmax, places: np.ndarray) -> Signal:
    (source,) = node.inputs
    if np.array_equal(places, np.arange(math.prod(node.shape)).reshape(node.shape)):
        return source
    return dataclasses.replace(source, shape=places.shape, index=source.places.ravel()[places])


def same_differences(a: Signal, b: Signal) -> tuple[Signal, Signal]:
    """Two signals, or if they are log-softmax, entry by entry of one sum each, the logits: a - b is the same."""
    one, two = _entries(a), _entries(b)
    if one is None or two is None or one[0] is not two[0]:
        return a, b
    node, (first, second) = one[0], (one[1], two[1])
    if not np.array_equal(_which_sum(node, first), _which_sum(node, second)):
        return a, b
    return _logits(node, first), _logits(node, second)


def same_margins(signal: Signal) -> Signal:
    """A signal, or if it is log-softmax, with one sum for all along the last axis, the logits."""
    found = _entries(signal)
    if found is None:
        return signal
    sums = _which_sum(*found)
    return _logits(*found) if np.array_equal(sums, np.broadcast_to(sums[..., :1], sums.shape)) else signal


def cross_entropy(a: Signal, b: Signal, label: Label) -> Signal | None:
    """``log Σ exp(z) - z[k]``, or its negative, with a k for each sum: its gradient is p less the unit vector k."""
    for total, entry in ((a, b), (b, a)):
        if not isinstance(total.node, LogSumExp) or total.expr != X:
            continue
        (source,) = total.node.inputs
        if entry.node is not source.node or entry.expr != source.expr or np.any(total.places < 0):
            continue
        groups = source.places.ravel()[_groups(source.shape, total.node.axes)]
        if np.all(np.any(groups[total.places.ravel()] == entry.places.ravel()[:, None], axis=1)):
            name = dataclasses.replace(label, operation="cross_entropy")
            often = math.sqrt(multiplicity(total.index)) * (1 + 1e-15)
            factor = math.sqrt(2) * often * (1 + 1e-15)
            return whole(Fixed(name, a.shape, (source,), factor, bend=often / 2, unmoved=total.node.unmoved))
    return None


def weighed(
    signal: Signal, axes: Sequence[int], label: Label, by: Array | None = None
) -> tuple[Signal, tuple[int, ...]] | None:
    """``Σ y (z - log Σ exp(z))`` for a signal that is log-softmax times constants, summed over its axes or more.

    Args:
      signal: what is summed.
      axes: over which axes.
      label: of the sum.
      by: constants more, of a shape that broadcasts to the signal's.

    Returns:
      The sum over log-softmax's axes alone, and over which of its axes it is still to be summed; None for what is not
      known to be that.
    """
    once, scales = Fraction(1), [] if by is None else [by]
    while True:
        node, straight = signal.node, affine(signal.expr)
        if straight is None or signal.index is not None or signal.shape != node.shape:
            return None
        once *= straight[0]
        if isinstance(node, LogSoftmax):
            break
        if isinstance(node, Scaled):
            scales.append(node.by)
        elif not (isinstance(node, Fixed) and node.linear and node.label.operation == SILENT):
            return None
        (signal,) = node.inputs
    if not set(node.axes) <= set(axes):
        return None
    with at_once(*scales):
        total = number(once, jnp.result_type(float))
        for scale in scales:
            total = total.times(weights(scale))
        factor, bend = _of_weights(total, node.shape, node.axes)
    name = dataclasses.replace(label, operation="cross_entropy")
    left = [a for a in range(len(node.shape)) if a not in node.axes]
    shape = tuple(node.shape[a] for a in left)
    loss = Fixed(name, shape, node.inputs, factor, bend=bend, unmoved=node.unmoved)
    return whole(loss), tuple(place for place, a in enumerate(left) if a in axes)


def _of_weights(by: Weights, shape: Sequence[int], axes: Sequence[int]) -> tuple[Array, Array]:
    """The largest ‖y - (Σy) e_k‖ and |Σy| / 2 over all k and all sums over axes.

    The square is Σy² + (Σy)² - 2 (Σy) y_k: it is largest for the smallest y_k or for the largest.
    """
    y = jnp.broadcast_to(by.values, shape)
    if not y.size:
        return jnp.zeros((), y.dtype), jnp.zeros((), y.dtype)
    count = math.prod(shape[a] for a in axes)
    error = gamma(count + 16, y.dtype)
    total, size, squares = (jnp.sum(part, axis=axes) for part in (y, jnp.abs(y), y * y))
    ends = [2 * total * end(y, axis=axes) for end in (jnp.min, jnp.max)]
    square = squares + total * total - jnp.minimum(*ends)
    # Relative to what may have cancelled; no part is above this.
    square = jnp.max(square + 4 * error * (squares + size * size))
    root = jnp.sqrt(jnp.where(square > 0, square, 1)) * (square > 0)
    bend = jnp.max(jnp.abs(total) + error * size) / 2
    # By what the weights may be off, each of them; where one is none, neither is the sum.
    off = round_up(by.error * count, 2) + 0 * by.largest
    factor, bend = (times_power_up(round_up(part + 2 * off, 8), by.exponent) for part in (root, bend))
    return factor, bend
