"""Numbers of a bound: each rounded upward, each kernel's norm computed once."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fantastic4.conv import ConvSpec
from fantastic4.expression import Expr, X, affine, const, slopes, substitute
from fantastic4.kernels import some
from fantastic4.lipschitz.graph import Label, Node, Signal, UnboundedError, multiplicity
from fantastic4.rounding import product_up, round_up, times_up
from fantastic4.scalar import JumpError, most_bent, steepest
from fantastic4.together import steepest_together
from fantastic4.values import largest_value

T = TypeVar("T")


class HasNorm(Protocol):
    """A node with a kernel."""

    kernel: Array
    spec: ConvSpec | None
    label: Label
    factors: tuple[Array, Array] | None

    def norm(self, method: str) -> Array:
        """An upper bound of its norm."""
        ...


class Numbers:
    """How constants are computed: the type, each kernel's norm once, and rounding upward.

    Attributes:
      dtype: of the constants.
      constants: of the nodes, by their identity.
    """

    def __init__(self, dtype: Any):
        self.dtype = dtype
        self.constants: dict[int, Array] = {}
        self._norms: dict[Any, tuple[Array, Array]] = {}

    def of(self, node: Node) -> Array:
        """The Lipschitz constant of a node that has been computed."""
        return self.constants[id(node)]

    def method(self, node: HasNorm) -> str:
        """The method for a node's norm."""
        return "four"

    def compute(self, node: HasNorm) -> Array:
        """A node's norm."""
        return node.norm(self.method(node))

    def prepare(self, nodes: Sequence[Any]) -> None:
        """What `norm` will be asked, together."""

    def norm(self, node: HasNorm) -> Array:
        """Norm of a linear node, computed once for all that share its kernel."""
        key = self._key(node)
        if key not in self._norms:
            self._put(node, self.compute(node))
        return self._norms[key][0]

    def _key(self, node: HasNorm) -> Any:
        return id(node.kernel), node.spec, self.method(node)

    def _put(self, node: HasNorm, norm: Array) -> None:
        # With the kernel: an identity is of an object that lives.
        self._norms[self._key(node)] = self.narrow(norm), node.kernel

    def narrow(self, value: Array) -> Array:
        """A number in the type of the constants, not rounded down."""
        cast = jnp.asarray(value, self.dtype)
        return cast if jnp.finfo(value.dtype).bits <= jnp.finfo(self.dtype).bits else round_up(cast, 2)

    def up(self, value: float) -> Array:
        """A Python float, not rounded down."""
        kind = np.dtype(self.dtype).type
        with np.errstate(over="ignore"):  # infinity is no smaller
            nearest = kind(max(value, float(jnp.finfo(self.dtype).tiny)) if value > 0 else value)
        return jnp.asarray(nearest if float(nearest) >= value else np.nextafter(nearest, kind(np.inf)))

    def root(self, signal: Signal) -> float:
        """Root of how often a signal reads one entry."""
        times = multiplicity(signal.index)
        return float(times) if times < 2 else math.sqrt(times) * (1 + 1e-15)

    def times(self, *factors: Array | float) -> Array:
        """A product, rounded up."""
        return product_up(*(self.up(f) if isinstance(f, float | int) else f for f in factors))

    def sum(self, terms: Sequence[Array]) -> Array:
        """A sum, rounded up."""
        return functools.reduce(lambda a, b: round_up(a + b, 2), terms)

    def root_sum_squares(self, terms: Sequence[Array]) -> Array:
        """The root of a sum of squares, rounded up."""
        if len(terms) == 1:
            return terms[0]
        largest = functools.reduce(jnp.maximum, terms)
        scale = lax.stop_gradient(jnp.where((largest > 0) & (largest < jnp.inf), largest, 1))
        ratios = [term / scale for term in terms]
        inside = functools.reduce(lambda a, b: a + b, [r * r for r in ratios])
        # The square root of zero has no derivative.
        root = jnp.where(inside == 0, 0, jnp.sqrt(jnp.where(inside == 0, 1, inside)))
        return round_up(root * scale, 2 * len(terms) + 12)


class ByName(Numbers):
    """Numbers with a method for each layer, by globs of names; a later one wins.

    Attributes:
      methods: words by glob.
    """

    def __init__(self, dtype: Any, methods: Mapping[str, str]):
        super().__init__(dtype)
        self.methods = methods
        self._names: set[str] = set()

    def method(self, node: HasNorm) -> str:
        """The last that fits."""
        self._names.add(node.label.name)
        fitting = [word for glob, word in self.methods.items() if fnmatch.fnmatchcase(node.label.name, glob)]
        return fitting[-1] if fitting else "four"

    def prepare(self, nodes: Sequence[Any]) -> None:
        """Under jit, norms of kernels of one kind by one program in a loop, which is traced and compiled once."""
        alike: dict[Any, dict[Any, Any]] = {}
        for node in nodes:
            method = self.method(node)
            if isinstance(node.kernel, jax.core.Tracer) and method != "interval" and node.kernel.size:
                lost = None if isinstance(node.lost, float) else jax.typeof(node.lost)
                kind = jax.typeof(node.kernel), lost, node.spec, method
                alike.setdefault(kind, {}).setdefault(id(node.kernel), node)
        for (_, lost, _, method), members in alike.items():
            first, *others = members.values()
            if others:
                given = [(node.kernel, 0.0 if lost is None else node.lost) for node in members.values()]
                stacked = jax.tree.map(lambda *each: jnp.stack(each), *given)
                one = lambda given, first=first, method=method, lost=lost: dataclasses.replace(  # noqa: E731
                    first, kernel=given[0], lost=0.0 if lost is None else given[1]
                ).norm(method)
                for node, norm in zip(members.values(), lax.map(one, stacked), strict=True):
                    self._put(node, norm)

    def check(self) -> None:
        """Refuse a glob that no layer fits."""
        for glob in self.methods:
            if glob != "*" and not fnmatch.filter(self._names, glob):
                there = f"they are {some(sorted(self._names), glob)}" if self._names else "this function has none"
                raise ValueError(f"a method for {glob!r}, but no such layer: {there}")


