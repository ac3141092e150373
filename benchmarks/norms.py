"""What each norm costs: steps of the rungs, spectra, intervals, on the 17 spatial kernels of a real ResNet-50.

    python -m benchmarks.norms           # prints a table, writes benchmarks/results/norms-cpu.json

Sedghi's formula in NumPy runs with NumPy's BLAS at its best, in a process without OPENBLAS_CORETYPE and
OPENBLAS_L2_SIZE. At the paper's sizes its time is estimated from a sample of frequencies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fantastic4 as f4
from benchmarks import data, harness
from benchmarks.harness import interleaved


def sedghi(kernel: np.ndarray, n: int) -> np.ndarray:
    """All singular values of the circular convolution, as Sedghi et al. print it."""
    return np.linalg.svd(np.fft.fft2(kernel, (n, n), axes=(0, 1)), compute_uv=False)


def sedghi_seconds(kernel: np.ndarray, n: int) -> float:
    """Seconds of `sedghi`: of as many channels and frequencies as take a second or so, scaled up to all."""
    c_in, c_out = kernel.shape[-2:]
    some = min(c_out, max(1, 2**26 // (n * n * c_in)))
    begin = time.perf_counter()
    transformed = np.fft.fft2(kernel[..., :some], (n, n), axes=(0, 1))
    transform = (time.perf_counter() - begin) * c_out / some
    count = min(n * n, 2**24 // max(c_in, c_out) ** 2)
    frequencies = 2 * np.pi * np.random.default_rng(0).integers(0, n, (count, 2)) / n
    taps = np.indices(kernel.shape[:2]).reshape(2, -1)
    symbols = np.tensordot(np.exp(-1j * frequencies @ taps), kernel.reshape(-1, c_in, c_out), 1)
    symbols = symbols.astype(transformed.dtype)
    begin = time.perf_counter()
    np.linalg.svd(symbols, compute_uv=False)
    return transform + (time.perf_counter() - begin) * n * n / count


def intervals(rounds: int) -> dict[str, Any]:
    """norm_interval(rtol=1e-3), any input size, against Sedghi's formula at one."""
    del rounds
    rows, ours, first, product = [], 0.0, 0.0, 1.0
    true_sizes, paper_sizes = 0.0, 0.0
    for name, kernel, stride, size, paper in data.resnet50_spatial_kernels():
        spec = f4.ConvSpec(strides=stride)
        begin = time.perf_counter()
        f4.norm_interval(kernel, spec)
        first += time.perf_counter() - begin
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            interval = f4.norm_interval(kernel, spec)
            times.append(time.perf_counter() - begin)
        here, there = sedghi_seconds(kernel, size), sedghi_seconds(kernel, paper)
        rows.append({
            "name": name, "shape": kernel.shape, "lower": interval.lower, "upper": interval.upper,
            "seconds": float(np.median(times)), "sedghi_seconds": here, "sedghi_seconds_paper": there,
        })  # fmt: skip
        ours += float(np.median(times))
        true_sizes += here
        paper_sizes += there
        product *= interval.upper / interval.lower
    return {
        "seconds, 17 intervals": ours,
        "seconds, first calls, compiling": first,
        "seconds, Sedghi at the true sizes": true_sizes,
        "seconds, Sedghi at the paper's sizes": paper_sizes,
        "ratio ours / Sedghi, true sizes (target <= 0.333)": ours / true_sizes,
        "ratio ours / Sedghi, paper's sizes (target <= 0.05)": ours / paper_sizes,
        "ratio product of upper / lower (target <= 1.02)": product,
        "rows": rows,
    }


def training(rounds: int) -> dict[str, Any]:
    """Value and gradient of the sum over the 17 kernels, one warm step of each rung."""
    kernels = data.resnet50_spatial_kernels()
    arrays, specs = [jnp.asarray(k.kernel) for k in kernels], [f4.ConvSpec(strides=k.stride) for k in kernels]
    calls: dict[str, Callable[[], Any]] = {}
    result: dict[str, Any] = {}
    rungs: dict[str, tuple[str, int | None]] = {
        "four": ("four", None), "weighted": ("weighted", None), "grid 6": ("grid", 6), "grid 8": ("grid", 8),
    }  # fmt: skip
    for label, (method, points) in rungs.items():
        states = [
            f4.ladder.init(k, s, key=jax.random.key(i), method=method, points=points, warmup=50)
            for i, (k, s) in enumerate(zip(arrays, specs, strict=True))
        ]

        def total(arrays: Any, states: Any) -> Any:
            steps = [f4.ladder.step(k, state, s) for k, state, s in zip(arrays, states, specs, strict=True)]
            return sum(value for value, _ in steps), ([value for value, _ in steps], [state for _, state in steps])

        compiled = jax.jit(jax.value_and_grad(total, has_aux=True)).lower(arrays, states).compile()
        memory = compiled.memory_analysis()
        result[f"temporary_mb {label}"] = memory.temp_size_in_bytes / 1e6 if memory else math.nan
        calls[f"step_ms {label}"] = partial(compiled, arrays, states)
        result[f"values {label}"] = [float(v) for v in compiled(arrays, states)[0][1][0]]
    result |= interleaved(calls, rounds)
    for label, target in (("weighted", 2), ("grid 6", 6), ("grid 8", 10)):
        result[f"ratio step {label} / four (target <= {target})"] = result[f"step_ms {label}"] / result["step_ms four"]
    result["ratio largest weighted / four, never above 1"] = max(
        w / f for w, f in zip(result["values weighted"], result["values four"], strict=True)
    )
    return result


def spectra(rounds: int) -> dict[str, Any]:
    """exact_norm, the full spectrum, and NumPy, Gaussian kernels."""
    result: dict[str, Any] = {}
    for channels, n, wanted in ((128, 28, 5), (512, 7, 3)):
        kernel = np.random.default_rng(0).standard_normal((3, 3, channels, channels)).astype(np.float32)
        on_device = jnp.asarray(kernel)
        label = f"3x3x{channels}x{channels} at {n}x{n}"
        times = interleaved(
            {
                "spectrum": partial(f4.singular_values, on_device, (n, n)),
                "numpy": partial(sedghi, kernel, n),
                "exact": partial(f4.exact_norm, on_device, (n, n)),
            },
            max(3, rounds // 6),
        )
        result |= {f"{name}_ms {label}": value for name, value in times.items()}
        result[f"ratio spectrum / exact_norm, {label} (target >= {wanted})"] = times["spectrum"] / times["exact"]
        result[f"ratio numpy / spectrum, {label} (target >= 2)"] = times["numpy"] / times["spectrum"]
    return result


def matrices(rounds: int) -> dict[str, Any]:
    """How far dense.bound is above the norm, in float32."""
    del rounds
    rng, result = np.random.default_rng(0), {}
    for kind, sizes in (
        ("Gaussian", ((128, 1152), (512, 4608), (1536, 1536))),
        ("orthogonal", ((300, 300), (512, 512), (2048, 2048))),
    ):
        for rows, columns in sizes:
            matrix = rng.standard_normal((rows, columns))
            matrix = np.linalg.qr(matrix)[0] if kind == "orthogonal" else matrix
            given = jnp.asarray(matrix, jnp.float32)
            norm = np.linalg.norm(np.asarray(given, np.float64), 2)
            result[f"dense.bound / norm - 1, {kind} {rows}x{columns}"] = float(f4.dense.bound(given)) / norm - 1
    return result


PARTS = {"training": training, "spectra": spectra, "intervals": intervals, "matrices": matrices}

if __name__ == "__main__":
    harness.main("norms", PARTS, __doc__)
