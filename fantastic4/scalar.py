r"""How steep a function of one real number can be, and how bent: proved, for activations that arrive as operations.

A traced network does not say "GELU": it says x · ½ · (1 + erf(x/√2)). Read as an expression in one number x, such a
function has sup |f'| and sup |f''| that interval arithmetic finds to six digits: on [-B, B] by branch and bound
(`fantastic4.jets`), beyond by envelopes (`fantastic4.tails`). It takes the C library's elementary functions as right
to 8 units in the last place.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Protocol

import numpy as np

from fantastic4.expression import (
    Expr,
    X,
    affine,
    const,
    in_units,
    kinks,
    layers,
    parts,
    selections,
    single_waves,
    substitute,
)
from fantastic4.jets import Interval, jet
from fantastic4.rounding import times_up
from fantastic4.tails import BORDER, integral, sup, tail

__all__ = ["Expr", "JumpError", "X", "climb", "const", "extremes", "inner_kinks", "most_bent", "steepest"]

_CELLS = 2048  # at first
_ROUNDS = 60
_ACCURACY = 1e-6
_MOST = 400_000  # cells at once
_BLUR = 1e-5  # of the largest slope: more may hide a jump
_HIDDEN = 1e-12  # of the steepest slope around, times the distance: more may hide a jump
_NOTHING = 1e-300  # what rounding makes of 0: halving a cell does not make it less
_NARROW = 1e-9  # a cell of which nothing is known: halving it further tells nothing


class JumpError(ValueError):
    """A function that is not continuous."""


class _NoBoundError(ValueError):
    """Nothing finite was found."""


def _seen(expr: Expr, points: np.ndarray) -> float:
    """The largest |f'| that is seen at some points."""
    sizes = jet(expr, Interval(points, points)).slope.smallest()
    return float(np.max(np.where(np.isfinite(sizes), sizes, 0.0)))


def check_continuous(expr: Expr, pace: float | None = None) -> None:
    """Both sides of a selection meet where it changes over: exactly where they are lines, else as intervals tell.

    Those that are wide, where large numbers cancel, may hide a jump: no more than the input moves it by a 1e-12 of
    1 + its size. Of what is a part of a function, ``pace`` is how far its argument goes when the input goes 1.
    """
    for chosen in selections(expr):
        a, b, left, right = chosen.args
        one_side, other_side = affine(a), affine(b)
        if one_side is None or other_side is None:
            raise ValueError("it selects by a comparison that is not of affine functions: it may jump there")
        (p, q), (r, s) = one_side, other_side
        if p == r:
            continue
        place = (s - q) / (p - r)
        at = float(place)
        lines = [line for line in (affine(left), affine(right)) if line is not None]
        if len(lines) == 2:
            apart = len({slope * place + offset for slope, offset in lines}) > 1
        else:
            # It is rounded.
            ends = np.array([math.nextafter(at, end) for end in (-math.inf, math.inf)])
            one, other = (jet(side, Interval(*ends)).value for side in (left, right))
            apart = not (one.lo <= other.hi and other.lo <= one.hi)
            width, size = max(float(one.hi - one.lo), float(other.hi - other.lo)), 1 + abs(at)
            around = np.append(ends, at + size * np.linspace(-1, 1, _CELLS))
            if not apart and not width <= _HIDDEN * (size if pace is None else pace) * _seen(chosen, around):
                raise ValueError(f"its values are known too roughly at {at:.6g} to see whether it jumps there")
        if apart:
            raise JumpError(f"it jumps at {at:.6g}: no Lipschitz constant")


def inner_kinks(expr: Expr) -> list[float]:
    """Where it changes over, inside of the interval that is searched."""
    return sorted(k for k in kinks(expr) if abs(k) <= BORDER)


