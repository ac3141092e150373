"""What whole-network bounds cost: a real ResNet-50 traced and bounded, a ResNet-18's penalty in a train step.

python -m benchmarks.lipschitz        # prints a table, writes benchmarks/results/lipschitz-cpu.json
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import data, harness
from benchmarks.models import KerasResNet50, keras_resnet50, resnet18_cifar
from fantastic4 import lipschitz, network


def resnet50(rounds: int) -> dict[str, Any]:
    """Tracing and bounding a Flax ResNet-50 in inference mode with its ImageNet weights, for 224×224 images."""
    model, variables = KerasResNet50(), keras_resnet50(data.resnet50())
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    fn = functools.partial(model.apply, variables)
    result: dict[str, Any] = {}
    times = []
    for i in range(max(4, rounds // 10)):
        begin = time.perf_counter()
        found = lipschitz.bound(fn, image)
        jax.block_until_ready(found)
        times.append(time.perf_counter() - begin)
        if not i:
            result["s the first time, with compiling"] = times.pop()
    result["s again (target <= 10)"] = float(np.median(times))
    result["bound"] = float(found.value)
    result["rows"] = len(found.rows)
    # What the product of the layers' bounds would say, without folding: batch norms by their largest factor.
    kernels = network.bounds(variables["params"], network.find(variables["params"]))
    result["log10 of the bound"] = float(np.log10(result["bound"]))
    scales = [
        float(jnp.max(jnp.abs(p["scale"] / jnp.sqrt(variables["batch_stats"][name]["var"] + 1e-3))))
        for name, p in variables["params"].items()
        if "scale" in p
    ]
    result["log10 of the product of kernels and of batch norms"] = float(
        sum(np.log10(float(v)) for v in kernels.values()) + sum(map(np.log10, scales))
    )
    return result


def resnet18(rounds: int) -> dict[str, Any]:
    """Value and gradient of the whole network's estimate, beside the sum of the four bounds of its kernels."""
    model = resnet18_cifar()
    image = jnp.ones((1, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0), image)
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}

    def fn(params: Any) -> Callable[[jax.Array], Any]:
        return lambda x: model.apply({"params": params, **rest}, x)

    state = lipschitz.init(fn(params), image, key=jax.random.key(1))
    four = network.init(params, key=jax.random.key(1))

    def whole(params: Any, state: Any) -> Any:
        value, state = lipschitz.step(fn(params), image, state)
        return jnp.log(value), state

    calls: dict[str, Callable[[], Any]] = {}
    result: dict[str, Any] = {}
    for name, function, start in (("lipschitz.step", whole, state), ("network.step", network.step, four)):
        compiled = jax.jit(jax.value_and_grad(function, has_aux=True))
        begin = time.perf_counter()
        jax.block_until_ready(compiled(params, start))
        result[f"compile_s {name}"] = time.perf_counter() - begin
        calls[name] = functools.partial(compiled, params, start)
    times = harness.interleaved(calls, rounds)
    result |= {f"ms {name}": value for name, value in times.items()}
    ratio = times["lipschitz.step"] / times["network.step"]
    result["ratio gradient of the network's bound / four-bound step (target <= 3)"] = ratio
    return result


PARTS = {"resnet50": resnet50, "resnet18": resnet18}

if __name__ == "__main__":
    harness.main("lipschitz", PARTS, __doc__)
