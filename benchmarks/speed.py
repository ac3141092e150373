"""What a training step pays for the four bounds, beside what else there is; how that grows; how near the limit it is.

    python -m benchmarks.speed           # prints a table, writes benchmarks/results/speed-BACKEND.json

"peers": one warm step with its gradient over the 20 kernels of ResNet-18, all timed in turn in one process. A row
"value" is a penalty: a number and its gradient. A row "normalised" divides the kernel, as the layers of Flax, Equinox
and PyTorch do: here of a layer that only multiplies its kernel by a constant, so that no convolution is timed. The
rows of PyTorch need ``pip install torch`` and are left out without it. The paper's formula in PyTorch is written anew
here: the four matrices, one iteration of power method on each, √(hw) times their least value; once with the order of
axes that the paper's authors use, once with another that is faster here.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import fantastic4 as f4
from benchmarks import harness, models, norms
from benchmarks.core import contenders, ours, resnet18
from benchmarks.models import convolutions
from fantastic4 import heuristics

KEY = jax.random.key(0)


class Kernel(nn.Module):
    """Nothing but a kernel, in linen: returns ⟨kernel, x⟩."""

    value: jax.Array

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The inner product."""
        return jnp.vdot(self.param("kernel", lambda _: self.value), x)


class NnxKernel(nnx.Module):
    """The same in NNX."""

    def __init__(self, value: jax.Array) -> None:
        self.kernel = nnx.Param(value)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The inner product."""
        return jnp.vdot(self.kernel[...], x)


class EqxKernel(eqx.Module):
    """The same in Equinox, which takes output channels first."""

    weight: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """The inner product."""
        return jnp.vdot(self.weight, x)


def _linen_step(kernels: list[jax.Array]) -> Callable[[], Any]:
    layers = [nn.SpectralNorm(Kernel(k)) for k in kernels]
    variables = [dict(layer.init(KEY, k, update_stats=False)) for layer, k in zip(layers, kernels, strict=True)]
    params, state = [v.pop("params") for v in variables], variables

    def total(params: Any, state: Any) -> Any:
        done = [
            layer.apply({"params": p, **s}, k, update_stats=True, mutable=list(s))
            for layer, p, s, k in zip(layers, params, state, kernels, strict=True)
        ]
        return sum(value for value, _ in done), [new for _, new in done]

    return partial(jax.jit(jax.value_and_grad(total, has_aux=True)), params, state)


def _nnx_step(kernels: list[jax.Array]) -> Callable[[], Any]:
    rngs = nnx.Rngs(0)
    model = nnx.List([nnx.SpectralNorm(NnxKernel(k), rngs=rngs) for k in kernels])
    parts: Any = nnx.split(model, nnx.Param, ...)
    graph, params, rest = parts

    def run(params: Any, state: Any) -> Any:
        whole = nnx.merge(graph, params, state)

        def total(model: Any) -> jax.Array:
            return sum((m(k, update_stats=True) for m, k in zip(model, kernels, strict=True)), jnp.zeros(()))

        return nnx.value_and_grad(total)(whole), nnx.state(whole, nnx.Not(nnx.Param))

    return partial(jax.jit(run), params, rest)


def _equinox_step(kernels: list[jax.Array]) -> Callable[[], Any]:
    weights = [k.transpose(3, 2, 0, 1) for k in kernels]
    made = [eqx.nn.make_with_state(eqx.nn.SpectralNorm)(EqxKernel(w), "weight", key=KEY) for w in weights]
    layers, states = [layer for layer, _ in made], [state for _, state in made]

    def total(layers: Any, states: Any) -> Any:
        done = [layer(w, state) for layer, w, state in zip(layers, weights, states, strict=True)]
        return sum(value for value, _ in done), [state for _, state in done]

    step: Any = eqx.filter_jit(eqx.filter_value_and_grad(total, has_aux=True))
    return partial(step, layers, states)


def _torch_steps(kernels: list[jax.Array]) -> dict[str, Callable[[], Any]]:
    """PyTorch's own parametrisation, and the paper's formula."""
    torch: Any = importlib.import_module("torch")
    weights = [torch.tensor(np.asarray(k.transpose(3, 2, 0, 1))) for k in kernels]
    layers = []
    for weight in weights:
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(weight.clone())
        layers.append(torch.nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=1).train())

    def normalised() -> Any:
        for layer in layers:
            layer.parametrizations.weight.original.grad = None
        total = sum((layer.weight * w).sum() for layer, w in zip(layers, weights, strict=True))
        total.backward()
        return total.item()

    def as_published(kernel: Any) -> list[Any]:
        c_out, c_in, h, w = kernel.shape
        return [
            kernel.transpose(1, 2).reshape(c_out * h, c_in * w),
            kernel.transpose(1, 3).reshape(c_out * w, c_in * h),
            kernel.reshape(c_out, c_in * h * w),
            kernel.transpose(0, 1).reshape(c_in, c_out * h * w),
        ]

    def taps_outermost(kernel: Any) -> list[Any]:
        c_out, c_in, h, w = kernel.shape
        return [
            kernel.permute(2, 0, 3, 1).reshape(h * c_out, w * c_in),
            kernel.permute(3, 0, 2, 1).reshape(w * c_out, h * c_in),
            kernel.reshape(c_out, c_in * h * w),
            kernel.permute(0, 2, 3, 1).reshape(c_out * h * w, c_in),
        ]

    def formula(matrices: Callable[[Any], list[Any]]) -> Callable[[], Any]:
        """One iteration on each matrix without a gradient, vᵀ M u with one, √(hw) times the least."""
        params = [weight.clone().requires_grad_() for weight in weights]
        vectors = [[torch.ones(m.shape[1]) for m in matrices(weight)] for weight in weights]
        unit = partial(torch.nn.functional.normalize, dim=0)

        def step() -> Any:
            total = torch.zeros(())
            for weight, us in zip(params, vectors, strict=True):
                weight.grad = None
                norms = []
                for i, matrix in enumerate(matrices(weight)):
                    with torch.no_grad():
                        v = unit(torch.mv(matrix, us[i]))
                        us[i] = unit(torch.mv(matrix.T, v))
                    norms.append(torch.dot(v, torch.mv(matrix, us[i])))
                total = total + math.sqrt(weight.shape[2] * weight.shape[3]) * torch.stack(norms).min()
            total.backward()
            return total.item()

        return step

    return {
        "paper's formula in PyTorch, value": formula(as_published),
        "paper's formula in PyTorch with taps outermost, value": formula(taps_outermost),
        "PyTorch's spectral_norm, normalised": normalised,
    }


def _normalised_step(kernels: list[jax.Array]) -> Callable[[], Any]:
    """Ours, of the same layers: ⟨kernel / bound, x⟩."""
    targets = [jnp.array(k) for k in kernels]  # copies, as the layers' inputs are for the others

    def total(kernels: list[jax.Array], states: Any) -> Any:
        steps = [f4.step(k, s) for k, s in zip(kernels, states, strict=True)]
        divided = [k / four.min() for k, (four, _) in zip(kernels, steps, strict=True)]
        return sum(map(jnp.vdot, divided, targets)), [state for _, state in steps]

    return _gradient(total, kernels, contenders(kernels)["ours"][1])


def _ryu_step(kernels: list[jax.Array], layers: list[tuple[int, f4.ConvSpec]]) -> Callable[[], Any]:
    states = [
        heuristics.ryu_init(k, (n, n), spec, key=KEY, warmup=0) for k, (n, spec) in zip(kernels, layers, strict=True)
    ]

    def total(kernels: list[jax.Array], states: Any) -> Any:
        steps = [heuristics.ryu_step(k, s, spec) for k, s, (_, spec) in zip(kernels, states, layers, strict=True)]
        return sum(value for value, _ in steps), [state for _, state in steps]

    return _gradient(total, kernels, states)


def _gradient(function: Callable[..., Any], kernels: list[jax.Array], state: Any) -> Callable[[], Any]:
    return partial(jax.jit(jax.value_and_grad(function, has_aux=True)), kernels, state)


def layers() -> list[tuple[int, f4.ConvSpec]]:
    """Side of the input, for images of 224×224, and strides of the layers of `benchmarks.core.resnet18`'s kernels."""
    found = convolutions(models.resnet18(), 224).values()
    return [(shape[0], f4.ConvSpec(strides=fields["strides"] or 1)) for fields, shape in found]


