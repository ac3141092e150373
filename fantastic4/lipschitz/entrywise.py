"""Sums of constants times functions of the same entries: as steep as the steepest sum of slopes of any entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

import jax.numpy as jnp
from jax import Array

from fantastic4.expression import Expr, X
from fantastic4.lipschitz.fixed import SILENT, Fixed, Scaled
from fantastic4.lipschitz.graph import Signal
from fantastic4.lipschitz.weights import Weights, number, times_power_up, weights
from fantastic4.rounding import round_up
from fantastic4.scalar import extremes

_Link = tuple[Signal, tuple[Expr, ...], tuple[Array, ...]]
"""Entries, and what is done to them: functions of one number and constants, in any order."""


def _links(signal: Signal) -> list[_Link]:
    """A signal as functions of its node's entries, of those that the node scales, and so on."""
    found: list[_Link] = []
    exprs: tuple[Expr, ...] = ()
    scales: tuple[Array, ...] = ()
    while True:
        exprs = exprs if signal.expr == X else (*exprs, signal.expr)
        found.append((dataclasses.replace(signal, expr=X), exprs, scales))
        node = signal.node
        if signal.index is not None or signal.shape != node.shape or not isinstance(node, Fixed):
            return found
        if isinstance(node, Scaled):
            scales = (*scales, node.by)
        elif not node.linear or node.label.operation != SILENT:
            return found
        (signal,) = node.inputs


def _slopes(exprs: Sequence[Expr]) -> tuple[Fraction, Fraction]:
    """Between which numbers the slope of one function after the other lies."""
    low = high = Fraction(1)
    for expr in exprs:
        ends = [end * Fraction(other) for end in (low, high) for other in extremes(expr, 1)]
        low, high = min(ends), max(ends)
    return low, high


def steepest_sum(signals: Sequence[Signal], signs: Sequence[int]) -> tuple[Signal, Array] | None:
    """The entries that all signals are constants times functions of, and the steepest slope of any entry's sum.

    Of b log σ(z) + (1 - b) log σ(-z) the slopes are b times one between 0 and 1, and 1 - b times one between -1 and 0.
    None where there are no such entries, or no constants.
    """
    first, *others = map(_links, signals)
    for link in first:
        entries = link[0]
        same = [link, *(other for links in others for other in links if other[0].same_entries(entries))]
        parts = [(exprs, scales) for _, exprs, scales in same]
        if len(parts) == len(signals) and any(scales for _, scales in parts):
            break
    else:
        return None
    try:
        spans = [_slopes(exprs) for exprs, _ in parts]
    except (ValueError, OverflowError):
        return None
    terms = []
    for (low, high), (_, scales), sign in zip(spans, parts, signs, strict=True):
        largest = max(abs(low), abs(high))
        if largest:
            dtype = jnp.result_type(float, *(by.dtype for by in scales))
            term = number(largest, dtype)
            for by in scales:
                term = term.times(weights(by.astype(dtype)))
            terms.append((term, sorted((sign * float(low / largest), sign * float(high / largest)))))
    return entries, _steepest(terms)


def _steepest(terms: Sequence[tuple[Weights, Sequence[float]]]) -> Array:
    """The largest size of a sum of weights, each times a number between two of at most 1."""
    if not terms:
        return jnp.zeros(())
    top = terms[0][0].exponent
    for term, _ in terms[1:]:
        top = jnp.maximum(top, term.exponent)
    info = jnp.finfo(jnp.result_type(*(term.values.dtype for term, _ in terms)))
    low = high = size = jnp.zeros((), info.dtype)
    for term, span in terms:
        unit = jnp.ldexp(jnp.ones((), info.dtype), jnp.maximum(term.exponent - top, info.minexp))
        ends = [term.values * unit * end for end in span]
        low, high = low + jnp.minimum(*ends), high + jnp.maximum(*ends)
        # Of a product what is rounded, and what vanishes.
        size = size + (term.error + 4 * float(info.eps) * term.largest) * unit + 4 * float(info.tiny)
    steepest = jnp.maximum(jnp.abs(low), jnp.abs(high)) + round_up(size, 4)
    # Asked of every entry: on a CPU, a maximum over thousands may drop a NaN.
    largest = jnp.where(jnp.any(jnp.isnan(steepest)), jnp.nan, jnp.max(steepest, initial=0))
    return times_power_up(round_up(largest, 4 + 2 * len(terms)), top)
