"""What the values of a function of one number are: how large, and whether they are numbers at all."""

from __future__ import annotations

import functools
import math

import numpy as np

from fantastic4.expression import Expr, parts
from fantastic4.jets import Interval, jet
from fantastic4.tails import BORDER

VANISHES = float(np.finfo(np.float32).tiny)
"""What is smaller counts as 0 where it divides, or has a logarithm: XLA may take it for that."""
_CELLS = 2048  # at first
_FEW = 256  # on a bounded interval
_HALVINGS = 20  # of cells in which an argument may not be where its function is defined


@functools.lru_cache(maxsize=4096)
def largest_value(expr: Expr, most: float = math.inf) -> float:
    """An upper bound of sup |f| over all numbers from ``-most`` to ``most``; infinity where none is known.

    Args:
      expr: the function.
      most: not negative.

    Example:
      >>> from fantastic4.expression import Expr, X
      >>> from fantastic4.values import largest_value
      >>> largest_value(Expr("tanh", (X,)))
      1.0
      >>> largest_value(Expr("neg", (X,)), 2.0)
      2.0
    """
    ends = np.linspace(-most, most, _FEW + 1) if most < math.inf else np.zeros(0)
    cells = _cells() if most == math.inf else Interval(ends[:-1], ends[1:])
    with np.errstate(all="ignore"):
        value = jet(expr, cells).value
        found = float(np.maximum(np.abs(value.lo), np.abs(value.hi)).max())
    return found if math.isfinite(found) else math.inf


def _cells() -> Interval:
    """The whole line in pieces."""
    points = np.linspace(-BORDER, BORDER, _CELLS + 1)
    return Interval(np.append(-math.inf, points), np.append(points, math.inf))


def is_total(expr: Expr) -> bool:
    """Whether a function is known to be a number everywhere: its roots, logarithms and quotients of what they are of.

    What may be smaller than `VANISHES` counts as 0.

    Args:
      expr: the function.
    """
    return all(_is_within(part) for part in parts(expr) if part.op in ("log", "log1p", "sqrt", "div"))


def _is_within(part: Expr) -> bool:
    cells = _cells()
    for _ in range(_HALVINGS):
        with np.errstate(all="ignore"):
            p = jet(part.args[-1], cells).value
        if part.op == "div":
            good = (p.lo >= VANISHES) | (p.hi <= -VANISHES)
        else:
            good = p.lo > -1 if part.op == "log1p" else p.lo >= (0 if part.op == "sqrt" else VANISHES)
        lo, hi = cells.lo[~good], cells.hi[~good]
        # Where a root touches 0 few cells are left at each halving; where it is none, ever more.
        if not len(lo) or len(lo) > _CELLS or np.any(np.isinf(lo) | np.isinf(hi)):
            break
        middle = (lo + hi) / 2
        cells = Interval(np.append(lo, middle), np.append(middle, hi))
    return not len(lo)
