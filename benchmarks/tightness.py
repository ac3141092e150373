"""How close each method comes to the norm, and what a call costs: the paper's Table 1, on kernels all can have.

    python -m benchmarks.tightness           # prints a table, writes benchmarks/results/tightness-BACKEND.json

Value / σ∞, σ∞ the norm over all input sizes: the lower end of an interval of width 1e-4 (Gaussian: 1e-3). Families: the
17 spatial kernels of a ResNet-50 trained on ImageNet (`make data`); Gaussian ones; the convolutions of a ResNet trained
on CIFAR-10, plainly and with the bound in its loss (`python -m benchmarks.train_cifar` trains and keeps them).

Bounds: R, S, T, U, their minimum, weighted, hybrid, grid, gram, gram_conv, the upper end of `norm_interval`. Estimates:
Sedghi and Ryu are of the layer at its own input size, TNN and Miyato of the kernel.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fantastic4 as f4
from benchmarks import data, harness, train_cifar

# Singla & Feizi 2021, Table 1: torchvision's ResNet-18, whose weights no package carries: OTHER WEIGHTS than any here.
PUBLISHED = {"layers": 17, "mean": 1.286, "median": 1.221, "max": 1.815, "min": 1.016, "product": 58.4}
BOUNDS = ("R", "S", "T", "U", "four", "weighted", "hybrid", "grid", "grid 8", "gram", "gram_conv", "interval, upper")


class Case(NamedTuple):
    """A layer.

    Attributes:
      name: of it.
      kernel: ``(h, w, c_in, c_out)``.
      size: side of its input.
      stride: of the layer.
      rtol: of the norm; a Gaussian kernel is nearly as large at many frequencies, and each has to be excluded.
    """

    name: str
    kernel: np.ndarray
    size: int
    stride: int = 1
    rtol: float = 1e-4


def _upper(kernel: jax.Array, spec: f4.ConvSpec) -> float:
    return f4.norm_interval(kernel, spec).upper


def methods_of(case: Case) -> dict[str, Callable[[], Any]]:
    """What is measured on a layer, by name, without R, S, T, U."""
    kernel, key = jnp.asarray(case.kernel), jax.random.key(0)
    spec, size = f4.ConvSpec(strides=case.stride), (case.size, case.size)
    circular = f4.ConvSpec(strides=case.stride, padding="CIRCULAR")
    methods: dict[str, Callable[[], Any]] = {
        method: partial(f4.bound, kernel, spec, method=method)
        for method in ("four", "weighted", "hybrid", "grid", "gram")
    }
    methods["grid 8"] = partial(f4.bound, kernel, spec, method="grid", points=8)
    if kernel.shape[-1] <= 256:  # its own kernels grow to 17×17 taps
        methods["gram_conv"] = partial(f4.bound, kernel, spec, method="gram_conv")
    return methods | {
        "interval, upper": partial(_upper, kernel, spec),
        "Sedghi, exact at its size": partial(f4.exact_norm, kernel, size, circular),
        "Ryu, 50 iterations": partial(f4.estimate_ryu, kernel, size, spec, key=key),
        "TNN": partial(f4.estimate_tnn, kernel, spec, key=key),
        "Miyato": partial(f4.estimate_miyato, kernel),
    }


def measure(case: Case) -> dict[str, Any]:
    """A row: every method's value / σ∞ and the median of three calls in milliseconds."""
    spec = f4.ConvSpec(strides=case.stride)
    truth = f4.norm_interval(case.kernel, spec, rtol=case.rtol)
    row: dict[str, Any] = {"name": case.name, "shape": case.kernel.shape, "sup": [truth.lower, truth.upper]}
    four = f4.four_bounds(jnp.asarray(case.kernel), spec)
    row |= {name: {"ratio": float(value) / truth.lower} for name, value in zip(four.names, four.values, strict=True)}
    for label, method in methods_of(case).items():
        value, times = float(jax.block_until_ready(method())), []
        for _ in range(3):
            begin = time.perf_counter()
            jax.block_until_ready(method())
            times.append(1e3 * (time.perf_counter() - begin))
        row[label] = {"ratio": value / truth.lower, "ms": float(np.median(times))}
    below = [label for label in BOUNDS if label in row and row[label]["ratio"] < 1]
    if below:
        raise AssertionError(f"{case.name}: {', '.join(below)} below the norm: {row}")
    return row


def rows_of(cases: Iterator[Case]) -> dict[str, Any]:
    """A family: its rows, the products over its layers, how the four bounds fare."""
    rows = []
    for case in cases:
        rows.append(measure(case))
        jax.clear_caches()  # of no use to the next; with some hundred programs XLA's compiler was seen to stand still
    labels = [label for label in rows[0] if isinstance(rows[0][label], dict)]
    products = {
        f"product of {label} / sup": math.prod(row[label]["ratio"] for row in rows)
        for label in labels
        if all(label in row for row in rows)
    }
    four = np.array([row["four"]["ratio"] for row in rows])
    statistics = {"mean": four.mean(), "median": np.median(four), "max": four.max(), "min": four.min()}
    return products | {f"four / sup, {name}": float(value) for name, value in statistics.items()} | {"rows": rows}


def _resnet50() -> Iterator[Case]:
    for name, kernel, stride, size, _ in data.resnet50_spatial_kernels():
        yield Case(name, kernel, size, stride)


def _gaussian() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for h, c_in, c_out, size in (
        (1, 64, 128, 28), (3, 3, 64, 32), (3, 64, 64, 28), (3, 32, 128, 14), (5, 16, 64, 12), (5, 32, 32, 12),
        (7, 3, 64, 112), (7, 16, 16, 28),
    ):  # fmt: skip
        kernel = rng.standard_normal((h, h, c_in, c_out)).astype(np.float32)
        yield Case(f"Gaussian {h}×{h}×{c_in}×{c_out}", kernel, size, rtol=1e-3)


def _cifar(arm: str) -> Iterator[Case]:
    where = train_cifar.circular_layers(train_cifar.Setting().model)
    for path, kernel in train_cifar.kernels(arm, seed=0).items():
        spec, shape = where[path]
        yield Case(path.removesuffix("/kernel"), kernel, shape[0], int(np.max(spec.strides)))


PARTS = {
    "resnet50": lambda rounds: rows_of(_resnet50()),
    "gaussian": lambda rounds: rows_of(_gaussian()),
    "cifar, plain": lambda rounds: rows_of(_cifar("none")),
    "cifar, with the bound": lambda rounds: rows_of(_cifar(train_cifar.bound_arm(train_cifar.BETAS[1]))),
}


if __name__ == "__main__":
    harness.main("tightness", PARTS, __doc__)