def peers(rounds: int) -> dict[str, Any]:
    """One warm step with its gradient of each, and Sedghi's formula in NumPy, without strides, for all kernels."""
    kernels = resnet18()
    titles = {"ours": "four bounds", "miyato": "Flax's heuristic alone", "four_matrices": "paper's formula in JAX"}
    calls: dict[str, Callable[[], Any]] = {
        f"{titles[name]}, value": _gradient(function, kernels, state)
        for name, (function, state) in contenders(kernels).items()
    }
    calls |= {
        "four bounds, normalised": _normalised_step(kernels),
        "Flax linen SpectralNorm, normalised": _linen_step(kernels),
        "Flax NNX SpectralNorm, normalised": _nnx_step(kernels),
        "Equinox SpectralNorm, normalised": _equinox_step(kernels),
        "read the kernels once": partial(jax.jit(lambda kernels: [jnp.sum(k) for k in kernels]), kernels),
    }
    times = harness.interleaved(calls, rounds)
    # Apart, in the same process: threads of PyTorch's pool spin for a while after a call, on cores that the next needs.
    if importlib.util.find_spec("torch"):
        times |= harness.interleaved(_torch_steps(kernels), rounds)
    # It takes a tenth of a second: apart, or the others would find cold caches.
    where = layers()
    times |= harness.interleaved({"Ryu, one iteration at 224×224, value": _ryu_step(kernels, where)}, 3, warm=1)
    result: dict[str, Any] = {f"ms {name}": value for name, value in times.items()}
    sedghi = sum(norms.sedghi_seconds(np.asarray(k), n) for k, (n, _) in zip(kernels, where, strict=True))
    result["ms Sedghi in NumPy at 224×224, no gradient"] = 1e3 * sedghi
    value = result["ms four bounds, value"]
    result["ratio four bounds / Flax's heuristic (target <= 1.7)"] = value / result["ms Flax's heuristic alone, value"]
    if "ms paper's formula in PyTorch, value" in result:
        paper = result["ms paper's formula in PyTorch, value"]
        result["ratio paper's formula in PyTorch / four bounds (target >= 10)"] = paper / value
    own = result["ms four bounds, normalised"]
    for peer in ("Flax linen SpectralNorm", "Flax NNX SpectralNorm", "Equinox SpectralNorm"):
        result[f"ratio four bounds / {peer}, normalised"] = own / result[f"ms {peer}, normalised"]
    return result


