r"""How bent a traced function is: eigenvalues of the Hessian of a number that it computes, from both sides.

With elementwise functions s_I at nodes I of a graph that is linear otherwise, the Hessian of f is exactly

    ∇²f = Σ_I J_Iᵀ diag(s_I''(z_I) ⊙ ∂f/∂a_I) J_I,      a_I = s_I(z_I), J_I the Jacobian of z_I.

An interval of ∂f/∂a_I comes from a backward pass in interval arithmetic: s' and s'' lie between their extremes on the
whole line. So ∇²f lies between -m and M with

    m = ‖Σ_I J_Iᵀ diag(c_I) J_I‖,      c_I the largest that -s_I'' ∂f/∂a_I can be, or 0,

and M likewise. Of all z_I that are a matrix times the input the norm is computed as it stands, ‖[√c_I J_I; …]‖²;
each other adds ‖J_I‖² max c_I with the Lipschitz bound of z_I. For a sequential network this is never
above the S/r recursion of Singla & Feizi (2020), which takes |W| for the intervals and both signs together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fantastic4 import dense
from fantastic4.devices import vary_as
from fantastic4.expression import Expr, affine
from fantastic4.linalg import map_rows
from fantastic4.lipschitz.fixed import Fixed, Input, Scaled
from fantastic4.lipschitz.graph import Node, Signal, multiplicity
from fantastic4.lipschitz.nodes import Joint, Linear, Sum
from fantastic4.lipschitz.numbers import SMOOTH, Numbers, of_one_number
from fantastic4.rounding import constant_up, gamma, product_up, round_up, subnormal_norm, unit_roundoff
from fantastic4.scalar import extremes


class Span(NamedTuple):
    """Arrays between which another one lies.

    Attributes:
      low: below.
      high: above.
    """

    low: Array
    high: Array


def _widen(low: Array, high: Array, relative: float) -> Span:
    """An interval with rounding errors that are relative to its larger end, or a float that vanished."""
    size = jnp.maximum(jnp.abs(low), jnp.abs(high)) * relative + float(jnp.finfo(low.dtype).tiny)
    return Span(low - size, high + size)


def _size(span: Span) -> Array:
    return jnp.maximum(jnp.abs(span.low), jnp.abs(span.high))


def _times(span: Span, low: float, high: float) -> Span:
    """An interval times a number between two, which as a float of this type may vanish, or be infinite."""
    info = jnp.finfo(span.low.dtype)
    tiny, most = float(info.tiny), float(info.max)
    low = low if abs(low) >= tiny else (-tiny if low < 0 else 0.0)
    high = high if abs(high) >= tiny else (tiny if high > 0 else 0.0)
    low, high = (end if abs(end) <= most else math.copysign(math.inf, end) for end in (low, high))
    products = [span.low * low, span.low * high, span.high * low, span.high * high]
    smallest = functools.reduce(jnp.minimum, products)
    largest = functools.reduce(jnp.maximum, products)
    return _widen(smallest, largest, 4 * unit_roundoff(smallest.dtype))


class _Unknown(Exception):
    """This graph holds a node that no derivative is taken through here."""


def _vanished(constants: Array, span: Span) -> Array:
    """What subnormal constants, which compilers take for 0, times an interval add up to at most; 0 of none."""
    lost = subnormal_norm(constants)
    return jnp.where(lost > 0, lost * jnp.sum(_size(span)), 0)


def _back(node: Node, span: Span) -> list[Span]:
    """Intervals of the derivatives by a node's inputs, from those by the node."""
    dtype = span.low.dtype
    if isinstance(node, Linear) and node.apply is not None:
        (signal,) = node.inputs
        kernel = node.kernel.astype(dtype)
        like = vary_as(jnp.zeros(signal.shape, dtype), kernel, span)
        shape, apply = node.shape, node.apply

        def transposed(part: Array, by: Array) -> Array:
            return jax.linear_transpose(lambda x: apply(part, x), like)(vary_as(by.reshape(shape), like))[0]

        positive, negative = jnp.maximum(kernel, 0), jnp.minimum(kernel, 0)
        low = transposed(positive, span.low) + transposed(negative, span.high)
        high = transposed(positive, span.high) + transposed(negative, span.low)
        terms = 2 * kernel.size // max(1, kernel.shape[-2]) + 4 + node.roundings
        error = transposed(jnp.abs(kernel), _size(span)) * (1.01 * gamma(terms, dtype))
        # Products that vanish, and entries that do.
        error += terms * float(jnp.finfo(dtype).tiny) + _vanished(kernel, span)
        return [_widen(low - error, high + error, 2 * unit_roundoff(dtype))]
    if isinstance(node, Sum):
        other = span if node.sign > 0 else Span(-span.high, -span.low)
        return [span, other]
    if isinstance(node, Joint) and node.linear and node.where:
        flat = [end.ravel() for end in span]
        return [
            Span(*(end[places].reshape(signal.shape) for end in flat))
            for signal, places in zip(node.inputs, node.where, strict=True)
        ]
    if isinstance(node, Scaled):
        by = jnp.broadcast_to(node.by, node.shape).astype(dtype)
        ends, lost = (span.low * by, span.high * by), _vanished(by, span)
        return [_widen(jnp.minimum(*ends) - lost, jnp.maximum(*ends) + lost, 4 * unit_roundoff(dtype))]
    if isinstance(node, Fixed) and node.linear and node.apply is not None:
        (signal,) = node.inputs
        like = vary_as(jnp.zeros(signal.shape, dtype), span)
        transpose = jax.linear_transpose(node.apply, like)
        low, high, size = (transpose(end.reshape(node.shape))[0] for end in (*span, _size(span)))
        # Its coefficients are all positive or 0; as many are added as it has outputs, at most.
        error = size * (1.01 * gamma(64 + span.low.size, dtype))
        return [_widen(low - error, high + error, 2 * unit_roundoff(dtype))]
    raise _Unknown


