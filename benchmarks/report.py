"""Write the measured tables into README and the pages of docs/, from the figures in benchmarks/results/.

python -m benchmarks.report
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS
from benchmarks.tightness import PUBLISHED
from benchmarks.train_cifar import COLUMNS, cells, summary

PAPER = "seconds, Sedghi at the paper's sizes"
ROOT = Path(__file__).resolve().parent.parent


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _shape(row: dict[str, Any]) -> str:
    return "×".join(map(str, row["shape"]))


def training_tables(stored: dict[str, Any]) -> dict[str, str]:
    """Tables of docs/training.md by the name of their place in the page."""
    figures = stored["training"]
    steps = []
    for name in ("resnet32", "resnet18"):
        f = figures[name]
        plain, penalised = f["step_ms plain"], f["step_ms penalty"]
        clip = f["sedghi_clip_ms"]
        row = [f"ResNet-{name[6:]}, {f['kernels']} kernels", f"{plain:.0f}", f"{penalised:.0f}"]
        row += [f"{f['ratio step penalty/plain (target <= 1.02)']:.3f}", f"{f['ratio step plain again/plain']:.3f}"]
        row += [f"{f['penalty_alone_ms']:.2f}", f"{clip:.0f}"]
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
            ["", "plain, ms", "with the penalty, ms", "ratio", "plain again, ratio", "penalty alone, ms"]
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
            ["a ResNet-50 train step", "plain, s", "with the penalty, s", "ratio"],
            [
                [what]
                + [f"{compilation[f'{key} {name}']:.1f}" for name in ("plain", "penalty")]
                + [f"{compilation[f'{key} penalty'] / compilation[f'{key} plain']:.2f}"]
                for what, key in (("elapsed", "compile_s"), ("of the processor", "compile_processor_s"))
            ],
        ),
        "state": _markdown(
            ["kernel", "how many", "its size, kB", "state of each, kB", "share"],
            [*state, ["**all params**", "", *total, share]],
        ),
    }


def method_tables(stored: dict[str, Any]) -> dict[str, str]:
    """Tables of docs/methods.md by the name of their place in the page."""
    training, intervals = stored["norms"]["training"], stored["norms"]["intervals"]
    rows = stored["tightness"]["resnet50"]["rows"]
    rungs = [name.removeprefix("step_ms ") for name in training if name.startswith("step_ms ")]
    four = training["step_ms four"]
    steps, sizes = [], []
    for r in rungs:
        ms = training[f"step_ms {r}"]
        steps.append([r, f"{ms:.1f}", f"{ms / four:.2f}", f"{training[f'temporary_mb {r}']:.1f}"])
    for row in intervals["rows"]:
        cells = [f"{row['lower']:.4f}", f"{row['upper']:.4f}", f"{row['seconds']:.3f}"]
        cells += [f"{row['sedghi_seconds']:.2f}", f"{row['sedghi_seconds_paper']:.1f}"]
        sizes.append([f"{row['name']} {_shape(row)}", *cells])
    total = [f"**{intervals[name]:.1f}**" for name in ("seconds, 17 intervals", "seconds, Sedghi at the true sizes")]
    return {
        "training": _markdown(["rung", "ms", "/ four", "temporaries, MB"], steps),
        "ratios": _ratios(rows),
        "times": _layers(rows, [m for m in _methods(rows) if m not in "RSTU"], "ms", ".3g"),
        "intervals": _markdown(
            ["layer", "lower", "upper", "s", "Sedghi at its size, s", "at the paper's size, s"],
            [*sizes, ["**all**", "", "", *total, f"**{intervals[PAPER]:.0f}**"]],
        ),
    }


def _methods(rows: list[dict[str, Any]]) -> list[str]:
    return [label for label in rows[0] if isinstance(rows[0][label], dict)]


def _layers(rows: list[dict[str, Any]], methods: list[str], key: str, form: str, *more: list[str]) -> str:
    """A row for each layer, a column for each method."""
    titles = [{"grid": "grid 3k"}.get(label, label) for label in methods]
    cells = [
        [
            row["name"] if _shape(row) in row["name"] else f"{row['name']} {_shape(row)}",
            *(format(row[m][key], form) if m in row else "–" for m in methods),
        ]
        for row in rows
    ]
    return _markdown(["layer", *titles], [*cells, *more])


def _ratios(rows: list[dict[str, Any]]) -> str:
    def product(method: str) -> str:
        if not all(method in row for row in rows):
            return "–"
        value = math.prod(row[method]["ratio"] for row in rows)
        return f"**{value:.3g}**" if value > 0.1 else f"**{value:.1e}**"

    methods = _methods(rows)
    return _layers(rows, methods, "ratio", ".3f", ["**product**", *(product(m) for m in methods)])


FAMILIES = {
    "resnet50": "ResNet-50, ImageNet",
    "gaussian": "Gaussian",
    "cifar, plain": "ResNet-8, CIFAR-10, trained plainly",
    "cifar, with the bound": "the same, trained with the bound",
}


def evidence_tables(stored: dict[str, Any]) -> dict[str, str]:
    """Tables of docs/evidence.md by the name of their place in the page."""
    tight, speed, cifar = stored["tightness"], stored["speed"], stored["cifar"]
    families = []
    for key, title in FAMILIES.items():
        f = tight[key]
        four = [f"{f[f'four / sup, {name}']:.3f}" for name in ("mean", "median", "max", "min")]
        products = [f"{f[f'product of {m} / sup']:.3g}" for m in ("four", "weighted", "grid", "interval, upper")]
        families.append([title, str(len(f["rows"])), *four, *products])
    published = [f"{PUBLISHED[name]:.3f}" for name in ("mean", "median", "max", "min")]
    published += [f"{PUBLISHED['product']:g}", "–", "–", "–"]
    families.append(["*published: torchvision's ResNet-18, other weights*", str(PUBLISHED["layers"]), *published])
    peers = speed["peers"]
    value = peers["ms four bounds, value"]
    costs = []
    for name, ms in peers.items():
        if name.startswith("ms ") and name != "ms read the kernels once":
            what, _, kind = name.removeprefix("ms ").rpartition(", ")
            costs.append([what, kind, _number(ms), _number(ms / value)])
    costs.append(["*reading the kernels once*", "", f"{peers['ms read the kernels once']:.1f}", ""])
    growth = []
    for name, sweep in speed["scaling"].items():
        if not name.startswith("exponent"):
            pairs = ", ".join(f"{s}: {t:.2g}" for s, t in zip(sweep["sizes"], sweep["ms"], strict=True))
            growth.append([name, pairs, f"{speed['scaling'][f'exponent {name}']:.2f}"])
    step = stored["core"]["step"]
    titles = {"ours": "four bounds", "miyato": "Flax's heuristic alone", "four_matrices": "paper's formula in JAX"}
    footprint = [[t, f"{step[f'temporary_mb {n}']:.1f}", f"{step[f'compile_s {n}']:.2f}"] for n, t in titles.items()]
    columns = ["layers", "mean", "median", "max", "min", "∏ four", "∏ weighted", "∏ grid 3k", "∏ interval"]
    return {
        "families": _markdown(["kernels", *columns], families),
        "gaussian": _ratios(tight["gaussian"]["rows"]),
        "cifar plain": _ratios(tight["cifar, plain"]["rows"]),
        "cifar bound": _ratios(tight["cifar, with the bound"]["rows"]),
        "peers": _markdown(["", "what", "ms", "/ four bounds"], costs),
        "scaling": _markdown(["sweep", "ms at each size", "exponent"], growth),
        "footprint": _markdown(["", "temporaries, MB", "tracing and compiling, s"], footprint),
        "training": _markdown(list(COLUMNS), [cells(row) for row in summary(cifar)]),
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


def readme_tables(stored: dict[str, Any]) -> dict[str, str]:
    """Tables of README.md by the name of their place in the page."""
    tight, peers = stored["tightness"], stored["speed"]["peers"]
    methods = ("four", "weighted", "grid", "interval, upper", "Miyato")
    families = []
    for key, title in FAMILIES.items():
        f = tight[key]
        four = [f"{f[f'four / sup, {name}']:.2f}" for name in ("mean", "max")]
        families.append([title, str(len(f["rows"])), *four, *(f"{f[f'product of {m} / sup']:.3g}" for m in methods)])
    own = peers["ms four bounds, value"]
    rows = {
        "`f4.step`: all four bounds and their gradient": "four bounds, value",
        "Flax's heuristic: one iteration on T alone, no bound": "Flax's heuristic alone, value",
        "the four matrices in JAX": "paper's formula in JAX, value",
        "the four matrices in PyTorch, as published": "paper's formula in PyTorch, value",
        "the same with the taps outermost": "paper's formula in PyTorch with taps outermost, value",
        "Ryu, one iteration at 224×224": "Ryu, one iteration at 224×224, value",
        "Sedghi in NumPy at 224×224, from a sample, no gradient": "Sedghi in NumPy at 224×224, no gradient",
        "reading the kernels once: the limit": "read the kernels once",
    }
    costs = [[title, _number(peers[f"ms {name}"]), _number(peers[f"ms {name}"] / own)] for title, name in rows.items()]
    chosen = [COLUMNS.index(name) for name in ("arm", "test, %", "train - test", "∏ norms", "s an epoch")]
    arms = [[cells(row)[i] for i in chosen] for row in summary(stored["cifar"])]
    products = ["∏ four", "∏ weighted", "∏ grid 3k", "∏ interval", "∏ Miyato"]
    return {
        "tight": _markdown(["value / norm", "layers", "four: mean", "max", *products], families),
        "cheap": _markdown(["one step, ResNet-18's 20 kernels", "ms", "/ ours"], costs),
        "helps": _markdown([COLUMNS[i] for i in chosen], arms),
    }


PAGES: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], dict[str, str]]]] = {
    "docs/methods.md": (("norms", "tightness"), method_tables),
    "docs/training.md": (("training",), training_tables),
    "docs/evidence.md": (("tightness", "speed", "core", "cifar"), evidence_tables),
    "README.md": (("tightness", "speed", "cifar"), readme_tables),
}


def filled(name: str) -> str:
    """A page, by its path, with the tables of the stored figures."""
    results, make = PAGES[name]
    stored = {result: json.loads((RESULTS / f"{result}-cpu.json").read_text()) for result in results}
    return fill((ROOT / name).read_text(), make(stored))


def main() -> None:
    """Fill every page."""
    for name in PAGES:
        (ROOT / name).write_text(filled(name))
        print(f"wrote the tables of {name}")


if __name__ == "__main__":
    main()
