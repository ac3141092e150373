r"""How steep and how bent a function of one number can be far out: envelopes Σ C tⁿ e^(-at) with t = |x| ≥ B.

On an unbounded interval x · tanh'(x) is 0 · ∞; with envelopes it is t · 4 e^(-2t), which has a largest value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fantastic4.expression import UNARY, Expr
from fantastic4.jets import QUARTER, Interval, jet
from fantastic4.rounding import TINY, times_up

BORDER = 40.0
"""B: beyond it exponentials are below 1e-17."""

Terms = tuple[tuple[float, float, float], ...]


class Tail(NamedTuple):
    """What bounds a function for t ≥ B, where x = t or x = -t; None: nothing finite is known.

    Attributes:
      value: Σ C tⁿ e^(-at) ≥ |f|.
      slope: the same for |f'|.
      bend: for |f''|.
      least: (m, k) with |f| ≥ m tᵏ; m may be 0.
      range: an interval of its values.
    """

    value: Terms | None
    slope: Terms | None
    bend: Terms | None
    least: tuple[float, float]
    range: Interval


_NONE = (0.0, 0.0)


def _collected(terms: Iterable[tuple[float, float, float]]) -> Terms:
    """Terms of one power and one rate added up, a little up: those of a 300th power would be 90,000."""
    sums: dict[tuple[float, float], float] = {}
    for c, n, a in terms:
        sums[n, a] = (sums[n, a] + c) * (1 + 1e-15) if (n, a) in sums else c
    return tuple((c, n, a) for (n, a), c in sums.items())


def _add(*terms: Terms | None) -> Terms | None:
    return None if any(t is None for t in terms) else _collected(x for t in terms for x in t or ())


def _mul(*factors: Terms | None) -> Terms | None:
    if () in factors:
        return ()
    result: Terms = ((1.0, 0.0, 0.0),)
    for terms in factors:
        if terms is None:
            return None
        result = _collected((times_up(c, d), n + m, a + b) for c, n, a in result for d, m, b in terms)
    return result


def _term(factor: float, power: float = 0.0, rate: float = 0.0) -> Terms | None:
    """C tⁿ e^(-at), with C a little up."""
    return ((factor * (1 + 1e-12), power, rate * (1 - 1e-12)),) if math.isfinite(factor) else None


def _power_of(p: tuple[float, float], exponent: float) -> Terms | None:
    """An envelope of |p|^exponent, for an exponent below 0, from |p| ≥ m tᵏ."""
    return _term(max(p[0] ** exponent, TINY), p[1] * exponent) if p[0] > 0 else None


def _rate(least: tuple[float, float], times: int = 1) -> float:
    """A with |p|^times ≥ a t for t ≥ B."""
    m, k = least
    return m**times * BORDER ** (k * times - 1) if k * times >= 1 else 0.0


def _tail_unary(op: str, p: Tail) -> tuple[Terms | None, Terms | None, Terms | None]:
    """Envelopes of |h|, |h'| and |h''| at p."""
    low, high = float(p.range.lo), float(p.range.hi)
    one = _term(1.0)
    if op in ("neg", "abs"):
        return p.value, one, (None if op == "abs" and low < 0 < high else ())
    if op in ("exp", "expm1"):
        if high <= 0:
            decay = _term(1.0, 0.0, _rate(p.least))
            return (decay if op == "exp" else one), decay, decay
        size = _term(math.exp(high) if high < 700 else math.inf)
        return size, size, size
    if op in ("log", "log1p"):
        least = low if op == "log" else low + 1
        if least <= 0:
            return None, None, None
        inverse = _power_of(p.least, -1.0) if low > 0 else None  # 1/(1 + p) < 1/p
        inverse = _term(1 / least) if inverse is None else inverse
        return _add(p.value, _term(abs(math.log(least)) + 1)), inverse, _mul(inverse, inverse)
    if op == "tanh":
        rate = 2 * _rate(p.least)
        return one, _term(4.0, 0.0, rate), _term(8.0, 0.0, rate)
    if op == "logistic":
        decay = _term(1.0, 0.0, _rate(p.least))
        return (decay if high <= 0 else one), decay, decay
    if op in ("erf", "erfc"):
        # 2|p| e^(-p²) ≤ 2 e^(-p²/2), since |p| e^(-p²/2) < 1.
        rate = _rate(p.least, 2)
        return (one if op == "erf" else _term(2.0)), _term(1.13, 0.0, rate), _term(2.26, 0.0, rate / 2)
    if op == "sqrt":
        if low <= 0:
            return None, None, None
        slope, bend = _power_of(p.least, -0.5), _power_of(p.least, -1.5)
        return _add(p.value, one), _mul(slope, _term(0.5)), _mul(bend, _term(0.25))
    if op == "atan":
        slope, bend = _power_of(p.least, -2.0), _mul(_power_of(p.least, -3.0), _term(2.0))
        return _term(QUARTER), slope or one, bend or one
    if op == "asinh":
        return p.value, _power_of(p.least, -1.0) or one, _power_of(p.least, -2.0) or one
    return one, one, one  # sin, cos