_ENTRIES = 2**23  # of a matrix that is written out


def _first_matrix(signal: Signal) -> tuple[Array, Array | float] | None:
    """The matrix ``(entries of the input, entries)`` to a signal, where that is one layer and small enough.

    The layer may read the input's entries in any places, as a padded or shifted input has them, each once. With what
    its norm has lost.
    """
    node = signal.node
    if not isinstance(node, Linear) or signal.index is not None or node.apply is None:
        return None
    (source,) = node.inputs
    n_in, n_out = int(np.prod(source.shape)), int(np.prod(node.shape))
    entries = int(np.prod(source.node.shape))
    if not isinstance(source.node, Input) or not source.adds_constants or multiplicity(source.index) > 1:
        return None
    if max(n_in, entries) * n_out > _ENTRIES:
        return None
    if node.spec is None and len(node.kernel) == 1 and node.kernel.shape[1:] == (n_in, n_out):
        matrix = node.kernel[0]
    else:
        apply, kernel = node.apply, node.kernel
        basis = jnp.eye(n_in, dtype=kernel.dtype).reshape(n_in, *source.shape)
        matrix = map_rows(lambda unit: apply(kernel, unit), basis, 64).reshape(n_in, n_out)
    if source.index is not None:
        places = source.index.ravel()
        matrix = jnp.zeros((entries, n_out), matrix.dtype).at[places[places >= 0]].set(matrix[places >= 0])
    return matrix, node.lost


