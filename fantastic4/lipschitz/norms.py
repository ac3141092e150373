"""Euclidean norms of entries, and what is divided by them, recognised by what the pieces compute."""

from __future__ import annotations

import dataclasses
import math
import sys
from fractions import Fraction

from fantastic4.expression import Expr, X, affine, const, multiple_of, parts, substitute
from fantastic4.lipschitz.fixed import Confined, Fixed
from fantastic4.lipschitz.graph import Label, Signal, whole
from fantastic4.lipschitz.means import same, squared
from fantastic4.lipschitz.moves import reshaped
from fantastic4.lipschitz.patterns import spread_of, summed
from fantastic4.values import VANISHES

_UP = 1 + 1e-14


@dataclasses.dataclass(eq=False)
class Norm(Fixed):
    """√(a Σ u² + b) over axes, with a > 0 and b ≥ 0: its gradient a u / √(a Σ u² + b) is no longer than √a.

    Attributes:
      of: u.
      axes: which.
      share: √a, not rounded up.
    """

    of: Signal | None = None
    axes: tuple[int, ...] = ()
    share: float = 0.0


def _float(number: Fraction) -> float:
    """Of a number that is not negative; the largest float where it is larger than that."""
    try:
        return float(number)
    except OverflowError:
        return sys.float_info.max


def _root(number: Fraction) -> float:
    """√number, of one that may be no float itself."""
    half = (number.numerator.bit_length() - number.denominator.bit_length()) // 2
    return _float(Fraction(math.sqrt(number / Fraction(4) ** half)) * Fraction(2) ** half)


def _without_floor(expr: Expr) -> Expr:
    """An expression of a sum of squares, without what keeps rounding from making it negative."""
    if expr.op == "max":
        for number, other in (expr.args, expr.args[::-1]):
            straight = affine(other)
            if number.op == "const" and number.number <= 0 and straight is not None and min(straight) >= 0:
                return other
    return dataclasses.replace(expr, args=tuple(map(_without_floor, expr.args)))


def norm(signal: Signal, label: Label) -> Signal | None:
    """The root of a signal, where that is a sum of squares, times a number, plus one that is not negative.

    Or the larger of that and a number: √max(s, c) is max(√s, √c).
    """
    if signal.expr.op == "max":
        for number, other in (signal.expr.args, signal.expr.args[::-1]):
            if number.op == "const" and number.number >= 0:
                root = norm(dataclasses.replace(signal, expr=other), label)
                if root is None:
                    return None
                floor = math.sqrt(number.number) if number.number >= VANISHES else 0.0
                return dataclasses.replace(root, expr=Expr("max", (root.expr, const(floor))))
        return None
    node, straight, found = signal.node, affine(_without_floor(signal.expr)), summed(signal.node)
    if found is None or straight is None:
        return None
    (inner, axes), (a, b) = found, straight
    base = squared(inner.expr)
    if base is None or a <= 0 or b < 0:
        return None
    of = dataclasses.replace(inner, expr=base)
    least = _root(b) * (1 - 1e-15) if b >= VANISHES else 0.0
    factor = max(_root(a) * _UP, sys.float_info.min)
    if factor >= sys.float_info.max:
        return None
    name = dataclasses.replace(label, operation="norm")
    root_of_all = Norm(name, node.shape, (of,), factor, of=of, axes=axes, least=least, share=_root(a) * (1 - 1e-14))
    return dataclasses.replace(signal, node=root_of_all, expr=X, label=name)


def _steepness(expr: Expr) -> float:
    """P, of what `_smallest` knows."""
    if expr.op == "max":
        return max(map(_steepness, expr.args))
    straight = affine(expr)
    return 0.0 if straight is None else _float(straight[0]) * (1 - 1e-15)


def _smallest(expr: Expr, least: float) -> float | None:
    """The smallest value, where an expression of a norm is p x + q with p > 0 and q ≥ 0, or that or a larger number."""
    if expr.op == "max":
        sides = [(affine(side), side) for side in expr.args]
        numbers = [float(straight[1]) for straight, _ in sides if straight is not None and straight[0] == 0]
        others = [_smallest(side, least) for straight, side in sides if straight is None or straight[0] != 0]
        if len(numbers) == 1 and others[0] is not None:
            return max(numbers[0], others[0])
        return None
    straight = affine(expr)
    if straight is None or straight[0] <= 0 or straight[1] < 0:
        return None
    return _float(straight[0] * Fraction(least) + straight[1]) * (1 - 1e-15)


def normalised(top: Signal, bottom: Signal, label: Label) -> Signal | None:
    """The quotient u / g with g = p √(a Σ u² + b) + q, or the larger of that and a number: 1 over the smallest g.

    The Jacobian I / g - (p a / (s g²)) u uᵀ, with s the root, has the eigenvalues 1/g and (p b + q s) / (s g²), which
    lies between 0 and 1/g. And ‖u‖ / g ≤ 1 / (p √a).
    """
    node, shape = bottom.node, top.shape
    if not isinstance(node, Norm) or node.of is None or math.prod(shape) != math.prod(node.of.shape):
        return None
    top, bottom = reshaped(top, node.of.shape), reshaped(bottom, node.of.shape)
    times = X
    if top.expr.op == "mul" and top.expr.args[0].op == "const" and top.expr.args[1] == node.of.expr:
        top, times = dataclasses.replace(top, expr=node.of.expr), Expr("mul", (top.expr.args[0], X))
    smallest = _smallest(bottom.expr, node.least)
    if smallest is None or smallest < VANISHES:
        return None
    if not same(top, node.of) or not spread_of(bottom, top.shape, node.axes):
        return None
    name = dataclasses.replace(label, operation="normalise")
    share = _steepness(bottom.expr) * node.share
    radius = _UP / share if share >= VANISHES else math.inf
    found = Confined(name, top.shape, (top,), _UP / smallest, most=radius, axes=node.axes, radius=radius)
    return reshaped(dataclasses.replace(whole(found), expr=times), shape)


def _reciprocal(expr: Expr) -> tuple[Expr, Expr] | None:
    """Of a number times 1 / e the number times X, and e."""
    for part in parts(expr):
        if part.op == "div" and part.args[0].op == "const" and multiple_of(expr, part) is not None:
            return substitute(expr, part, Expr("mul", (part.args[0], X))), part.args[1]
    return None


def normalised_product(a: Signal, b: Signal, label: Label) -> Signal | None:
    """The product u · (c / g) with a number c."""
    for top, bottom in ((a, b), (b, a)):
        taken_apart = _reciprocal(bottom.expr)
        if taken_apart is not None:
            outer, divisor = taken_apart
            found = normalised(top, dataclasses.replace(bottom, expr=divisor), label)
            if found is not None:
                return dataclasses.replace(found, expr=substitute(outer, X, found.expr))
    return None
