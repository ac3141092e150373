r"""How steep a function of one real number can be, and how bent: proved, for activations that arrive as operations.

A traced network does not say "GELU": it says x · ½ · (1 + erf(x/√2)). Read as an expression in one number x, such a
function has sup |f'| and sup |f''| that interval arithmetic finds to six digits: on [-B, B] by branch and bound with
derivatives carried along, beyond by envelopes Σ C tⁿ e^(-at) with t = |x| ≥ B. NumPy in float64, on the host; every
operation is rounded outwards.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_BORDER = 40.0  # B: beyond it exponentials are below 1e-17
_CELLS = 2048  # at first
_ROUNDS = 60
_ACCURACY = 1e-6
_MOST = 400_000  # cells at once

UNARY = ("neg", "abs", "exp", "expm1", "log", "log1p", "tanh", "logistic", "erf", "erfc", "sqrt", "sin", "cos")
BINARY = ("add", "sub", "mul", "div", "max", "min")
COMPARISONS = ("lt", "le", "gt", "ge")


@dataclasses.dataclass(frozen=True)
class Expr:
    """A function of one number x.

    Attributes:
      op: ``"x"``, ``"const"``, a name of `UNARY` or `BINARY`, ``"power"`` with a positive whole exponent, or
        ``"select"`` of (a, b, left, right): left where a < b, right elsewhere.
      args: what it is applied to.
      number: of ``"const"`` and ``"power"``.
    """

    op: str
    args: tuple[Expr, ...] = ()
    number: float = 0.0

    def __post_init__(self):
        count = {"x": 0, "const": 0, "power": 1, "select": 4} | dict.fromkeys(UNARY, 1) | dict.fromkeys(BINARY, 2)
        if self.op not in count or len(self.args) != count[self.op]:
            raise ValueError(f"no operation {self.op!r} of {len(self.args)} arguments")


X = Expr("x")


def const(number: float) -> Expr:
    """A number."""
    return Expr("const", (), float(number))


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
_ERFC = np.vectorize(math.erfc, otypes=[float])
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


def _wave(p: Interval, shift: float) -> Interval:
    """sin(p + shift π/2)."""
    lo, hi = p.lo / (math.pi / 2) + shift, p.hi / (math.pi / 2) + shift
    ends = np.sin(p.lo + shift * math.pi / 2), np.sin(p.hi + shift * math.pi / 2)
    slack = 1e-9 * (1 + p.largest())
    has = lambda turn: np.floor((hi - turn) / 4 + 1e-9) >= np.ceil((lo - turn) / 4 - 1e-9)  # noqa: E731
    low, high = np.minimum(*ends) - slack, np.maximum(*ends) + slack
    return Interval(np.where(has(3), -1.0, np.maximum(low, -1)), np.where(has(1), 1.0, np.minimum(high, 1)))


def _unary(op: str, p: Interval) -> tuple[Interval, Interval, Interval]:
    """h, h' and h'' on intervals."""
    one, zero = _same(1.0, p.lo), _same(0.0, p.lo)
    if op == "neg":
        return -p, -one, zero
    if op == "abs":
        value = Interval(p.smallest(), p.largest())
        sign = one.where(p.lo >= 0, (-one).where(p.hi <= 0, one.hull(-one)))
        smooth = (p.lo >= 0) | (p.hi <= 0)
        return value, sign, zero.where(smooth, _same(-np.inf, p.lo).hull(_same(np.inf, p.lo)))
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
    shift = {"sin": 0.0, "cos": 1.0}[op]
    return _wave(p, shift), _wave(p, shift + 1), _wave(p, shift + 2)


def _chain(op: str, p: Jet) -> Jet:
    value, first, second = _unary(op, p.value)
    bend = second.times(p.slope.square()).plus(first.times(p.bend))
    straight = (p.slope.lo == 0) & (p.slope.hi == 0) & (p.bend.lo == 0) & (p.bend.hi == 0)
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


def _jet(expr: Expr, x: Interval) -> Jet:
    """f, f' and f'' on every interval of ``x``."""
    zero = _same(0.0, x.lo)
    if expr.op == "x":
        return Jet(x, _same(1.0, x.lo), zero)
    if expr.op == "const":
        return Jet(_same(expr.number, x.lo), zero, zero)
    args = [_jet(arg, x) for arg in expr.args]
    if expr.op in UNARY:
        return _chain(expr.op, args[0])
    if expr.op == "power":
        (base,) = args
        result = base
        for _ in range(int(expr.number) - 1):
            result = _times(result, base)
        return result
    if expr.op == "select":
        a, b, left, right = args
        return _pick(a.value.hi <= b.value.lo, a.value.lo >= b.value.hi, left, right)
    left, right = args
    if expr.op == "add":
        return Jet(*(a.plus(b) for a, b in zip(left, right, strict=True)))
    if expr.op == "sub":
        return Jet(*(a.plus(-b) for a, b in zip(left, right, strict=True)))
    if expr.op == "mul":
        return _times(left, right)
    if expr.op == "div":
        return _times(left, _inverse(right))
    bigger, smaller = left.value.lo >= right.value.hi, left.value.hi <= right.value.lo
    chosen = _pick(bigger, smaller, left, right) if expr.op == "max" else _pick(smaller, bigger, left, right)
    function = np.maximum if expr.op == "max" else np.minimum
    return chosen._replace(value=Interval(*(function(a, b) for a, b in zip(left.value, right.value, strict=True))))


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


