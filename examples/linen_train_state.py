"""Flax linen with a TrainState: wrapped layers sow their bounds into the loss, their state lives beside the params.

python -m examples.linen_train_state
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state

from benchmarks import data
from fantastic4 import linen, network

BETA = 0.01


class CNN(nn.Module):
    """Two drop-in convolutions and a wrapped dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images ``(batch, 28, 28, 1)``."""
        x = nn.relu(linen.Conv(16, (5, 5), strides=2)(x))
        x = nn.relu(linen.Conv(32, (3, 3), strides=2)(x))
        return linen.SpectralBound(nn.Dense(10))(x.reshape(len(x), -1))


class TrainState(train_state.TrainState):
    """Flax's, with the state of the bounds: one field more in checkpoints."""

    spectral_stats: Any


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
    """One step on cross-entropy + beta · Σ bound."""

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "spectral_stats": state.spectral_stats}
        logits, new = state.apply_fn(variables, images, mutable=["spectral_stats", "losses"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        penalty = sum(jax.tree.leaves(new["losses"]))
        return loss + BETA * penalty, new["spectral_stats"]

    (loss, stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, spectral_stats=stats), loss


def main(digits: data.Images, steps: int = 300) -> network.Report:
    """Train on four fifths of the digits, test on the others."""
    train, test = data.split(digits)
    model = CNN()
    variables = jax.jit(model.init)(jax.random.key(0), train.images[:1])
    state = TrainState.create(apply_fn=model.apply, tx=optax.adam(2e-3), **variables)
    for batch in data.batches(train, 100, steps, seed=0):
        state, loss = train_step(state, *batch)
    logits = model.apply({"params": state.params, "spectral_stats": state.spectral_stats}, test.images)
    accuracy = np.mean(np.argmax(logits, axis=-1) == test.labels)
    print(f"loss {loss:.3f}, accuracy on {len(test.labels)} unseen digits {accuracy:.1%}\n")
    # What training followed were estimates; these are sound.
    report = network.report(state.params)
    print(report)
    return report


if __name__ == "__main__":
    main(data.mnist_5k())
