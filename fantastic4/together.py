"""How steep functions of one number are together, where they are read side by side."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import numpy as np

from fantastic4.expression import Expr
from fantastic4.jets import Interval, jet
from fantastic4.rounding import times_up
from fantastic4.scalar import climb, inner_kinks, steepest
from fantastic4.tails import sup, tail


def _wave(expr: Expr) -> tuple[str, Expr, float] | None:
    """Sin or cos, of what, and the size of the number before it."""
    if expr.op == "neg":
        return _wave(expr.args[0])
    if expr.op == "mul" and expr.args[0].op == "const":
        inner = _wave(expr.args[1])
        return None if inner is None else (inner[0], inner[1], times_up(inner[2], abs(expr.args[0].number)))
    return (expr.op, expr.args[0], 1.0) if expr.op in ("sin", "cos") else None


@functools.lru_cache(maxsize=4096)
def steepest_together(terms: tuple[tuple[int, Expr], ...]) -> float:
    """Sup √(Σ n f'²), over all numbers, of functions that are each there n times: no more than by `steepest` of each.

    relu(x) beside relu(-x) has 1, sin(x) beside cos(x) too.

    Args:
      terms: the n, and the functions, each without a jump.

    Raises:
      ValueError: what `steepest` raises of one of them.
    """
    alone = [steepest(expr) for _, expr in terms]
    top = max(alone)
    if top == 0:
        return 0.0
    # Pairs of waves: n c² e'² whatever x is.
    level, left = 0.0, list(terms)
    for n, expr in terms:
        wave = _wave(expr)
        if wave is None or wave[0] != "sin":
            continue
        other = next((term for term in left if term[0] == n and _wave(term[1]) == ("cos", *wave[1:])), None)
        with contextlib.suppress(ValueError):
            inner = steepest(wave[1])
            if other is not None:
                left = [term for term in left if term not in ((n, expr), other)]
                level += n * times_up(wave[2], inner, 1 / top) ** 2

    def root(sizes: list[Any]) -> Any:
        squares = [n * (size / top) ** 2 for (n, _), size in zip(left, sizes, strict=True)]
        return np.sqrt(functools.reduce(np.add, squares, level))

    def measure(cells: Interval) -> tuple[np.ndarray, np.ndarray]:
        slopes = [jet(expr, cells).slope for _, expr in left]
        return root([slope.largest() for slope in slopes]), root([slope.smallest() for slope in slopes])

    with np.errstate(all="ignore"):
        try:
            far = max(float(root([sup(tail(expr, sign).slope) for _, expr in left])) for sign in (1.0, -1.0))
            places = sorted({place for _, expr in left for place in inner_kinks(expr)})
            found = climb(measure, places, far) if left else far
        except OverflowError:  # of an envelope
            found = math.inf
    independent = math.sqrt(sum(n * (one / top) ** 2 for (n, _), one in zip(terms, alone, strict=True)))
    return times_up(top, min(found, independent) * (1 + 1e-12))