def _add(*terms: Terms | None) -> Terms | None:
    return None if any(t is None for t in terms) else tuple(x for t in terms for x in t or ())


def _mul(*factors: Terms | None) -> Terms | None:
    if () in factors:
        return ()
    result: Terms = ((1.0, 0.0, 0.0),)
    for terms in factors:
        if terms is None:
            return None
        result = tuple((c * d * (1 + 1e-15), n + m, a + b) for c, n, a in result for d, m, b in terms)
    return result


def _term(factor: float, power: float = 0.0, rate: float = 0.0) -> Terms | None:
    """C tⁿ e^(-at), with C a little up."""
    return ((factor * (1 + 1e-12), power, rate * (1 - 1e-12)),) if math.isfinite(factor) else None


def _power_of(p: tuple[float, float], exponent: float) -> Terms | None:
    """An envelope of |p|^exponent, for an exponent below 0, from |p| ≥ m tᵏ."""
    return _term(p[0] ** exponent, p[1] * exponent) if p[0] > 0 else None


def _rate(least: tuple[float, float], times: int = 1) -> float:
    """A with |p|^times ≥ a t for t ≥ B."""
    m, k = least
    return m**times * _BORDER ** (k * times - 1) if k * times >= 1 else 0.0


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
    return one, one, one  # sin, cos


def _tail(expr: Expr, sign: float) -> Tail:
    """Envelopes for x = sign · t, t ≥ B."""
    ends = (np.array(_BORDER), np.array(np.inf))
    span = _jet(expr, Interval(*ends) if sign > 0 else Interval(-ends[1], -ends[0])).value
    if expr.op == "x":
        return Tail(_term(1.0, 1.0), _term(1.0), (), (1.0, 1.0), span)
    if expr.op == "const":
        size = abs(expr.number)
        return Tail(_term(size) if size else (), (), (), (size, 0.0), span)
    args = [_tail(arg, sign) for arg in expr.args]
    if expr.op in UNARY:
        (p,) = args
        value, first, second = _tail_unary(expr.op, p)
        bend = _add(_mul(second, p.slope, p.slope), _mul(first, p.bend))
        return Tail(value, _mul(first, p.slope), bend, p.least if expr.op in ("neg", "abs") else _NONE, span)
    if expr.op == "power":
        result = args[0]
        for _ in range(int(expr.number) - 1):
            result = _tail_times(result, args[0])
        return result._replace(range=span)
    if expr.op == "select":
        a, b, left, right = args
        if a.range.hi <= b.range.lo:
            return left
        return right if a.range.lo >= b.range.hi else _tail_either(left, right, span)
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
        least = (1 / abs(float(right.range.lo)), 0.0) if right.slope == () and right.range.lo else _NONE
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
    """(m, k) of a sum whose parts do not cancel, or of which one is bounded."""
    other = -right.range if minus else right.range
    if (left.range.lo >= 0 and other.lo >= 0) or (left.range.hi <= 0 and other.hi <= 0):
        (m, k), (n, j) = left.least, right.least
        return (m + n, k) if k == j else max((left.least, right.least), key=lambda p: (p[0] > 0, p[1]))
    for p, q in ((left, right), (right, left)):
        size = float(q.range.largest())
        if math.isfinite(size):
            return max(0.0, p.least[0] - size * _BORDER ** -p.least[1] * (1 + 1e-12)) * (1 - 1e-12), p.least[1]
    return _NONE


def _sup(terms: Terms | None) -> float:
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
            total += c * _BORDER**n * (1 + 1e-9 * (n != 0))
        else:
            t = max(_BORDER, n / a)
            total += c * math.exp(n * math.log(t) - a * t) * (1 + 1e-9)
    return total * (1 + 1e-12)


def _affine(expr: Expr) -> tuple[float, float] | None:
    """(a, b) of a x + b, in floats; None for what is not of that form."""
    if expr.op == "x":
        return 1.0, 0.0
    if expr.op == "const":
        return 0.0, expr.number
    args = [_affine(arg) for arg in expr.args]
    if any(arg is None for arg in args):
        return None
    known = [arg for arg in args if arg is not None]
    if expr.op == "neg":
        return -known[0][0], -known[0][1]
    if expr.op in ("add", "sub"):
        s = 1 if expr.op == "add" else -1
        return known[0][0] + s * known[1][0], known[0][1] + s * known[1][1]
    if expr.op == "mul" and 0.0 in (known[0][0], known[1][0]):
        (a, b), (_, c) = known if known[1][0] == 0 else known[::-1]
        return a * c, b * c
    if expr.op == "div" and known[1][0] == 0 and known[1][1]:
        return known[0][0] / known[1][1], known[0][1] / known[1][1]
    return None


