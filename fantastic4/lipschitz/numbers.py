"""Numbers of a bound: each rounded upward, each kernel's norm computed once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fantastic4.conv import ConvSpec
from fantastic4.expression import affine, slopes
from fantastic4.lipschitz.graph import Label, Node, Signal, UnboundedError, multiplicity
from fantastic4.rounding import round_up
from fantastic4.scalar import most_bent, steepest


class HasNorm(Protocol):
    """A node with a kernel."""

    kernel: Array
    spec: ConvSpec | None
    label: Label

    def norm(self, how: Numbers) -> Array:
        """An upper bound of its norm."""
        ...


class Numbers:
    """How constants are computed: the type, each kernel's norm once, and rounding upward.

    Attributes:
      dtype: of the constants.
      method: the method for a layer's name.
      interval: the method that works on numbers alone, of a kernel and its spec.
    """

    def __init__(self, dtype: Any, method: Callable[[str], str], interval: Callable[[Array, ConvSpec], Array]):
        self.dtype = dtype
        self.method = method
        self.interval = interval
        self.constants: dict[int, Array] = {}
        self._norms: dict[Any, Array] = {}
        self._kept: list[Any] = []  # an id is of an object that lives

    def of(self, node: Node) -> Array:
        """The Lipschitz constant of a node that has been computed."""
        return self.constants[id(node)]

    def norm(self, node: HasNorm) -> Array:
        """Norm of a linear node, computed once for all that share its kernel."""
        key = id(node.kernel), node.spec, self.method(node.label.name)
        if key not in self._norms:
            self._kept.append(node.kernel)
            self._norms[key] = self.narrow(node.norm(self))
        return self._norms[key]

    def narrow(self, value: Array) -> Array:
        """A number in the type of the constants, not rounded down."""
        cast = jnp.asarray(value, self.dtype)
        return cast if jnp.finfo(value.dtype).bits <= jnp.finfo(self.dtype).bits else round_up(cast, 2)

    def up(self, value: float) -> Array:
        """A Python float, not rounded down."""
        kind = np.dtype(self.dtype).type
        nearest = kind(value)
        return jnp.asarray(nearest if float(nearest) >= value else np.nextafter(nearest, kind(np.inf)))

    def root(self, signal: Signal) -> float:
        """Root of how often a signal reads one entry."""
        times = multiplicity(signal.index)
        return float(times) if times < 2 else math.sqrt(times) * (1 + 1e-15)

    def times(self, *factors: Array | float) -> Array:
        """A product, rounded up."""
        first, *rest = [self.up(f) if isinstance(f, float | int) else f for f in factors]
        for factor in rest:
            product = round_up(first * factor, 2)
            # What vanished below the smallest float has not become 0.
            vanished = (first > 0) & (factor > 0) & (product < jnp.finfo(self.dtype).tiny)
            first = jnp.where(vanished, 2 * jnp.finfo(self.dtype).tiny, product)
        return first

    def sum(self, terms: Sequence[Array]) -> Array:
        """A sum, rounded up."""
        return functools.reduce(lambda a, b: round_up(a + b, 2), terms)

    def root_sum_squares(self, terms: Sequence[Array]) -> Array:
        """The root of a sum of squares, rounded up."""
        if len(terms) == 1:
            return terms[0]
        largest = functools.reduce(jnp.maximum, terms)
        scale = lax.stop_gradient(jnp.where(largest > 0, largest, 1))
        ratios = [term / scale for term in terms]
        inside = functools.reduce(lambda a, b: a + b, [r * r for r in ratios])
        # The square root of zero has no derivative.
        root = jnp.where(inside > 0, jnp.sqrt(jnp.where(inside > 0, inside, 1)), 0)
        return round_up(root * scale, 2 * len(terms) + 12)


def slope(signal: Signal) -> float:
    """Lipschitz constant of a signal's scalar function."""
    straight, pieces = affine(signal.expr), slopes(signal.expr)
    try:
        found = math.inf if straight else steepest(signal.expr)  # which refuses what jumps
        if pieces is not None:
            largest = max(map(abs, pieces))
            found = min(found, largest if largest in (0, 1) else largest * (1 + 1e-14))
        return found
    except ValueError as error:
        raise UnboundedError(
            f"{signal.label} makes a function of one number without a finite slope: {error}. "
            "Bound its argument first (jnp.clip, tanh), or divide by its norm plus a constant"
        ) from None


def bend(signal: Signal) -> float:
    """Lipschitz constant of the slope of a signal's scalar function."""
    try:
        return 0.0 if affine(signal.expr) is not None else most_bent(signal.expr)
    except ValueError as error:
        raise UnboundedError(
            f"{signal.label} makes a function of one number without a finite curvature: {error}. "
            "Use a smooth activation: softplus, tanh, sigmoid, gelu, silu"
        ) from None