def climb(measure: Callable[[Interval], tuple[np.ndarray, np.ndarray]], places: list[float], far: float) -> float:
    """The largest value of a function that is not negative, from above, within `_ACCURACY` where that can be had.

    Args:
      measure: the largest and the smallest size that it can have on intervals.
      places: where intervals must end.
      far: what it is at most beyond the border.
    """
    points = np.unique(np.concatenate([np.linspace(-BORDER, BORDER, _CELLS + 1), [0.0], places]))
    cells = Interval(points[:-1], points[1:])
    above = far
    seen = 0.0
    for _ in range(_ROUNDS):
        if above == math.inf or not len(cells.lo):
            break
        bound, _ = measure(cells)
        if np.any((bound == math.inf) & (cells.hi - cells.lo < _NARROW)):
            above = math.inf
            break
        middle = (cells.lo + cells.hi) / 2
        _, at = measure(Interval(middle, middle))
        seen = max(seen, float(np.max(np.where(np.isfinite(at), at, 0.0))))
        settled = bound <= max(seen * (1 + _ACCURACY), far * (1 + _ACCURACY), _NOTHING)
        above = max(above, float(np.max(bound[settled], initial=0.0)))
        left = ~settled & (middle > cells.lo) & (middle < cells.hi)
        above = max(above, float(np.max(bound[~settled & ~left], initial=0.0)))
        cells = Interval(*(np.concatenate([a[left], b[left]]) for a, b in ((cells.lo, middle), (middle, cells.hi))))
        if len(cells.lo) > _MOST:
            break
    if len(cells.lo):
        above = max(above, float(np.max(measure(cells)[0])))
    return above


def _search(expr: Expr, order: int, far: float | None = None) -> float:
    """Sup |f'| or sup |f''| from above.

    ``far`` is what it is at most beyond the border, where that is known better than by envelopes.
    """
    if far is None:
        ends = [tail(expr, sign) for sign in (1.0, -1.0)]
        far = max(sup(end.slope if order == 1 else end.bend) for end in ends)

    def measure(cells: Interval) -> tuple[np.ndarray, np.ndarray]:
        found = jet(expr, cells)[order]
        return found.largest(), found.smallest()

    return climb(measure, inner_kinks(expr), far)


def _check_smooth(expr: Expr) -> None:
    """F' is the same on both sides of each place where an absolute value, a maximum or a selection changes over.

    One float to either side of it: intervals that do not meet are a jump, and those that are wide, where large slopes
    cancel, may hide one. Where the place itself is not a float, f'' is unbounded on the interval around it, and
    `_search` says so.
    """
    places = inner_kinks(expr)
    if not places:
        return
    steep = _seen(expr, np.linspace(-BORDER, BORDER, _CELLS))
    for kink in places:
        left = jet(expr, Interval(np.array(math.nextafter(kink, -math.inf)), np.array(kink))).slope
        right = jet(expr, Interval(np.array(kink), np.array(math.nextafter(kink, math.inf)))).slope
        if not (left.lo <= right.hi and right.lo <= left.hi):
            raise ValueError(f"its slope jumps at {kink:.6g}: no bound of its curvature")
        if left.hi - left.lo + right.hi - right.lo > _BLUR * steep:
            raise ValueError(f"its slope is known too roughly at {kink:.6g} to see whether it jumps there")


def _far_slopes(expr: Expr) -> tuple[float, float]:
    """An interval of f' beyond the border: it moves from its value there by no more than the integral of |f''|."""
    low, high = math.inf, -math.inf
    for sign in (1.0, -1.0):
        ends = sorted((sign * BORDER, math.nextafter(sign * BORDER, sign * math.inf)))  # it may change over there
        end = tail(expr, sign)
        at, moved = jet(expr, Interval(*map(np.array, ends))).slope, integral(end.bend)
        size = sup(end.slope)
        low, high = min(low, max(float(at.lo) - moved, -size)), max(high, min(float(at.hi) + moved, size))
    return low, high