def above(number: Fraction) -> float:
    """The absolute value as a float, a little up."""
    try:
        return abs(float(number)) * (1 + 1e-15)
    except OverflowError:
        return math.inf


def of_one_number(signal: Signal, find: Callable[[Expr], T], what: str, remedy: str) -> T:
    """What is known of a signal's scalar function, or an error that names where it comes from."""
    try:
        return find(signal.expr)
    except (ValueError, OverflowError) as error:
        if isinstance(error, JumpError):
            remedy = "Leave it out of what is bounded, or let both sides meet there"
        raise UnboundedError(
            f"{signal.label} makes a function of one number without a finite {what}: {error}. {remedy}"
        ) from None


SMOOTH = "Use a smooth activation: softplus, tanh, sigmoid, gelu, silu"


def _slope(expr: Expr) -> float:
    pieces = slopes(expr)
    found = math.inf if affine(expr) is not None else steepest(expr)  # which refuses what jumps
    if pieces is not None:
        largest = max(map(abs, pieces))
        found = min(found, float(largest) if largest in (0, 1) else math.nextafter(float(largest), math.inf))
    return found


def slope(signal: Signal) -> float:
    """Lipschitz constant of a signal's scalar function."""
    remedy = "Bound its argument first (jnp.clip, tanh), or divide by its norm plus a constant"
    inside = _inside(signal.node)
    if inside != X:
        # Elsewhere it may be steeper, or none: as log(x + c) of a norm x, or the square of what is bounded.
        with contextlib.suppress(ValueError, OverflowError):
            return _slope(signal.expr)
        signal = dataclasses.replace(signal, expr=substitute(signal.expr, X, inside))
    return of_one_number(signal, _slope, "slope", remedy)


def _inside(node: Node) -> Expr:
    """X, held to where a node's entries are."""
    least, most = max(node.least, -node.most), node.most
    found = X if least == -math.inf else Expr("max", (X, const(least)))
    return found if most == math.inf else Expr("min", (found, const(most)))


_PATTERNS = 8  # of how often functions read an entry


def slope_together(signals: Sequence[Signal]) -> float:
    """Lipschitz constant of the entries of several signals of one node, from that node."""
    size = math.prod(signals[0].node.shape)
    reads: dict[Expr, np.ndarray] = {}
    steep: dict[Expr, float] = {}
    for signal in signals:
        flat = signal.places.ravel()
        count = np.bincount(flat[flat >= 0], minlength=size)
        reads[signal.expr] = reads.get(signal.expr, 0) + count
        steep[signal.expr] = slope(signal)
    counts, slopes = np.stack(list(reads.values())), np.array(list(steep.values()))
    top = float(slopes.max())
    if top == 0 or not size:
        return 0.0
    if counts.sum(axis=0).max() <= 1:
        return top
    # What one entry of the node moves. In units of the steepest: squares of slopes below 1e-154 vanish.
    apart = times_up(top, math.sqrt(float(np.max((slopes / top) ** 2 @ counts))))
    patterns = np.unique(counts, axis=1).T if len(reads) > 1 and any(affine(e) is None for e in reads) else ()
    if not 0 < len(patterns) <= _PATTERNS:
        return apart
    taken = [tuple((int(n), e) for n, e in zip(pattern, reads, strict=True) if n) for pattern in patterns]
    with contextlib.suppress(ValueError, OverflowError):
        return min(apart, max(steepest_together(terms) for terms in taken if terms))
    return apart  # some have a slope only where the node's entries are


def largest(signal: Signal) -> float:
    """What a signal's entries are at most, in absolute value; infinity where that is not known."""
    most = signal.node.most
    if most < math.inf and signal.index is not None and np.any(signal.index < 0):
        most = math.inf  # constants of any size
    if most == math.inf and affine(signal.expr) not in (None, (0, 0)):
        return math.inf
    return most if signal.expr == X else largest_value(signal.expr, most)


def bend(signal: Signal) -> float:
    """Lipschitz constant of the slope of a signal's scalar function."""
    return 0.0 if affine(signal.expr) is not None else of_one_number(signal, most_bent, "curvature", SMOOTH)