def _kinks(expr: Expr) -> set[float]:
    """Where an absolute value, a maximum or a selection of affine functions changes over."""
    found = set().union(*(_kinks(arg) for arg in expr.args)) if expr.args else set()
    sides: dict[str, tuple[Expr, ...]] = {
        "abs": (*expr.args[:1], const(0)),
        "max": expr.args,
        "min": expr.args,
        "select": expr.args[:2],
    }
    if expr.op in sides:
        left, right = map(_affine, sides[expr.op])
        if left is not None and right is not None and left[0] != right[0]:
            found.add((right[1] - left[1]) / (left[0] - right[0]))
    return {k for k in found if abs(k) < _BORDER}


def _selections(expr: Expr) -> list[Expr]:
    own = [expr] if expr.op == "select" else []
    return own + [s for arg in expr.args for s in _selections(arg)]


def _check_continuous(expr: Expr) -> None:
    for chosen in _selections(expr):
        a, b, left, right = chosen.args
        one_side, other_side = _affine(a), _affine(b)
        if one_side is None or other_side is None:
            raise ValueError("it selects by a comparison that is not of affine functions: it may jump there")
        (p, q), (r, s) = one_side, other_side
        if p == r:
            continue
        at = Interval(*(np.array((s - q) / (p - r)),) * 2)
        one, other = _jet(left, at).value, _jet(right, at).value
        if one.hull(other).hi - one.hull(other).lo > 1e-12 * (1 + float(one.largest())):
            raise ValueError(f"it jumps at {float(at.lo):.6g}: no Lipschitz constant")


def _search(expr: Expr, order: int) -> float:
    """Sup |f'| or sup |f''| from above, within `_ACCURACY` of the largest value seen where that can be had."""
    kinks = sorted(_kinks(expr))
    points = np.unique(np.concatenate([np.linspace(-_BORDER, _BORDER, _CELLS + 1), [0.0], kinks]))
    cells = Interval(points[:-1], points[1:])
    ends = [_tail(expr, sign) for sign in (1.0, -1.0)]
    tails = [_sup(end.slope if order == 1 else end.bend) for end in ends]
    above, seen = max(tails), 0.0
    for _ in range(_ROUNDS):
        if above == math.inf or not len(cells.lo):
            break
        bound = _jet(expr, cells)[order].largest()
        middle = (cells.lo + cells.hi) / 2
        at = _jet(expr, Interval(middle, middle))[order].smallest()
        seen = max(seen, float(np.max(np.where(np.isfinite(at), at, 0.0))))
        settled = bound <= max(seen, above) * (1 + _ACCURACY)
        above = max(above, float(np.max(bound[settled], initial=0.0)))
        left = ~settled & (middle > cells.lo) & (middle < cells.hi)
        above = max(above, float(np.max(bound[~settled & ~left], initial=0.0)))
        cells = Interval(*(np.concatenate([a[left], b[left]]) for a, b in ((cells.lo, middle), (middle, cells.hi))))
        if len(cells.lo) > _MOST:
            break
    if len(cells.lo):
        above = max(above, float(np.max(_jet(expr, cells)[order].largest())))
    return above


def _check_smooth(expr: Expr) -> None:
    """F' has no jump where an absolute value, a maximum or a selection changes over.

    Looked for beside the place: a jump that is too small to be seen is taken for rounding.
    """
    beside = 1e-9
    for kink in sorted(_kinks(expr)):
        left = _jet(expr, Interval(np.array(kink - beside), np.array(kink))).slope
        right = _jet(expr, Interval(np.array(kink), np.array(kink + beside))).slope
        apart = max(float(right.lo - left.hi), float(left.lo - right.hi))
        if not apart <= 1e-12:
            raise ValueError(f"its slope jumps at {kink:.6g}: no bound of its curvature")


@functools.lru_cache(maxsize=512)
def steepest(expr: Expr) -> float:
    """Sup |f'| over all numbers, never below it and at most 1e-6 of it above, where its terms allow.

    Args:
      expr: the function.

    Raises:
      ValueError: it jumps, or no finite bound is known.

    Example:
      >>> from fantastic4.scalar import X, Expr, steepest
      >>> silu = Expr("mul", (X, Expr("logistic", (X,))))
      >>> print(round(steepest(silu), 5))
      1.09984
    """
    with np.errstate(all="ignore"):
        _check_continuous(expr)
        result = _search(expr, 1)
    if not math.isfinite(result):
        raise ValueError("its slope has no finite bound that is known, on the whole line")
    return result


@functools.lru_cache(maxsize=512)
def most_bent(expr: Expr) -> float:
    """Sup |f''| over all numbers, never below it: the Lipschitz constant of the slope.

    Args:
      expr: the function.

    Raises:
      ValueError: it or its slope jumps, or no finite bound is known.

    Example:
      >>> from fantastic4.scalar import X, Expr, most_bent
      >>> print(round(most_bent(Expr("tanh", (X,))), 4))
      0.7698
    """
    with np.errstate(all="ignore"):
        _check_continuous(expr)
        _check_smooth(expr)
        result = _search(expr, 2)
    if not math.isfinite(result):
        raise ValueError("its curvature has no finite bound that is known, on the whole line")
    return result
