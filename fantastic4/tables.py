"""Tables of plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal


def at_most(number: float, digits: int = 4) -> str:
    """A bound in so many digits, the last of them rounded up."""
    return _rounded(number, digits, ROUND_CEILING)


def at_least(number: float, digits: int = 4) -> str:
    """A lower bound in so many digits, the last of them rounded down."""
    return _rounded(number, digits, ROUND_FLOOR)


def _rounded(number: float, digits: int, way: str) -> str:
    if not number or not math.isfinite(number):
        return f"{number:.{digits}g}"
    exact = Decimal(number)
    return f"{float(exact.quantize(Decimal(1).scaleb(exact.adjusted() + 1 - digits), way)):.{digits}g}"


def columns(lines: Sequence[Sequence[str]], left: int) -> str:
    """Lines of cells below one another, the first ``left`` columns flush left and the others flush right."""
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad = [f"<{w}" if i < left else f">{w}" for i, w in enumerate(wide)]
    return "\n".join("  ".join(format(cell, p) for cell, p in zip(line, pad, strict=True)) for line in lines)
