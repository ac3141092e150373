"""What the bounds cost in training: whole train steps, the layer wrappers, compilation, state; ratios within one run.

    python -m benchmarks.training        # prints a table, writes benchmarks/results/training-cpu.json

Wrappers are timed on the convolutions of ResNet-18, each on its own input: at the sizes of a 32×32 image, batch 8,
and where convolutions cost next to nothing, a single image of one eighth of that.
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
import optax
from flax import linen as nn
from flax import nnx

from benchmarks import harness
from benchmarks.models import ResNet, convolutions, is_convolution, resnet18_cifar, resnet32, resnet50, train_step
from fantastic4 import linen, network, transforms
from fantastic4 import nnx as f4nnx

BATCH = 128
KEY = jax.random.key(0)


def overhead(model: ResNet, rounds: int) -> dict[str, Any]:
    """A train step with and without β Σ bound over the convolutions, and Sedghi's clipping beside it."""
    images = jax.random.normal(KEY, (BATCH, 32, 32, 3))
    labels = jnp.arange(BATCH) % 10
    variables = jax.jit(model.init)(KEY, images)
    params = variables["params"]
    sgd = optax.sgd(0.1, momentum=0.9)
    penalty = transforms.add_spectral_penalty(8e-4, select=is_convolution)
    calls: dict[str, Callable[[], Any]] = {}
    for name, tx in {"plain": sgd, "penalty": optax.chain(penalty, sgd), "plain again": sgd}.items():
        step = jax.jit(train_step(model, tx))
        calls[f"step_ms {name}"] = partial(step, variables, tx.init(params), images, labels)
        jax.block_until_ready(calls[f"step_ms {name}"]())
    state, zeros = penalty.init(params), jax.tree.map(jnp.zeros_like, params)
    alone: dict[str, Callable[[], Any]] = {"penalty_alone_ms": partial(jax.jit(penalty.update), zeros, state, params)}
    result: dict[str, Any] = {"kernels": len(state.network.layers)}
    result |= harness.interleaved(alone, rounds)
    # No warm calls between: they would cost minutes, and steps of seconds have no use for them.
    times = harness.timed(calls, rounds, warm=0)
    # Lower quartiles: a shared machine has many slow steps, by more than the penalty costs, and few that are too fast.
    result |= {name: float(np.quantile(each, 0.25)) for name, each in times.items()}
    clip = transforms.clip_spectrum(
        0.5, {path: shape[:2] for path, (_, shape) in convolutions(model, 32).items()}, every=1
    )
    clip_once = jax.jit(clip.update)
    clip_state = clip.init(params)
    result |= harness.interleaved({"sedghi_clip_ms": lambda: clip_once(zeros, clip_state, params)}, 2, warm=1)
    plain = result["step_ms plain"]
    result["ratio step penalty/plain (target <= 1.02)"] = result["step_ms penalty"] / plain
    # The same program once more: so much is noise.
    result["ratio step plain again/plain"] = result["step_ms plain again"] / plain
    result["ratio (plain + penalty alone)/plain"] = 1 + result["penalty_alone_ms"] / plain
    result["ratio (plain + clipping every 100 steps)/plain"] = 1 + result["sedghi_clip_ms"] / 100 / plain
    return result


def _linen(kind: str, layers: list[Any]) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """A function of params, state and inputs, the same with its gradient, and the first two arguments."""

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, inputs: list[jax.Array]) -> jax.Array:
            total = jnp.zeros(())
            for (fields, _), x in zip(layers, inputs, strict=True):
                layer = nn.Conv(**fields)
                if kind == "flax":
                    y = nn.SpectralNorm(layer)(x, update_stats=True)
                elif kind == "plain":
                    y = layer(x)
                else:
                    y = linen.SpectralBound(layer, mode=kind)(x, update_stats=True)
                total += jnp.mean(y * y)
            return total

    model = Layers()
    inputs = [jnp.ones((1, *shape)) for _, shape in layers]
    variables = dict(jax.jit(model.init)(KEY, inputs))
    params = variables.pop("params")

    def run(params: Any, state: Any, inputs: Any) -> Any:
        total, changed = model.apply({"params": params, **state}, inputs, mutable=[*state, "losses"])
        new: Any = dict(changed)
        return total + sum(jnp.sum(loss) for loss in jax.tree.leaves(new.pop("losses", {}))), new

    return run, jax.value_and_grad(run, has_aux=True), (params, variables)