def _step_of(kernels: list[jax.Array]) -> Callable[[], Any]:
    return _gradient(ours, kernels, [f4.init(k, key=KEY, warmup=0) for k in kernels])


def _exponent(sizes: list[int], times: list[float]) -> float:
    """Of the power law through the larger half, where fixed costs no longer show."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(times[half:]), 1)[0])


def scaling(rounds: int) -> dict[str, Any]:
    """How time grows: a sweep at a time, all its sizes timed in turn."""

    def kernel(h: int, c: int) -> jax.Array:
        return jax.random.normal(KEY, (h, h, c, c)) / (h * math.sqrt(c))

    fixed = kernel(3, 64)
    states = {n: heuristics.ryu_init(fixed, (n, n), key=KEY, warmup=0) for n in (8, 16, 32, 64, 128)}
    ryu = jax.jit(jax.value_and_grad(heuristics.ryu_step, has_aux=True))
    four = jax.jit(jax.value_and_grad(lambda k, s: ours([k], [s]), has_aux=True))
    own = f4.init(fixed, key=KEY, warmup=0)
    sweeps: dict[str, dict[int, Callable[[], Any]]] = {
        "channels, four bounds": {c: _step_of([kernel(3, c)]) for c in (32, 64, 128, 256, 512, 1024)},
        "kernel size, four bounds": {h: _step_of([kernel(h, 128)]) for h in (1, 3, 5, 7, 9, 11)},
        "depth, four bounds": {
            d: _step_of([jax.random.normal(jax.random.fold_in(KEY, i), (3, 3, 64, 64)) for i in range(d)])
            for d in (1, 2, 4, 8, 16, 32)
        },
        "input size, four bounds": {n: partial(four, fixed, own) for n in states},
        "input size, Ryu's iteration": {n: partial(ryu, fixed, state) for n, state in states.items()},
        "input size, exact norm": {n: partial(jax.jit(f4.exact_norm, static_argnums=1), fixed, (n, n)) for n in states},
    }
    result: dict[str, Any] = {}
    for name, calls in sweeps.items():
        times = harness.interleaved({str(size): call for size, call in calls.items()}, rounds, warm=2)
        result[f"exponent {name}"] = _exponent(list(calls), list(times.values()))
        result[name] = {"sizes": list(calls), "ms": list(times.values())}
    return result


def roofline(rounds: int) -> dict[str, Any]:
    """The least that a step must move against what it takes.

    It reads each kernel twice, for the two halves of the iteration, and writes a gradient of its size: three passes
    over memory that does not fit a cache. The bandwidths are those of a sum and of a copy of 128 MB.
    """
    kernels = resnet18()
    large = jnp.ones(2**25, jnp.float32)
    calls: dict[str, Callable[[], Any]] = {
        "four bounds": _step_of(kernels),
        "sum": partial(jax.jit(jnp.sum), large),
        "copy": partial(jax.jit(lambda x: x * 2), large),
    }
    times = harness.interleaved(calls, rounds)
    total = sum(k.nbytes for k in kernels)
    read, write = large.nbytes / times["sum"] / 1e6, 2 * large.nbytes / times["copy"] / 1e6
    least = (2 * total / read + total / write) / 1e6
    return {
        "GB/s, sum": read, "GB/s, copy": write,
        "ms three passes over the kernels": least,
        "ms four bounds": times["four bounds"],
        "ratio step / three passes": times["four bounds"] / least,
    }  # fmt: skip


PARTS = {"peers": peers, "scaling": scaling, "roofline": roofline}


if __name__ == "__main__":
    harness.main("speed", PARTS, __doc__)
