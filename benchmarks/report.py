"""Write the measured tables into the pages of docs/, from the figures in benchmarks/results/.

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


def training_tables(figures: dict[str, Any]) -> dict[str, str]:
    """Tables of docs/training.md by the name of their place in the page."""
    steps = []
    for name in ("resnet32", "resnet18"):
        f = figures[name]
        plain, penalised = f["step_ms plain"], f["step_ms penalty"]
        clip = f["sedghi_clip_ms"]
        row = [f"ResNet-{name[6:]}, {f['kernels']} kernels", f"{plain:.0f}", f"{penalised:.0f}"]
        row += [f"{f['ratio step penalty/plain (target <= 1.02)']:.3f}", f"{f['penalty_alone_ms']:.2f}", f"{clip:.0f}"]
        steps.append([*row, f"{1 + clip / 100 / plain:.3f}"])
    wrappers, each = [], figures["wrappers"]
    for where in ("32x32, batch 8", "4x4, batch 1"):
        for framework in ("linen", "nnx"):
            for what in ("forward", "gradient"):
                times = {k: each[f"ms {framework} {where} {what} {k}"] for k in ("plain", "flax", "hard", "penalty")}
                ratios = [times["hard"] / times["flax"], times["penalty"] / times["flax"]]
                cells = [*(f"{t:.1f}" for t in times.values()), *(f"{r:.2f}" for r in ratios)]
                wrappers.append([f"{framework}, {where}, {what}", *cells])
    shapes: dict[str, list[Any]] = {}
    for layer in figures["state"]["layers"]:
        shapes.setdefault(_shape(layer), []).append(layer)
    state = []
    for shape, same in shapes.items():
        kernel, extra = same[0]["bytes"], same[0]["state_bytes"]
        state.append([shape, str(len(same)), f"{kernel / 1e3:.1f}", f"{extra / 1e3:.1f}", f"{extra / kernel:.1%}"])
    total = [f"**{figures['state'][key] * 1e3:.0f}**" for key in ("params_mb", "state_mb")]
    share = f"**{figures['state']['state_mb'] / figures['state']['params_mb']:.2%}**"
    compilation = figures["compilation"]
    return {
        "steps": _markdown(
            ["", "plain, ms", "with the penalty, ms", "ratio", "penalty alone, ms"]
            + [f"one Sedghi clipping, {unit}" for unit in ("ms", "every 100 steps: ratio")],
            steps,
        ),
        "wrappers": _markdown(
            [
                "",
                "bare layers, ms",
                "Flax's SpectralNorm",
                "ours, hard",
                "ours, penalty",
                "hard / Flax",
                "penalty / Flax",
            ],
            wrappers,
        ),
        "compilation": _markdown(
            ["", "plain, s", "with the penalty, s", "ratio"],
            [
                ["ResNet-50 train step"]
                + [f"{compilation[f'compile_s {name}']:.1f}" for name in ("plain", "penalty")]
                + [f"{compilation['compile_s penalty'] / compilation['compile_s plain']:.2f}"]
            ],
        ),
        "state": _markdown(
            ["kernel", "how many", "its size, kB", "state of each, kB", "share"],
            [*state, ["**all params**", "", *total, share]],
        ),
    }


def tables(figures: dict[str, Any]) -> dict[str, str]:
    """Tables of docs/methods.md by the name of their place in the page."""
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
            raise ValueError(f"the page needs one place <!-- {name} -->, it has {count}")
    return page


PAGES = {"methods.md": ("norms-cpu.json", tables), "training.md": ("training-cpu.json", training_tables)}


def filled(name: str) -> str:
    """A page of docs/ with the tables of the stored figures."""
    results, make = PAGES[name]
    figures = json.loads((ROOT / "benchmarks" / "results" / results).read_text())
    return fill((ROOT / "docs" / name).read_text(), make(figures))


def main() -> None:
    """Fill every page."""
    for name in PAGES:
        (ROOT / "docs" / name).write_text(filled(name))
        print(f"wrote the tables of docs/{name}")


if __name__ == "__main__":
    main()