def _largest(expr: Expr, order: int, what: str, pace: float | None, far: float | None = None) -> float:
    with np.errstate(all="ignore"):
        check_continuous(expr, pace)
        if order == 2:
            _check_smooth(expr)
        try:
            result = _search(expr, order, far)
        except OverflowError:  # of an envelope: it is no bound then
            result = math.inf
    if not math.isfinite(result):
        raise _NoBoundError(f"its {what} has no finite bound that is known, on the whole line")
    return result


def _within_reach(expr: Expr, order: int, what: str, pace: float | None) -> float:
    """`_largest`; or where it changes over beyond the border, in units in which that is within."""
    try:
        return _largest(expr, order, what, pace)
    except _NoBoundError:  # and it does not jump, as far as it was looked at
        far = max(map(abs, kinks(expr)), default=0.0)
        if not BORDER < far < 1e300:
            raise
        unit = 2.0 ** math.ceil(math.log2(far / BORDER))
        with contextlib.suppress(ValueError):
            nearer = substitute(expr, X, Expr("mul", (const(unit), X)))
            return times_up(*[1 / unit] * order, _largest(nearer, order, what, _slower(pace, 1 / unit)))
        raise


def _above(number: Fraction) -> float:
    """The size of a number, as a float that is no smaller."""
    try:
        nearest = float(abs(number))
    except OverflowError:
        return math.inf
    return nearest if nearest >= abs(number) else math.nextafter(nearest, math.inf)


def _slower(pace: float | None, by: float) -> float:
    """How far what goes ``by`` times as far goes."""
    return by if pace is None else times_up(by, pace)


class _Find(Protocol):
    def __call__(self, expr: Expr, pace: float | None = None) -> float: ...


def _in_other_units(find: _Find, expr: Expr, order: int, pace: float | None) -> float:
    """What ``find`` knows of a function of x or, if that is less, of the same as a function of a x + b."""
    units, found = in_units(expr), math.inf
    if units is not None:
        scale = _above(units[1])
        with contextlib.suppress(ValueError):  # which would name places in other units
            found = times_up(*[scale] * order, find(units[0], _slower(pace, scale)))
    if math.isfinite(found):
        with contextlib.suppress(ValueError):
            found = min(found, find(expr, pace))
        return found
    return find(expr, pace)


def _remembered(find: _Find) -> _Find:
    """A cache of refusals too: what is bounded in parts asks for the same parts many times."""

    @functools.lru_cache(maxsize=4096)
    def outcome(expr: Expr, pace: float | None) -> float | ValueError:
        try:
            return find(expr, pace)
        except ValueError as error:
            return type(error)(*error.args)  # without what it was raised in

    @functools.wraps(find)
    def found(expr: Expr, pace: float | None = None) -> float:
        result = outcome(expr, pace)
        if isinstance(result, ValueError):
            raise result.with_traceback(None)
        return result

    return found


@_remembered
def steepest(expr: Expr, pace: float | None = None) -> float:
    """Sup |f'| over all numbers, never below it and at most 1e-6 of it above, where its terms allow.

    Where they do not, of f = g ∘ h: sup |g'| sup |h'|. Waves have no terms that vanish far out: of what is made of
    them the smaller of both.

    Args:
      expr: the function.
      pace: of a part of a function, how far its argument goes at most when the input goes 1.

    Raises:
      ValueError: it jumps, or no finite bound is known.

    Example:
      >>> from fantastic4.scalar import X, Expr, steepest
      >>> silu = Expr("mul", (X, Expr("logistic", (X,))))
      >>> print(round(steepest(silu), 5))
      1.09984
    """
    return _in_other_units(_steepest, single_waves(expr), 1, pace)


def _steepest(expr: Expr, pace: float | None = None) -> float:
    straight = affine(expr)
    if straight is not None and _above(straight[0]) < math.inf:
        return _above(straight[0])
    found, refused = math.inf, None
    try:
        found = _within_reach(expr, 1, "slope", pace)
    except ValueError as error:
        refused = error
    if refused or any(part.op in ("sin", "cos") for part in parts(expr)):
        for outer, inner in layers(expr):
            with contextlib.suppress(ValueError):
                slope = steepest(inner, pace)
                return min(found, times_up(steepest(outer, _slower(pace, slope)), slope))
    if refused:
        raise refused
    return found


