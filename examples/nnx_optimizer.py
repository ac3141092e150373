"""Flax NNX with nnx.Optimizer: wrapped layers, one line more in the loss.

python -m examples.nnx_optimizer
"""

from __future__ import annotations

import jax
import numpy as np
import optax
from flax import nnx

from benchmarks import data
from fantastic4 import network
from fantastic4 import nnx as f4nnx

BETA = 0.01


class CNN(nnx.Module):
    """Two convolutions and a dense layer, each with its bound."""

    def __init__(self, *, rngs: nnx.Rngs):
        """Make the layers."""
        self.conv1 = f4nnx.SpectralBound(nnx.Conv(1, 16, (5, 5), strides=2, rngs=rngs), rngs=rngs)
        self.conv2 = f4nnx.SpectralBound(nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs), rngs=rngs)
        self.head = f4nnx.SpectralBound(nnx.Linear(7 * 7 * 32, 10, rngs=rngs), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images ``(batch, 28, 28, 1)``."""
        x = nnx.relu(self.conv1(x))
        x = nnx.relu(self.conv2(x))
        return self.head(x.reshape(len(x), -1))


@nnx.jit
def train_step(model: CNN, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
    """One step on cross-entropy + beta · Σ bound."""

    def loss_fn(model: CNN) -> jax.Array:
        loss = optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()
        return loss + BETA * f4nnx.penalty(model)

    loss, gradients = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradients)
    return loss


def main(digits: data.Images, steps: int = 300) -> network.Report:
    """Train on four fifths of the digits, test on the others."""
    train, test = data.split(digits)
    model = CNN(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
    for batch in data.batches(train, 100, steps, seed=0):
        loss = train_step(model, optimizer, *batch)
    frozen = nnx.view(model, update_stats=False)  # evaluation changes nothing
    accuracy = np.mean(np.argmax(frozen(test.images), axis=-1) == test.labels)
    print(f"loss {loss:.3f}, accuracy on {len(test.labels)} unseen digits {accuracy:.1%}\n")
    # What training followed were estimates; these are sound.
    report = network.report(nnx.state(model, nnx.Param))
    print(report)
    return report


if __name__ == "__main__":
    main(data.mnist_5k())
