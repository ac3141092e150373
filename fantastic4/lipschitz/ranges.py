"""Scalar functions where only the running program knows between which numbers their argument lies.

As the square of a layer of what is normalised: it has no slope on the whole line, and one where its argument is, whose
size comes from the kernel. Values, slopes and bends by interval arithmetic, everything rounded outward.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fantastic4.expression import Expr, X
from fantastic4.lipschitz.fixed import Fixed
from fantastic4.lipschitz.graph import Node, Signal, UnboundedError, reachable, whole
from fantastic4.lipschitz.numbers import slope
from fantastic4.lipschitz.operands import at_once, is_known
from fantastic4.lipschitz.propagation import size
from fantastic4.lipschitz.trace import Walk
from fantastic4.rounding import product_up, round_up, unit_roundoff
from fantastic4.scalar import check_continuous

_FEW, _MANY = 2, 64  # roundings of an operation; of a function, as accelerators compute it


def held(walk: Walk, outputs: Sequence[Signal]) -> list[Signal]:
    """The outputs of a walk, with functions that have no slope on the whole line held to where their argument is."""
    plain: dict[int, Signal] = {}
    for made in walk.made.values():
        if made.signal.plain and math.prod(made.signal.shape) == math.prod(made.signal.node.shape):
            plain.setdefault(id(made.signal.node), made.signal)
    known: dict[tuple[int, Expr], Node | None] = {}

    def hold(signal: Signal) -> Signal:
        key = id(signal.node), signal.expr
        if key not in known:
            known[key] = _held(walk, signal, plain.get(id(signal.node)))
        node = known[key]
        return signal if node is None else dataclasses.replace(signal, node=node, expr=X)

    for node in reachable(outputs):
        node.inputs = tuple(map(hold, node.inputs))
    return [hold(signal) for signal in outputs]


def _held(walk: Walk, signal: Signal, argument: Signal | None) -> Node | None:
    """What a function makes of all entries of a signal's node; None where it has a slope, or none that is known."""
    try:
        slope(signal)
        return None
    except UnboundedError:
        found = None if argument is None else size(walk, argument)
    try:
        check_continuous(signal.expr)
    except (ValueError, OverflowError):
        return None
    if found is None:
        return None
    with at_once(found.entries):
        most = found.most
        there = range_of(signal.expr, most)
        if there is None:
            return None
        # Of numbers that are too large for floats it is not known.
        factor, bend = (jnp.where(jnp.isnan(x) & ~jnp.isnan(most), jnp.inf, x) for x in (there.slope, there.bend))
        if is_known(factor) and jnp.isinf(factor):
            return None
        kink = is_known(bend) and jnp.isinf(bend)
    node = Fixed(signal.label, signal.node.shape, (whole(signal.node),), factor, bend=None if kink else bend)
    node.order = signal.node.order + 0.5  # before all that reads it
    return node


class Range(NamedTuple):
    """What is known of a function where its argument is.

    Attributes:
      low: of its values.
      high: of its values.
      slope: of the size of its derivative.
      bend: of that of its second derivative; infinite where it may have a kink.
    """

    low: Array
    high: Array
    slope: Array
    bend: Array

    @property
    def size(self) -> Array:
        """Of the values' size."""
        return jnp.maximum(-self.low, self.high)


@functools.partial(jax.jit, static_argnames="expr")
def range_of(expr: Expr, most: Array) -> Range | None:
    """Of x ↦ expr(x), which does not jump, for abs(x) at most ``most``; None for an operation not known here."""
    return _range(expr, most)


def _range(expr: Expr, most: Array) -> Range | None:
    if expr.op == "x":
        return Range(-most, most, jnp.ones_like(most), jnp.zeros_like(most))
    if expr.op == "const":
        number, none = jnp.asarray(expr.number, most.dtype), jnp.zeros_like(most)
        return Range(*_outward(number, number, _FEW), none, none)
    found = [_range(arg, most) for arg in expr.args]
    args = [arg for arg in found if arg is not None]
    if len(args) < len(found):
        return None
    if expr.op == "power":
        return _chained(args[0], _power(args[0], int(expr.number)))
    if expr.op in _UNARY:
        return _chained(args[0], _UNARY[expr.op](args[0]))
    if expr.op == "select":
        return _either(*args[2:])
    return _BINARY[expr.op](*args) if expr.op in _BINARY else None


def _outward(low: Array, high: Array, roundings: int) -> tuple[Array, Array]:
    off, tiny = 2 * (roundings + 2) * unit_roundoff(high.dtype), float(jnp.finfo(high.dtype).tiny)
    return low - (jnp.abs(low) * off + tiny), high + (jnp.abs(high) * off + tiny)


def _times(*factors: Array) -> Array:
    """A product of sizes, 0 where one is, beside infinity too."""
    none = functools.reduce(jnp.logical_or, [f == 0 for f in factors])
    return jnp.where(none, 0, product_up(*(jnp.where(none, 1, f) for f in factors)))


def _sum(*terms: Array) -> Array:
    return functools.reduce(lambda a, b: round_up(a + b, _FEW), terms)


def _chained(inner: Range, outer: Range) -> Range:
    """F after g, where ``outer`` has f's derivatives by its argument."""
    bend = _sum(_times(outer.slope, inner.bend), _times(outer.bend, inner.slope, inner.slope))
    return Range(outer.low, outer.high, _times(outer.slope, inner.slope), bend)


def _add(a: Range, b: Range) -> Range:
    return Range(*_outward(a.low + b.low, a.high + b.high, _FEW), _sum(a.slope, b.slope), _sum(a.bend, b.bend))


def _negative(a: Range) -> Range:
    return Range(-a.high, -a.low, a.slope, a.bend)


