"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence


def columns(lines: Sequence[Sequence[str]], left: int) -> str:
    """Lines of cells below one another, the first ``left`` columns flush left and the others flush right."""
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad = [f"<{w}" if i < left else f">{w}" for i, w in enumerate(wide)]
    return "\n".join("  ".join(format(cell, p) for cell, p in zip(line, pad, strict=True)) for line in lines)
