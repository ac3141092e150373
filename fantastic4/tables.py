"""Tables of plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal


def at_most(number: float) -> str:
    """A bound in four digits, the last of them rounded up."""
    if not number or not math.isfinite(number):
        return f"{number:.4g}"
    exact = Decimal(number)
    return f"{float(exact.quantize(Decimal(1).scaleb(exact.adjusted() - 3), ROUND_CEILING)):.4g}"


def columns(lines: Sequence[Sequence[str]], left: int) -> str:
    """Lines of cells below one another, the first ``left`` columns flush left and the others flush right."""
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad = [f"<{w}" if i < left else f">{w}" for i, w in enumerate(wide)]
    return "\n".join("  ".join(format(cell, p) for cell, p in zip(line, pad, strict=True)) for line in lines)