def _mul(a: Range, b: Range) -> Range:
    ends = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    low, high = _outward(functools.reduce(jnp.minimum, ends), functools.reduce(jnp.maximum, ends), _FEW)
    slope = _sum(_times(a.size, b.slope), _times(b.size, a.slope))
    twice = 2 * _times(a.slope, b.slope)
    return Range(low, high, slope, _sum(_times(a.size, b.bend), _times(b.size, a.bend), twice))


def _least(a: Range) -> Array:
    """What its values' size is at least."""
    return jnp.maximum(jnp.maximum(a.low, -a.high), 0)


def _over(least: Array) -> Array:
    """1 / least, infinite for 0, which has no derivative there."""
    there = least > 0
    over = round_up(1 / jnp.where(there, least, 1), 4)
    over = jnp.maximum(over, float(jnp.finfo(over.dtype).tiny))  # what vanishes is not 0
    return jnp.where(there, over, jnp.inf)


def _reciprocal(a: Range) -> Range:
    over = _over(_least(a))
    low, high = jnp.where(a.low > 0, 0, -over), jnp.where(a.high < 0, 0, over)
    second = _times(over, over)
    return _chained(a, Range(low, high, second, 2 * _times(second, over)))


def _larger(a: Range, b: Range) -> Range:
    bend = jnp.where(a.low >= b.high, a.bend, jnp.where(b.low >= a.high, b.bend, jnp.inf))
    return Range(jnp.maximum(a.low, b.low), jnp.maximum(a.high, b.high), jnp.maximum(a.slope, b.slope), bend)


def _either(a: Range, b: Range) -> Range:
    low, high = jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high)
    return Range(low, high, jnp.maximum(a.slope, b.slope), jnp.full_like(high, jnp.inf))


def _power(a: Range, n: int) -> Range:
    powers = [jnp.ones_like(a.high), a.size]
    for _ in range(n - 1):
        powers.append(_times(powers[-1], a.size))
    low = -powers[n] if n % 2 else jnp.zeros_like(a.low)
    second = n * (n - 1) * powers[n - 2] if n > 1 else jnp.zeros_like(a.high)
    return Range(low, powers[n], round_up(n * powers[n - 1], _FEW), round_up(second, _FEW))


def _absolute(a: Range) -> Range:
    return Range(_least(a), a.size, jnp.ones_like(a.high), jnp.where(_least(a) > 0, 0, jnp.inf))


def _exponential(a: Range) -> Range:
    low, high = _outward(jnp.exp(a.low), jnp.exp(a.high), _MANY)
    return Range(jnp.maximum(low, 0), high, high, high)


def _shifted(a: Range, by: float) -> Range:
    return a._replace(low=_outward(a.low + by, a.high, _FEW)[0], high=_outward(a.low, a.high + by, _FEW)[1])


def _logarithm(a: Range) -> Range:
    over = _over(_least(a)) + jnp.where(a.low > 0, 0, jnp.inf)
    inside = [jnp.where(end > 0, end, 1) for end in (a.low, a.high)]
    low, high = _outward(jnp.log(inside[0]), jnp.log(inside[1]), _MANY)
    return Range(jnp.where(a.low > 0, low, -jnp.inf), high, over, _times(over, over))


def _root(a: Range) -> Range:
    least = jnp.where(a.low > 0, a.low, 0)
    over, high = _over(least), round_up(jnp.sqrt(jnp.maximum(a.high, 0)), 4)
    half = 0.5 * round_up(jnp.sqrt(jnp.where(least > 0, over, 1)), 4)  # 1 / (2 √x), whose derivative is -1 / (4 x √x)
    half = jnp.where(least > 0, half, jnp.inf)
    return Range(jnp.zeros_like(high), high, half, _times(half, over))


def _rising(function: Callable[[Array], Array], slope: float, bend: float) -> Callable[[Range], Range]:
    """A function that never falls, with the largest size of its first and second derivatives."""

    def of(a: Range) -> Range:
        low, high = _outward(function(a.low), function(a.high), _MANY)
        return Range(low, high, jnp.full_like(high, slope * _UP), jnp.full_like(high, bend * _UP))

    return of


def _wave(a: Range) -> Range:
    one = jnp.ones_like(a.high)
    return Range(-one, one, one, one)


_UP = 1 + 1e-6
_UNARY: dict[str, Callable[[Range], Range]] = {
    "neg": lambda a: Range(-a.high, -a.low, jnp.ones_like(a.high), jnp.zeros_like(a.high)),
    "abs": _absolute,
    "exp": _exponential,
    "expm1": lambda a: _shifted(_exponential(a), -1),
    "log": _logarithm,
    "log1p": lambda a: _logarithm(_shifted(a, 1)),
    "sqrt": _root,
    "tanh": _rising(jnp.tanh, 1, 4 / math.sqrt(27)),
    "logistic": _rising(jax.nn.sigmoid, 1 / 4, math.sqrt(3) / 18),
    "erf": _rising(jax.scipy.special.erf, 2 / math.sqrt(math.pi), 4 / math.sqrt(2 * math.pi * math.e)),
    "atan": _rising(jnp.arctan, 1, math.sqrt(27) / 8),
    "asinh": _rising(jnp.arcsinh, 1, 2 / math.sqrt(27)),
    "sin": _wave,
    "cos": _wave,
}
_BINARY: dict[str, Callable[[Range, Range], Range]] = {
    "add": _add,
    "sub": lambda a, b: _add(a, _negative(b)),
    "mul": _mul,
    "div": lambda a, b: _mul(a, _reciprocal(b)),
    "max": _larger,
    "min": lambda a, b: _negative(_larger(_negative(a), _negative(b))),
}