@_remembered
def most_bent(expr: Expr, pace: float | None = None) -> float:
    """Sup |f''| over all numbers, never below it: the Lipschitz constant of the slope.

    Where its terms do not allow it, of f = g ∘ h: sup |g''| sup |h'|² + sup |g'| sup |h''|.

    Args:
      expr: the function.
      pace: see `steepest`.

    Raises:
      ValueError: it or its slope jumps, or no finite bound is known.

    Example:
      >>> from fantastic4.scalar import X, Expr, most_bent
      >>> print(round(most_bent(Expr("tanh", (X,))), 4))
      0.7698
    """
    return _in_other_units(_most_bent, single_waves(expr), 2, pace)


def _most_bent(expr: Expr, pace: float | None = None) -> float:
    if affine(expr) is not None:
        return 0.0
    try:
        return _within_reach(expr, 2, "curvature", pace)
    except ValueError as refused:
        for outer, inner in layers(expr):
            with contextlib.suppress(ValueError):
                slope = steepest(inner, pace)
                outside = _slower(pace, slope)
                bent = times_up(most_bent(outer, outside), slope, slope)
                curved = bent, times_up(steepest(outer, outside), most_bent(inner, pace))
                return sum(curved) * (1 + 1e-15)
        raise refused


def extremes(expr: Expr, order: int) -> tuple[float, float]:
    """An interval that holds all values of f' (order 1) or f'' (order 2).

    Sup (f' + S) = sup |f' + S| where S = sup |f'|, and so on: to 1e-6 of S where the terms of f allow, else -S to S.

    Args:
      expr: the function.
      order: 1 or 2.

    Raises:
      ValueError: no finite bound is known.

    Example:
      >>> from fantastic4.scalar import X, Expr, extremes
      >>> print([round(end, 4) for end in extremes(Expr("logistic", (X,)), 1)])
      [-0.0, 0.25]
    """
    expr = single_waves(expr)
    units = in_units(expr)
    if units is None:
        return _extremes(expr, order, None)
    found, scale = [], _above(units[1])
    with contextlib.suppress(ValueError):
        low, high = _extremes(units[0], order, scale)
        if units[1] < 0 and order == 1:
            low, high = -high, -low
        size = times_up(*[scale] * order)
        inwards = size * (1 - 1e-11) if size > 1e-300 else 0.0
        found.append(
            (-times_up(-low, size) if low < 0 else low * inwards, times_up(high, size) if high > 0 else high * inwards)
        )
    with contextlib.suppress(ValueError):
        found.append(_extremes(expr, order, None))
    if not found:
        return _extremes(expr, order, None)  # which says why
    return max(low for low, _ in found), min(high for _, high in found)


def _extremes(expr: Expr, order: int, pace: float | None) -> tuple[float, float]:
    size = steepest(expr, pace) if order == 1 else most_bent(expr, pace)
    power = X if order == 1 else Expr("mul", (const(0.5), Expr("power", (X,), 2.0)))
    line = Expr("mul", (const(size), power))
    with np.errstate(all="ignore"):
        low, high = _far_slopes(expr) if order == 1 else (-size, size)
    ends = (None, None) if order == 2 else ((size + high) * (1 + 1e-15), (size - low) * (1 + 1e-15))
    try:
        high = _largest(Expr("add", (expr, line)), order, "derivative", pace, ends[0]) - size
        low = size - _largest(Expr("sub", (line, expr)), order, "derivative", pace, ends[1])
    except ValueError:  # known only in size
        return -size, size
    slack = 4e-16 * size
    return max(low - slack, -size), min(high + slack, size)
