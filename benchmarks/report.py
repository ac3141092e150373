"""Write the measured tables into docs/methods.md, from benchmarks/results/norms-cpu.json.

python -m benchmarks.report
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

PAPER = "seconds, Sedghi at the paper's sizes"
ROOT = Path(__file__).resolve().parent.parent


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shape(row: dict[str, Any]) -> str:
    return "×".join(map(str, row["shape"]))


def tables(figures: dict[str, Any]) -> dict[str, str]:
    """Markdown tables by the name of their place in the page."""
    training, intervals, rows = figures["training"], figures["intervals"], figures["table"]["rows"]
    methods = [label for label in rows[0] if isinstance(rows[0][label], dict)]
    rungs = [name.removeprefix("step_ms ") for name in training if name.startswith("step_ms ")]
    four = training["step_ms four"]
    titles = [{"grid": "grid 3k"}.get(label, label) for label in methods]
    layers = [f"{row['name']} {_shape(row)}" for row in rows]

    def cells(key: str, form: str) -> list[list[str]]:
        return [
            [layer, *(format(row[m][key], form) if m in row else "–" for m in methods)]
            for layer, row in zip(layers, rows, strict=True)
        ]

    def product(method: str) -> str:
        if not all(method in row for row in rows):
            return "–"
        value = math.prod(row[method]["ratio"] for row in rows)
        return f"**{value:.3g}**" if value > 0.1 else f"**{value:.1e}**"

    return {
        "training": _markdown(
            ["rung", "ms", "/ four", "temporaries, MB"],
            [
                [
                    r,
                    f"{training[f'step_ms {r}']:.1f}",
                    f"{training[f'step_ms {r}'] / four:.2f}",
                    f"{training[f'temporary_mb {r}']:.1f}",
                ]
                for r in rungs
            ],
        ),
        "ratios": _markdown(
            ["layer", *titles], [*cells("ratio", ".3f"), ["**product**", *(product(m) for m in methods)]]
        ),
        "times": _markdown(["layer", *titles], cells("ms", ".3g")),
        "intervals": _markdown(
            ["layer", "lower", "upper", "s", "Sedghi at its size, s", "at the paper's size, s"],
            [
                [
                    f"{r['name']} {_shape(r)}",
                    f"{r['lower']:.4f}",
                    f"{r['upper']:.4f}",
                    f"{r['seconds']:.3f}",
                    f"{r['sedghi_seconds']:.2f}",
                    f"{r['sedghi_seconds_paper']:.1f}",
                ]
                for r in intervals["rows"]
            ]
            + [
                [
                    "**all**",
                    "",
                    "",
                    f"**{intervals['seconds, 17 intervals']:.2f}**",
                    f"**{intervals['seconds, Sedghi at the true sizes']:.1f}**",
                    f"**{intervals[PAPER]:.0f}**",
                ]
            ],
        ),
    }


def fill(page: str, parts: dict[str, str]) -> str:
    """The page with every table in its place."""
    for name, table in parts.items():
        page, count = re.subn(
            rf"<!-- {name} -->\n.*?<!-- end -->", f"<!-- {name} -->\n{table}\n<!-- end -->", page, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"docs/methods.md needs one place <!-- {name} -->, it has {count}")
    return page


def main() -> None:
    """Fill docs/methods.md."""
    figures = json.loads((ROOT / "benchmarks" / "results" / "norms-cpu.json").read_text())
    path = ROOT / "docs" / "methods.md"
    path.write_text(fill(path.read_text(), tables(figures)))
    print(f"wrote the tables of {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
