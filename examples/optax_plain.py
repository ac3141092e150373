"""Plain functions and optax: the model knows nothing of bounds; the optimiser penalises its norms and holds them.

python -m examples.optax_plain
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fantastic4 as f4
from benchmarks import data
from fantastic4 import network, transforms

MAXIMUM = 3.0
SPECS = {"conv*": f4.ConvSpec(strides=2)}

optimizer = optax.chain(
    transforms.add_spectral_penalty(0.01, specs=SPECS),
    optax.adam(2e-3),
    transforms.project_spectral_norm(MAXIMUM, every=10, specs=SPECS),  # sound: no layer above MAXIMUM after it
)


def init_params(key: jax.Array) -> Any:
    """Two convolutions and a matrix, scaled as He et al. (2015)."""
    shapes = {"conv1": (5, 5, 1, 16), "conv2": (3, 3, 16, 32), "head": (7 * 7 * 32, 10)}
    params = {}
    for name, shape in shapes.items():
        key, used = jax.random.split(key)
        params[name] = {"kernel": jax.nn.initializers.he_normal()(used, shape), "bias": jnp.zeros(shape[-1])}
    return params


def predict(params: Any, x: jax.Array) -> jax.Array:
    """Logits of images ``(batch, 28, 28, 1)``."""
    for name in ("conv1", "conv2"):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        x = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + bias)
    return x.reshape(len(x), -1) @ params["head"]["kernel"] + params["head"]["bias"]


@jax.jit
def train_step(params: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> Any:
    """One step; there is nothing of the bounds in it."""

    def loss_fn(params: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(predict(params, images), labels).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def main(digits: data.Images, steps: int = 300) -> network.Report:
    """Train on all but the last 1,000 digits, test on the others; ``steps`` a multiple of 10 ends on a projection."""
    train, test = data.split(digits)
    params = init_params(jax.random.key(0))
    opt_state = optimizer.init(params)
    for batch in data.batches(train, 100, steps, seed=0):
        params, opt_state, loss = train_step(params, opt_state, *batch)
    accuracy = np.mean(np.argmax(predict(params, test.images), axis=-1) == test.labels)
    print(f"loss {loss:.3f}, accuracy on {len(test.labels)} unseen digits {accuracy:.1%}\n")
    report = network.report(params, specs=SPECS)
    print(report)
    return report


if __name__ == "__main__":
    main(data.mnist_5k())