def tail(expr: Expr, sign: float) -> Tail:
    """Envelopes for x = sign · t, t ≥ B."""
    ends = (np.array(BORDER), np.array(np.inf))
    span = jet(expr, Interval(*ends) if sign > 0 else Interval(-ends[1], -ends[0])).value
    if expr.op == "x":
        return Tail(_term(1.0, 1.0), _term(1.0), (), (1.0, 1.0), span)
    if expr.op == "const":
        size = abs(expr.number)
        return Tail(_term(size) if size else (), (), (), (size, 0.0), span)
    args = [tail(arg, sign) for arg in expr.args]
    if expr.op in UNARY:
        (p,) = args
        value, first, second = _tail_unary(expr.op, p)
        bend = _add(_mul(second, p.slope, p.slope), _mul(first, p.bend))
        least = p.least if expr.op in ("neg", "abs") else _NONE
        if expr.op == "sqrt" and p.range.lo >= 0:
            least = (math.sqrt(p.least[0]) * (1 - 1e-12), p.least[1] / 2)
        return Tail(value, _mul(first, p.slope), bend, least, span)
    if expr.op == "power":
        result = args[0]
        for _ in range(int(expr.number) - 1):
            result = _tail_times(result, args[0])
        return result._replace(range=span)
    if expr.op == "select":
        a, b, left, right = args
        if a.range.lo >= b.range.hi:  # also where both are one number: then a < b does not hold
            return right
        return left if a.range.hi <= b.range.lo else _tail_either(left, right, span)
    left, right = args
    if expr.op in ("add", "sub"):
        least = _least_of_sum(left, right, expr.op == "sub")
        value, slope, bend = (_add(a, b) for a, b in zip(left[:3], right[:3], strict=True))
        return Tail(value, slope, bend, least, span)
    if expr.op == "mul":
        return _tail_times(left, right)._replace(range=span)
    if expr.op == "div":
        value = _power_of(right.least, -1.0)
        square, cube = _power_of(right.least, -2.0), _power_of(right.least, -3.0)
        bend = _add(_mul(cube, right.slope, right.slope, _term(2.0)), _mul(square, right.bend))
        least = (1 / max(float(right.range.largest()), TINY) * (1 - 1e-12), 0.0)  # 0 of what is not bounded
        return _tail_times(left, Tail(value, _mul(square, right.slope), bend, least, span))._replace(range=span)
    larger, smaller = (left, right) if expr.op == "max" else (right, left)
    if larger.range.lo >= smaller.range.hi:
        return left
    return right if larger.range.hi <= smaller.range.lo else _tail_either(left, right, span)


def _tail_either(left: Tail, right: Tail, span: Interval) -> Tail:
    """Both, added up; where they change over is not known, so neither is what f'' does there."""
    return Tail(_add(left.value, right.value), _add(left.slope, right.slope), None, _NONE, span)


def _tail_times(left: Tail, right: Tail) -> Tail:
    slope = _add(_mul(left.slope, right.value), _mul(left.value, right.slope))
    cross = _mul(left.slope, right.slope, _term(2.0))
    bend = _add(_mul(left.bend, right.value), cross, _mul(left.value, right.bend))
    least = (left.least[0] * right.least[0] * (1 - 1e-12), left.least[1] + right.least[1])
    return Tail(_mul(left.value, right.value), slope, bend, least, left.range)


def _least_of_sum(left: Tail, right: Tail, minus: bool) -> tuple[float, float]:
    """(m, k) of a sum whose parts do not cancel, or of which one is far larger."""
    other = -right.range if minus else right.range
    if (left.range.lo >= 0 and other.lo >= 0) or (left.range.hi <= 0 and other.hi <= 0):
        (m, k), (n, j) = left.least, right.least
        return ((m + n) * (1 - 1e-12), k) if k == j else max((left.least, right.least), key=lambda p: (p[0] > 0, p[1]))
    for p, q in ((left, right), (right, left)):
        (m, k), size = p.least, float(q.range.largest())
        if math.isfinite(size):
            return max(0.0, m - size * BORDER**-k * (1 + 1e-12)) * (1 - 1e-12), k
        # Σ C tⁿ is at most Σ C Bⁿ⁻ᵏ tᵏ, where no n is above k.
        if m > 0 and q.value is not None and all(n <= k and rate >= 0 for _, n, rate in q.value):
            less = sum(c * BORDER ** (n - k) for c, n, _ in q.value) * (1 + 1e-9)
            if less < m:
                return (m - less) * (1 - 1e-12), k
    return _NONE


def sup(terms: Terms | None) -> float:
    """The largest value of Σ C tⁿ e^(-at) for t ≥ B."""
    if terms is None:
        return math.inf
    total = 0.0
    for c, n, a in terms:
        if c == 0:
            continue
        if a <= 0:
            if n > 0:
                return math.inf
            total += times_up(c, BORDER**n, 1 + 1e-9 * (n != 0))
        else:
            t = max(BORDER, n / a)
            total += times_up(c, max(math.exp(n * math.log(t) - a * t), TINY), 1 + 1e-9)
    return total * (1 + 1e-12)


def integral(terms: Terms | None) -> float:
    """∫ Σ C tⁿ e^(-at) dt over t ≥ B, from above.

    That of tⁿ e^(-at) is at most Bⁿ e^(-aB) / (a - n/B) where a B > n: its logarithm falls at least so fast.
    """
    total = 0.0
    for factor, power, rate in terms if terms is not None else ((math.inf, 0.0, 0.0),):
        falls = rate - max(power, 0.0) / BORDER
        if not factor:
            continue
        if falls <= 0:
            return math.inf
        total += times_up(factor, BORDER**power, max(math.exp(-rate * BORDER), TINY), 1 / falls)
    return total