class _Terms:
    """‖Σ_I J_Iᵀ diag(c_I) J_I‖ from above, for two sets of weights c_I ≥ 0 and the Jacobians J_I of signals.

    Those that are written out stand side by side in one matrix: where each signal sees its own part of the input, as
    kernels of two sizes do, the norm of all together is well below the sum.
    """

    def __init__(self, how: Numbers) -> None:
        self.how = how
        self.total = jnp.zeros(2, how.dtype)
        self.columns: list[Array] = []
        self.lost: list[Array] = []

    def add(self, signal: Signal, weights: Array) -> None:
        """Add the term of this signal, with weights ``(2, …)`` for each of its entries."""
        how, first = self.how, _first_matrix(signal)
        weights = weights.reshape(2, -1)
        if first is None:
            # Asked of every weight: on a CPU, a maximum over thousands may drop a NaN.
            largest = jnp.where(jnp.any(jnp.isnan(weights), axis=1), jnp.nan, jnp.max(weights, axis=1, initial=0))
            size = how.of(signal.node)
            self.total = round_up(self.total + how.times(largest, float(multiplicity(signal.index)), size, size), 2)
            return
        matrix, lost = first
        root = jnp.where(weights == 0, 0, jnp.sqrt(jnp.where(weights == 0, 1, weights)))
        self.columns.append(matrix.astype(how.dtype) * root[:, None])
        # Products that vanish, as the entries of a matrix.
        some = jnp.max(root, axis=1) > 0
        vanished = constant_up(float(jnp.finfo(self.how.dtype).tiny) * matrix.size**0.5, self.how.dtype)
        self.lost.append(jnp.where(some, vanished, 0))
        self.lost.append(jnp.max(root, axis=1) * subnormal_norm(matrix.astype(self.how.dtype)))
        if not isinstance(lost, float):
            self.lost.append(jnp.max(root, axis=1) * lost)

    def value(self) -> Array:
        """The bounds, ``(2,)``."""
        if not self.columns:
            return self.total
        matrices = jnp.concatenate(self.columns, axis=2)
        size = jax.vmap(dense.frobenius_bound)(lax.stop_gradient(matrices))
        norm = round_up(lax.map(dense.bound, matrices) + 8 * unit_roundoff(self.how.dtype) * size, 4)
        for lost in self.lost:
            norm = round_up(norm + lost, 4)
        return round_up(self.total + product_up(norm, norm), 2)


def hessian(nodes: Sequence[Node], output: Signal, seed: Array, how: Numbers) -> Array:
    """Numbers (m, M) with -m ≤ eigenvalues of the Hessian of ⟨seed, output⟩ ≤ M, after `first_order`.

    Raises:
      _Unknown: a node that this is not known for.
    """
    dtype = how.dtype
    spans: dict[int, Span] = {}
    terms = _Terms(how)

    def arrive(signal: Signal, span: Span) -> None:
        straight = affine(signal.expr)
        if straight is None:
            (low, high), (bent_low, bent_high) = of_one_number(signal, _both, "curvature", SMOOTH)
            bent = _times(span, bent_low, bent_high)
            terms.add(signal, jnp.maximum(jnp.stack([-bent.low, bent.high]), 0))
            span = _times(span, low, high)
        elif straight[0] != 1:
            span = _times(span, float(straight[0]), float(straight[0]))
        node = signal.node
        size = int(np.prod(node.shape))
        if signal.index is None:
            added = Span(span.low.reshape(node.shape), span.high.reshape(node.shape))
        else:
            places = signal.index.ravel()
            keep = places >= 0

            def scatter(values: Array) -> Array:
                return jnp.zeros(size, dtype).at[places[keep]].add(values.ravel()[keep]).reshape(node.shape)

            # Relative to what was added up, which may cancel.
            error = scatter(_size(span)) * (1.01 * gamma(multiplicity(signal.index) + 4, dtype))
            added = _widen(scatter(span.low) - error, scatter(span.high) + error, 2 * unit_roundoff(dtype))
        if id(node) in spans:
            old = spans[id(node)]
            added = _widen(old.low + added.low, old.high + added.high, 4 * unit_roundoff(dtype))
        spans[id(node)] = added

    arrive(output, Span(seed, seed))
    for node in reversed(nodes):
        if isinstance(node, Input) or id(node) not in spans:
            continue
        for signal, span in zip(node.inputs, _back(node, spans.pop(id(node))), strict=True):
            arrive(signal, span)
    return terms.value()


@functools.lru_cache(maxsize=512)
def _both(expr: Expr) -> tuple[tuple[float, float], tuple[float, float]]:
    return extremes(expr, 1), extremes(expr, 2)


def hessians(nodes: Sequence[Node], output: Signal, seeds: Array, how: Numbers) -> Array | None:
    """`hessian` of every seed, ``(seeds, 2)``, or None for a graph that it does not know.

    As a loop, also of one: its hundred small operations are one program to compile.
    """
    try:
        return lax.map(lambda seed: hessian(nodes, output, seed.reshape(output.shape), how), seeds)
    except _Unknown:
        return None