def _nnx(kind: str, layers: list[Any]) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """The same for NNX."""
    rngs = nnx.Rngs(0)

    def make(fields: dict[str, Any], shape: tuple[int, ...]) -> nnx.Module:
        size, stride = fields["kernel_size"], fields["strides"]
        layer = nnx.Conv(shape[-1], fields["features"], size, strides=stride, use_bias=False, rngs=rngs)
        if kind == "plain":
            return layer
        if kind == "flax":
            return nnx.SpectralNorm(layer, rngs=rngs)
        return f4nnx.SpectralBound(layer, mode=kind, rngs=rngs)

    whole: Any = nnx.List([make(*layer) for layer in layers])
    parts: Any = nnx.split(whole, nnx.Param, ...)
    graph, params, rest = parts

    def loss(model: Any, inputs: Any) -> jax.Array:
        total = jnp.zeros(())
        for layer, x in zip(model, inputs, strict=True):
            y = layer(x) if kind == "plain" else layer(x, update_stats=True)
            total += jnp.mean(y * y)
        return total + f4nnx.penalty(model)

    def run(function: Callable[..., Any], params: Any, state: Any, inputs: Any) -> Any:
        model = nnx.merge(graph, params, state)
        return function(model, inputs), nnx.state(model, nnx.Not(nnx.Param))

    return partial(run, loss), partial(run, nnx.value_and_grad(loss)), (params, rest)


def wrappers(rounds: int) -> dict[str, Any]:
    """Our wrappers and Flax's around the same layers, and the layers bare."""
    result: dict[str, Any] = {}
    for label, smaller, batch in (("32x32, batch 8", 1, 8), ("4x4, batch 1", 8, 1)):
        layers = list(convolutions(resnet18_cifar(), 32 // smaller).values())
        inputs = [jax.random.normal(KEY, (batch, *shape)) for _, shape in layers]
        for framework, build in (("linen", _linen), ("nnx", _nnx)):
            calls: dict[str, Callable[[], Any]] = {}
            for kind in ("plain", "flax", "hard", "penalty"):
                run, gradient, arguments = build(kind, layers)
                calls[f"forward {kind}"] = partial(jax.jit(run), *arguments, inputs)
                calls[f"gradient {kind}"] = partial(jax.jit(gradient), *arguments, inputs)
            times = harness.interleaved(calls, rounds if batch == 1 else max(4, rounds // 4))
            where = f"{framework} {label}"
            result |= {f"ms {where} {name}": value for name, value in times.items()}
            for what, target in (("forward", 2), ("gradient", 1.7)):
                plain, flax = times[f"{what} plain"], times[f"{what} flax"]
                for kind in ("hard", "penalty"):
                    ours = times[f"{what} {kind}"]
                    result[f"ratio {where} {what}, {kind}/flax (target <= {target})"] = ours / flax
                    result[f"added {where} {what}, ({kind} - plain)/(flax - plain)"] = (ours - plain) / (flax - plain)
    return result


def compilation(rounds: int) -> dict[str, Any]:
    """Tracing and compiling a ResNet-50 train step for ImageNet, plain and with the penalty."""
    model = resnet50()
    images, labels = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    variables = jax.eval_shape(model.init, KEY, images)
    sgd = optax.sgd(0.1, momentum=0.9)
    times: dict[str, list[float]] = {"plain": [], "penalty": []}
    processor: dict[str, list[float]] = {"plain": [], "penalty": []}
    for _ in range(max(3, rounds // 10)):
        for name in times:
            tx = optax.chain(transforms.add_spectral_penalty(8e-4), sgd) if name == "penalty" else sgd
            opt_state = jax.eval_shape(tx.init, variables["params"])
            jax.clear_caches()
            begin, begin_processor = time.perf_counter(), time.process_time()
            jax.jit(train_step(model, tx)).lower(variables, opt_state, images, labels).compile()
            times[name].append(time.perf_counter() - begin)
            processor[name].append(time.process_time() - begin_processor)
    result: dict[str, Any] = {f"compile_s {name}": float(np.median(values)) for name, values in times.items()}
    result |= {f"compile_processor_s {name}": float(np.median(values)) for name, values in processor.items()}
    result["ratio compile penalty/plain (target <= 1.3)"] = result["compile_s penalty"] / result["compile_s plain"]
    return result


def state_size(rounds: int) -> dict[str, Any]:
    """Bytes of the penalty's state beside those of ResNet-50's params, layer by layer."""
    del rounds

    def size(tree: Any) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    params = jax.eval_shape(resnet50().init, KEY, jnp.zeros((1, 224, 224, 3)))["params"]
    rows: list[dict[str, Any]] = []
    for layer in network.find(params):
        leaf = {layer.path: network.leaves_at(params, (layer,))[layer.path]}
        state = jax.eval_shape(partial(network.init, specs={layer.path: layer.spec}, key=KEY), leaf)
        rows.append({"path": layer.path, "shape": layer.shape, "bytes": size(leaf), "state_bytes": size(state)})
    whole = jax.eval_shape(partial(network.init, key=KEY), params)
    return {
        "params_mb": size(params) / 1e6,
        "state_mb": size(whole) / 1e6,
        "ratio state/params (target <= 0.02)": size(whole) / size(params),
        "largest share of a layer": max(row["state_bytes"] / row["bytes"] for row in rows),
        "layers": rows,
    }


PARTS = {
    "resnet32": lambda rounds: overhead(resnet32(), rounds),
    "resnet18": lambda rounds: overhead(resnet18_cifar(), max(3, rounds // 3)),
    "wrappers": wrappers,
    "compilation": compilation,
    "state": state_size,
}


if __name__ == "__main__":
    harness.main("training", PARTS, __doc__)
