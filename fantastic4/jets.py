"""What a function of one number does on intervals: f, f' and f'' between two floats each, rounded outwards.

NumPy in float64, on the host. One-sided at kinks: an interval that ends where an absolute value, a maximum or a
selection changes over knows one side only. That is so where the place is known (`expression.kinks`), for whoever looks
at f'' must look there; where it is not, an interval that touches it knows both sides, and nothing of f''.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fantastic4.expression import UNARY, Expr, has_known_kink


class Interval(NamedTuple):
    """Intervals, arrays of one shape.

    Attributes:
      lo: lower ends.
      hi: upper ends.
    """

    lo: np.ndarray
    hi: np.ndarray

    def __neg__(self) -> Interval:
        """Mirrored."""
        return Interval(-self.hi, -self.lo)

    def plus(self, other: Interval) -> Interval:
        """Sum, rounded outwards where it is rounded at all: at a kink 0 must stay 0."""
        lo, hi = self.lo + other.lo, self.hi + other.hi
        low = np.where(_sum_is_exact(self.lo, other.lo, lo), lo, np.nextafter(lo, -np.inf))
        return _finite(low, np.where(_sum_is_exact(self.hi, other.hi, hi), hi, np.nextafter(hi, np.inf)))

    def times(self, other: Interval) -> Interval:
        """Product; 0 · ∞ may be anything."""
        ends = [(a * b, (a == 0) | (b == 0) | (np.abs(a) == 1) | (np.abs(b) == 1)) for a in self for b in other]
        low = np.minimum.reduce([np.where(exact, e, np.nextafter(e, -np.inf)) for e, exact in ends])
        return _finite(low, np.maximum.reduce([np.where(exact, e, np.nextafter(e, np.inf)) for e, exact in ends]))

    def times_power(self, power: float) -> Interval:
        """Product with a power of two: exact, but for what nearly vanishes; at a kink it must be."""
        ends = (self.lo * power, self.hi * power) if power > 0 else (self.hi * power, self.lo * power)
        near = [np.abs(end) < 1e-290 for end in ends]
        low, high = (
            np.where(near[0], np.nextafter(ends[0], -np.inf), ends[0]),
            np.where(near[1], np.nextafter(ends[1], np.inf), ends[1]),
        )
        zero = [end == 0 for end in (self if power > 0 else self[::-1])]
        return _finite(np.where(zero[0], 0.0, low), np.where(zero[1], 0.0, high))

    def hull(self, other: Interval) -> Interval:
        """Both."""
        return Interval(np.minimum(self.lo, other.lo), np.maximum(self.hi, other.hi))

    def square(self) -> Interval:
        """Its square, which is not negative."""
        small = np.where((self.lo <= 0) & (self.hi >= 0), 0.0, np.minimum(self.lo**2, self.hi**2))
        result = _out(small, np.maximum(self.lo**2, self.hi**2))
        return Interval(np.maximum(result.lo, 0.0), result.hi)

    def where(self, mask: np.ndarray, other: Interval) -> Interval:
        """This where ``mask``, the other elsewhere."""
        return Interval(np.where(mask, self.lo, other.lo), np.where(mask, self.hi, other.hi))

    def largest(self) -> np.ndarray:
        """The largest size of a number in it."""
        return np.maximum(np.abs(self.lo), np.abs(self.hi))

    def smallest(self) -> np.ndarray:
        """The smallest size of a number in it."""
        inside = (self.lo <= 0) & (self.hi >= 0)
        return np.where(inside, 0.0, np.minimum(np.abs(self.lo), np.abs(self.hi)))


def _sum_is_exact(a: np.ndarray, b: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Whether s = a + b without rounding: Knuth's TwoSum has no remainder."""
    rest = s - a
    return (a - (s - rest)) + (b - rest) == 0


def _finite(lo: np.ndarray, hi: np.ndarray) -> Interval:
    """What is not a number is everything."""
    return Interval(np.where(np.isnan(lo), -np.inf, lo), np.where(np.isnan(hi), np.inf, hi))


def _out(lo: np.ndarray, hi: np.ndarray, units: int = 1) -> Interval:
    """Outwards by some units in the last place."""
    for _ in range(units):
        lo, hi = np.nextafter(lo, -np.inf), np.nextafter(hi, np.inf)
    return _finite(lo, hi)


def _same(number: float, like: np.ndarray) -> Interval:
    full = np.full_like(like, number)
    return Interval(full, full)


class Jet(NamedTuple):
    """What a function does on intervals.

    Attributes:
      value: f.
      slope: f', one-sided at a kink that is an end of the interval.
      bend: f'', likewise.
    """

    value: Interval
    slope: Interval
    bend: Interval


_ERF = np.vectorize(math.erf, otypes=[float])
QUARTER = math.nextafter(math.pi / 2, 2)
"""Of a turn: no less than π/2."""
_LOOSE = 8  # units by which the C library's functions may be off, generously


