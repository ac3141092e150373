"""The three pictures of docs/evidence.md, from the figures in benchmarks/results/: is it tight, cheap, does it help.

python -m benchmarks.plots
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import RESULTS
from benchmarks.report import FAMILIES, ROOT
from benchmarks.tightness import BOUNDS, PUBLISHED
from benchmarks.train_cifar import summary

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


def _plain(axis: Axes, title: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, loc="left", fontsize=10)


def tight(stored: dict[str, Any]) -> Figure:
    """Every layer of every family under each method, as value / norm."""
    found = stored["tightness"]
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    rows = [(family, row) for family in FAMILIES for row in found[family]["rows"]]
    methods = [m for m in rows[0][1] if isinstance(rows[0][1][m], dict)]
    rng = np.random.default_rng(0)
    for i, method in enumerate(methods):
        ratios = np.array([row[method]["ratio"] for _, row in rows if method in row])
        colour = BLUE if method in BOUNDS else GREEN
        left.scatter(i + rng.uniform(-0.2, 0.2, len(ratios)), ratios, s=9, color=colour, alpha=0.6, linewidths=0)
        left.hlines(np.median(ratios), i - 0.35, i + 0.35, color=colour, linewidth=2)
    left.axhline(1, color="black", linewidth=0.8)
    left.set(yscale="log", ylabel="value / norm", yticks=[0.25, 0.5, 1, 1.5, 2, 3])
    left.set_yticklabels(["0.25", "0.5", "1", "1.5", "2", "3"])
    left.minorticks_off()
    left.set_xticks(range(len(methods)), methods, rotation=60, ha="right")
    _plain(left, f"No bound (blue) of {len(rows)} layers lies below the norm;\nestimates (green) do")
    for family, colour in zip(FAMILIES, (BLUE, ORANGE, GREEN, GREY), strict=True):
        ratios = np.sort([row["four"]["ratio"] for row in found[family]["rows"]])
        share = np.arange(1, len(ratios) + 1) / len(ratios)
        right.step(ratios, share, where="post", color=colour, label=FAMILIES[family])
    low, median, high = (PUBLISHED[name] for name in ("min", "median", "max"))
    right.plot([low, median, high], [1 / PUBLISHED["layers"], 0.5, 1], "x", color="black", label="published, ResNet-18")
    right.set(xlabel="four bounds / norm", ylabel="share of the layers", ylim=(0, 1.02))
    right.legend(facecolor="white", edgecolor="none", fontsize=8, loc="lower right")
    _plain(right, "The four bounds, family by family")
    return figure


def cheap(stored: dict[str, Any]) -> Figure:
    """What a step costs beside the peers, and how that grows."""
    peers, sweeps = stored["speed"]["peers"], stored["speed"]["scaling"]
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [n.removeprefix("ms ") for n in peers if n.startswith("ms ")]
    names.sort(key=lambda n: -peers[f"ms {n}"])
    values = [peers[f"ms {n}"] for n in names]
    own = [ORANGE if n.startswith("four bounds") else BLUE for n in names]
    left.barh(range(len(names)), values, color=own, height=0.6)
    left.set_yticks(range(len(names)), names, fontsize=8)
    for i, value in enumerate(values):
        left.text(value * 1.1, i, f"{value:,.1f}" if value < 100 else f"{value:,.0f}", va="center", fontsize=8)
    left.set(xscale="log", xlabel="ms, one step with its gradient", xlim=(min(values) / 2, max(values) * 8))
    _plain(left, "ResNet-18's 20 kernels")
    styles = {"four bounds": (ORANGE, "o-"), "Ryu's iteration": (BLUE, "s-"), "exact norm": (GREEN, "^-")}
    for name, (colour, style) in styles.items():
        sweep = sweeps[f"input size, {name}"]
        right.plot(sweep["sizes"], sweep["ms"], style, color=colour, label=name)
    right.set(xscale="log", yscale="log", xlabel="side of the input", ylabel="ms, a 3×3×64×64 kernel")
    right.set_xticks(sizes := sweeps["input size, four bounds"]["sizes"], list(map(str, sizes)))
    right.minorticks_off()
    right.legend(frameon=False)
    _plain(right, "The bounds do not depend on the input's size")
    return figure


def helps(stored: dict[str, Any]) -> Figure:
    """Test accuracy against the product of norms, arm by arm."""
    rows = summary(stored["cifar"])
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, key, label in ((left, "test", "test accuracy, %"), (right, "gap", "train - test, points")):
        for row, colour in zip(rows, _colours(rows), strict=True):
            value, deviation = (100 * v for v in row[key])
            x, spread = row["norms"]
            axis.errorbar(x, value, deviation, spread, fmt="o", color=colour, capsize=2, label=row["arm"])
        axis.set(xlabel="log₁₀ of the product of the layers' norms", ylabel=label)
    right.legend(frameon=False, fontsize=8)
    seeds = min(row["seeds"] for row in rows)
    _plain(left, f"CIFAR-10, mean and standard deviation of {seeds} seeds")
    _plain(right, "The generalisation gap")
    return figure


def _colours(rows: list[dict[str, Any]]) -> list[Any]:
    oranges = iter(("#F4B183", ORANGE, "#8B3A00"))
    others = iter(("black", GREY, GREEN, BLUE, "#CC79A7"))
    return [next(oranges) if row["arm"].startswith("bound") else next(others) for row in rows]


PICTURES = {"tight.png": tight, "cheap.png": cheap, "helps.png": helps}


def main() -> None:
    """Write every picture into docs/."""
    stored = {name: json.loads((RESULTS / f"{name}-cpu.json").read_text()) for name in ("tightness", "speed", "cifar")}
    for name, make in PICTURES.items():
        path: Path = ROOT / "docs" / name
        make(stored).savefig(path, dpi=130)
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
