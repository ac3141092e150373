"""Entries less their mean, and their variance, recognised by what the pieces compute."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

from fantastic4.expression import Expr, X, affine, multiple_of, parts
from fantastic4.lipschitz.fixed import Fixed
from fantastic4.lipschitz.graph import Label, Signal, whole
from fantastic4.lipschitz.moves import reshaped
from fantastic4.lipschitz.patterns import spread_of, summed


@dataclasses.dataclass(eq=False)
class Centred(Fixed):
    """x - c Σ x over axes, in the shape in which it is summed: eigenvalues 1 and 1 - c n.

    Attributes:
      axes: which.
      share: c, 1/n of what is less its mean.
    """

    axes: tuple[int, ...] = ()
    share: Fraction = Fraction(0)


def _centred(source: Signal, axes: tuple[int, ...], share: Fraction, label: Label) -> Centred:
    count = math.prod(source.shape[a] for a in axes)
    turned = abs(1 - share * count)  # the other eigenvalue
    factor = max(1.0, math.nextafter(float(turned), math.inf)) if turned < 2**1000 else math.inf
    name = dataclasses.replace(label, operation="centre")
    return Centred(name, source.shape, (source,), factor, linear=True, axes=axes, share=share)


def same(a: Signal, b: Signal) -> bool:
    """Whether two signals are the same numbers in the same places: of one node, or of two that centre the same."""
    one, two = a.node, b.node
    if a.expr == b.expr and one is not two and isinstance(one, Centred) and isinstance(two, Centred):
        alike = (one.axes, one.share) == (two.axes, two.share) and same(one.inputs[0], two.inputs[0])
        return alike and a.same_entries(dataclasses.replace(b, node=one))
    return a.expr == b.expr and a.same_entries(b)


def centred(a: Signal, b: Signal, label: Label) -> Signal | None:
    """``x - c Σ x`` over axes, as x minus its mean, whatever shape it is summed in."""
    found, straight = summed(b.node), affine(b.expr)
    if found is None or straight is None or math.prod(found[0].shape) != math.prod(a.shape):
        return None
    inner, axes = found
    if not same(reshaped(a, inner.shape), inner) or not spread_of(reshaped(b, inner.shape), inner.shape, axes):
        return None
    node: Fixed = _centred(inner, axes, straight[0], label)
    if straight[1]:  # and a constant more: it moves as much, but is not what it would be without
        node = Fixed(node.label, node.shape, node.inputs, node.factor, linear=True)
    return reshaped(whole(node), a.shape)


def squared(expr: Expr) -> Expr | None:
    """e, of e²."""
    if expr.op == "power" and expr.number == 2:
        return expr.args[0]
    return expr.args[0] if expr.op == "mul" and expr.args[0] == expr.args[1] else None


def _square_of_line(expr: Expr) -> Fraction | None:
    """C, of c x²: of (a x)², of x² over a number."""
    for part in parts(expr):
        root, times = squared(part), multiple_of(expr, part)
        line = None if root is None else affine(root)
        if line is not None and times is not None and not line[1]:
            return times * line[0] ** 2
    return None


def variance(a: Signal, b: Signal, label: Label) -> Signal | None:
    """``p Σ x² - c (Σ x)²`` with p = n c: p times the sum of squares of x less its mean."""
    squares, plain, taken = summed(a.node), summed(b.node), _square_of_line(b.expr)
    if squares is None or plain is None or taken is None or squares[1] != plain[1]:
        return None
    (of, axes), (inner, _) = squares, plain
    base, straight = squared(of.expr), affine(a.expr)
    if base is None or straight is None:
        return None
    if not same(dataclasses.replace(of, expr=base), inner) or not a.same_entries(dataclasses.replace(b, node=a.node)):
        return None
    count = math.prod(of.shape[x] for x in axes)
    if not straight[0] or straight[0] != count * taken:
        return None
    u = dataclasses.replace(whole(_centred(inner, axes, Fraction(1, count), label)), expr=Expr("power", (X,), 2.0))
    total = dataclasses.replace(a.node, inputs=(u,))
    return dataclasses.replace(a, node=total, label=label)