def _monotone(function: Callable[[np.ndarray], np.ndarray], p: Interval) -> Interval:
    return _out(function(p.lo), function(p.hi), _LOOSE)


def _clamped(p: Interval, lo: float, hi: float) -> Interval:
    return Interval(np.clip(p.lo, lo, hi), np.clip(p.hi, lo, hi))


def _logistic(x: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def _reciprocal(p: Interval) -> Interval:
    """Of positive intervals; everything where it may not be positive."""
    good = p.lo > 0
    safe = np.where(good, p.lo, 1.0)
    return _out(1 / np.where(good, p.hi, 1.0), 1 / safe).where(good, _same(-np.inf, p.lo).hull(_same(np.inf, p.lo)))


def _wave(p: Interval, quarter: int) -> Interval:
    """sin(p + quarter · π/2)."""
    function, sign = (np.sin, np.cos)[quarter % 2], 1 - (quarter // 2 % 2) * 2
    ends = sign * function(p.lo), sign * function(p.hi)
    between = _clamped(_out(np.minimum(*ends), np.maximum(*ends), _LOOSE), -1, 1)
    # In turns, off by some units: there a wave is so near its extreme that no float tells.
    lo, hi = (end / (2 * math.pi) + quarter / 4 for end in p)
    off = 1e-9 + 1e-15 * p.largest()
    has = lambda turn: np.floor(hi - turn + off) >= np.ceil(lo - turn - off)  # noqa: E731
    unknown = ~np.isfinite(p.lo) | ~np.isfinite(p.hi)
    lowest, highest = has(0.75) | unknown, has(0.25) | unknown
    return Interval(np.where(lowest, -1.0, between.lo), np.where(highest, 1.0, between.hi))


def _unary(op: str, p: Interval) -> tuple[Interval, Interval, Interval]:
    """h, h' and h'' on intervals."""
    one, zero = _same(1.0, p.lo), _same(0.0, p.lo)
    if op == "neg":
        return -p, -one, zero
    if op in ("exp", "expm1"):
        power = _monotone(np.exp, p)
        power = Interval(np.maximum(power.lo, 0.0), power.hi)
        return (power if op == "exp" else _monotone(np.expm1, p)), power, power
    if op in ("log", "log1p"):
        shifted = p if op == "log" else p.plus(one)
        inverse = _reciprocal(shifted)
        good = shifted.lo > 0
        function = np.log if op == "log" else np.log1p
        inside = Interval(np.where(good, p.lo, 1.0), np.where(good, p.hi, 1.0))
        value = _monotone(function, inside).where(good, _same(-np.inf, p.lo).hull(_same(np.inf, p.lo)))
        return value, inverse, -inverse.square()
    if op == "tanh":
        value = _clamped(_monotone(np.tanh, p), -1, 1)
        slope = one.plus(-value.square())
        slope = _clamped(slope, 0, 1)
        return value, slope, _same(-2.0, p.lo).times(value).times(slope)
    if op == "logistic":
        value = _clamped(_monotone(_logistic, p), 0, 1)
        slope = _clamped(_same(0.25, p.lo).plus(-value.plus(_same(-0.5, p.lo)).square()), 0, 0.25)
        return value, slope, slope.times(one.plus(_same(-2.0, p.lo).times(value)))
    if op in ("erf", "erfc"):
        gauss = _monotone(np.exp, -p.square()).times(_same(2 / math.sqrt(math.pi), p.lo))
        gauss = _clamped(gauss, 0, 1.13)
        bend = _same(-2.0, p.lo).times(p).times(gauss)
        value = _clamped(_monotone(_ERF, p), -1, 1)
        if op == "erf":
            return value, gauss, bend
        return one.plus(-value), -gauss, -bend
    if op == "sqrt":
        good = p.lo > 0
        root = _monotone(np.sqrt, Interval(np.where(good, p.lo, 1.0), np.where(good, p.hi, 1.0)))
        everything = _same(-np.inf, p.lo).hull(_same(np.inf, p.lo))
        inverse = _reciprocal(root)
        slope = inverse.times(_same(0.5, p.lo))
        bend = -inverse.times(inverse).times(inverse).times(_same(0.25, p.lo))
        return root.where(good, everything), slope.where(good, everything), bend.where(good, everything)
    if op in ("atan", "asinh"):
        below = one.plus(p.square())
        value, size = _monotone(np.arctan if op == "atan" else np.arcsinh, p), p.largest()
        if op == "atan":
            inverse = _clamped(_reciprocal(below), 0, 1)
            bend = _same(-2.0, p.lo).times(p).times(inverse.square())
            return _clamped(value, -QUARTER, QUARTER), inverse, _clamped(bend, -0.65, 0.65)
        slope = _clamped(_reciprocal(_monotone(np.sqrt, below)), 0, 1)
        bend = -p.times(slope.times(slope.square()))
        return Interval(np.maximum(value.lo, -size), np.minimum(value.hi, size)), slope, _clamped(bend, -0.385, 0.385)
    quarter = {"sin": 0, "cos": 1}[op]
    return _wave(p, quarter), _wave(p, quarter + 1), _wave(p, quarter + 2)


def _chain(op: str, p: Jet) -> Jet:
    value, first, second = _unary(op, p.value)
    bend = second.times(p.slope.square()).plus(first.times(p.bend))
    straight = (p.slope.lo == 0) & (p.slope.hi == 0) & (p.bend.lo == 0) & (p.bend.hi == 0)
    straight &= np.isfinite(value.lo) & np.isfinite(value.hi)
    nothing = _same(0.0, value.lo)  # a constant: not 0 · ∞
    return Jet(value, nothing.where(straight, first.times(p.slope)), nothing.where(straight, bend))


def _pick(mask_left: np.ndarray, mask_right: np.ndarray, left: Jet, right: Jet) -> Jet:
    """Left, right, or where neither is known both, with a kink."""
    known = mask_left | mask_right
    parts = []
    for a, b in zip(left, right, strict=True):
        parts.append(a.where(mask_left, b.where(mask_right, a.hull(b))))
    anything = _same(-np.inf, parts[0].lo).hull(_same(np.inf, parts[0].lo))
    return Jet(parts[0], parts[1], parts[2].where(known, anything))


def jet(expr: Expr, x: Interval) -> Jet:
    """f, f' and f'' on every interval of ``x``."""
    zero = _same(0.0, x.lo)
    if expr.op == "x":
        return Jet(x, _same(1.0, x.lo), zero)
    if expr.op == "const":
        return Jet(_same(expr.number, x.lo), zero, zero)
    args = [jet(arg, x) for arg in expr.args]
    over = np.greater_equal if has_known_kink(expr) else np.greater
    if expr.op == "abs":
        (p,) = args
        chosen = _pick(over(p.value.lo, 0), over(0, p.value.hi), p, Jet(*(-part for part in p)))
        return chosen._replace(value=Interval(p.value.smallest(), p.value.largest()))
    if expr.op in UNARY:
        return _chain(expr.op, args[0])
    if expr.op == "power":
        (base,) = args
        result = base
        for _ in range(int(expr.number) - 1):
            result = _times(result, base)
        return result if expr.number % 2 else _not_negative(result)
    if expr.op == "select":
        a, b, left, right = args
        right_known = a.value.lo >= b.value.hi  # also where both are one number: then a < b does not hold
        return _pick((a.value.hi <= b.value.lo) & ~right_known, right_known, left, right)
    left, right = args
    if expr.op == "add":
        return Jet(*(a.plus(b) for a, b in zip(left, right, strict=True)))
    if expr.op == "sub":
        return Jet(*(a.plus(-b) for a, b in zip(left, right, strict=True)))
    power = _power_of_two(expr)
    if power is not None:
        return Jet(*(part.times_power(power) for part in (right if expr.args[0].op == "const" else left)))
    if expr.op == "mul":
        product = _times(left, right)
        return _not_negative(product) if expr.args[0] == expr.args[1] else product
    if expr.op == "div":
        return _times(left, _inverse(right))
    bigger, smaller = over(left.value.lo, right.value.hi), over(right.value.lo, left.value.hi)
    chosen = _pick(bigger, smaller, left, right) if expr.op == "max" else _pick(smaller, bigger, left, right)
    function = np.maximum if expr.op == "max" else np.minimum
    return chosen._replace(value=Interval(*(function(a, b) for a, b in zip(left.value, right.value, strict=True))))


def _power_of_two(expr: Expr) -> float | None:
    """The power of two, or its negative, that a product or a quotient multiplies by; None for all others."""
    place = next((i for i, arg in enumerate(expr.args) if arg.op == "const"), None)
    if expr.op not in ("mul", "div") or place is None or (expr.op == "div" and place == 0):
        return None
    number = expr.args[place].number
    if math.frexp(number)[0] not in (0.5, -0.5) or not 1e-100 < abs(number) < 1e100:
        return None
    return 1 / number if expr.op == "div" else number


def _not_negative(p: Jet) -> Jet:
    return p._replace(value=Interval(np.maximum(p.value.lo, 0.0), p.value.hi))


def _times(left: Jet, right: Jet) -> Jet:
    slope = left.slope.times(right.value).plus(left.value.times(right.slope))
    cross = left.slope.times(right.slope)
    bend = left.bend.times(right.value).plus(cross).plus(cross).plus(left.value.times(right.bend))
    return Jet(left.value.times(right.value), slope, bend)


def _inverse(p: Jet) -> Jet:
    """1 / p, for p of one sign."""
    negative = p.value.hi < 0
    size = (-p.value).where(negative, p.value)
    inverse = _reciprocal(size)
    inverse = (-inverse).where(negative, inverse)
    square = inverse.square()
    first = -square.times(p.slope)
    cubed = square.times(inverse)
    bend = cubed.times(p.slope.square()).times(_same(2.0, inverse.lo)).plus(-square.times(p.bend))
    return Jet(inverse, first, bend)
