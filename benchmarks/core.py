"""What the core costs, as ratios within one run: the step of all bounds, its compilation and memory, the spectrum.

    python -m benchmarks.core            # prints a table, writes benchmarks/results/core-cpu.json

NumPy's BLAS runs at its best: the spectrum part runs in a process of its own without OPENBLAS_CORETYPE
and OPENBLAS_L2_SIZE, which some machines set.
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
from benchmarks import harness
from benchmarks.harness import interleaved


def resnet18_shapes() -> list[tuple[int, ...]]:
    """The 20 kernels of ResNet-18."""
    shapes: list[tuple[int, ...]] = [(7, 7, 3, 64)]
    channels = 64
    for stage in range(4):
        for _ in range(2):
            out = 64 * 2**stage
            shapes += [(3, 3, channels, out), (3, 3, out, out)]
            if channels != out:
                shapes.append((1, 1, channels, out))
            channels = out
    return shapes


def resnet18() -> list[jax.Array]:
    """Gaussian kernels of those shapes, of the size that initialisation gives them."""
    key = jax.random.key(7)
    return [
        jax.random.normal(jax.random.fold_in(key, i), s) / math.sqrt(math.prod(s[:-1]))
        for i, s in enumerate(resnet18_shapes())
    ]


def ours(kernels: list[jax.Array], states: list[f4.PowerState]) -> Any:
    """Σ min(R, S, T, U), one step."""
    steps = [f4.step(k, s) for k, s in zip(kernels, states, strict=True)]
    return sum(four.min() for four, _ in steps), [state for _, state in steps]


def _unit(x: jax.Array) -> jax.Array:
    return x / (jnp.linalg.norm(x) + 1e-12)


def _one_iteration(matrix: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    constant = jax.lax.stop_gradient(matrix)
    v = _unit(constant.T @ u)
    u = _unit(constant @ v)
    return u @ (matrix @ v), u


def miyato(kernels: list[jax.Array], states: list[jax.Array]) -> Any:
    """Σ of the heuristic: one iteration on T alone, with row vectors, as Flax's SpectralNorm does it."""
    total, new = jnp.zeros(()), []
    for k, u in zip(kernels, states, strict=True):
        matrix = k.reshape(-1, k.shape[-1])
        constant = jax.lax.stop_gradient(matrix)
        v = _unit(u @ constant.T)
        u = _unit(v @ constant)
        total += (v @ matrix @ u.T)[0, 0]
        new.append(u)
    return total, new


def four_matrices(kernels: list[jax.Array], states: list[list[jax.Array]]) -> Any:
    """Σ min(R, S, T, U) by building the four matrices, an iteration on each."""
    total, new = jnp.zeros(()), []
    for k, vectors in zip(kernels, states, strict=True):
        h, w, i, o = k.shape
        matrices = [
            k.transpose(0, 3, 1, 2).reshape(h * o, w * i),
            k.transpose(1, 3, 0, 2).reshape(w * o, h * i),
            k.reshape(-1, o).T,
            k.transpose(0, 1, 3, 2).reshape(-1, i),
        ]
        steps = [_one_iteration(m, u) for m, u in zip(matrices, vectors, strict=True)]
        total += math.sqrt(h * w) * jnp.min(jnp.stack([value for value, _ in steps]))
        new.append([u for _, u in steps])
    return total, new


def contenders(kernels: list[jax.Array]) -> dict[str, tuple[Callable[..., Any], Any]]:
    """The three functions above by their names, each with a state to start from."""
    shapes = [k.shape for k in kernels]
    states: dict[Callable[..., Any], Any] = {
        ours: [f4.init(k, key=jax.random.key(i)) for i, k in enumerate(kernels)],
        miyato: [jnp.ones((1, o)) for *_, o in shapes],
        four_matrices: [[jnp.ones(n) for n in (h * o, w * o, o, h * w * o)] for h, w, _, o in shapes],
    }
    return {function.__name__: (function, state) for function, state in states.items()}


def step_cost(rounds: int) -> dict[str, Any]:
    """Value and gradient of the sum over ResNet-18's 20 kernels."""
    kernels = resnet18()
    calls: dict[str, Callable[[], Any]] = {}
    result: dict[str, Any] = {}
    for name, (function, start) in contenders(kernels).items():
        begin = time.perf_counter()
        traced = jax.jit(jax.value_and_grad(function, has_aux=True)).lower(kernels, start)
        step = traced.compile()
        result[f"compile_s {name}"] = time.perf_counter() - begin
        memory = step.memory_analysis()
        result[f"temporary_mb {name}"] = memory.temp_size_in_bytes / 1e6 if memory else math.nan
        calls[f"step_ms {name}"] = partial(step, kernels, start)
        forward = jax.jit(function).lower(kernels, start).compile()
        calls[f"forward_ms {name}"] = partial(forward, kernels, start)
    read = jax.jit(lambda kernels: [jnp.sum(k) for k in kernels])
    calls["read_weights_once_ms"] = lambda: read(kernels)
    result |= interleaved(calls, rounds)
    again: Any = jax.jit(jax.value_and_grad(ours, has_aux=True))
    (_, state), _ = again(kernels, contenders(kernels)["ours"][1])
    again(kernels, state)
    result["programs_after_two_calls"] = again._cache_size()
    result["largest_kernel_mb"] = max(k.nbytes for k in kernels) / 1e6
    result["ratio step ours/miyato (target <= 1.7)"] = result["step_ms ours"] / result["step_ms miyato"]
    result["ratio step four_matrices/ours (target >= 10)"] = result["step_ms four_matrices"] / result["step_ms ours"]
    return result


def spectrum_cost(rounds: int) -> dict[str, Any]:
    """All singular values, 3×3×128×128 at 28×28, against Sedghi's NumPy formula."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, 128, 128)).astype(np.float32)
    on_device = jnp.asarray(kernel)
    calls: dict[str, Callable[[], Any]] = {
        "spectrum_ms ours": lambda: f4.singular_values(on_device, (28, 28)),
        "spectrum_ms numpy": lambda: np.linalg.svd(np.fft.fft2(kernel, (28, 28), axes=(0, 1)), compute_uv=False),
        "exact_norm_ms": lambda: f4.exact_norm(on_device, (28, 28)),
    }
    truth = np.sort(calls["spectrum_ms numpy"]().ravel())[::-1]
    error = float(np.abs(np.asarray(calls["spectrum_ms ours"]()) - truth).max() / truth[0])
    result: dict[str, Any] = interleaved(calls, max(2, rounds // 5))
    result["spectrum largest difference / norm"] = error
    result["ratio spectrum numpy/ours (target >= 2)"] = result["spectrum_ms numpy"] / result["spectrum_ms ours"]
    return result


PARTS = {"step": step_cost, "spectrum": spectrum_cost}


if __name__ == "__main__":
    harness.main("core", PARTS, __doc__)
