"""Judging what one has not seen, after SNGP (Liu et al. 2020): residual blocks that keep distances, random features.

A block x + relu(conv(x)) whose convolution has norm at most c < 1 keeps the distance of any two inputs, up to factors
1 - c and 1 + c. So every layer uses kernel · min(1, c / bound). A Gaussian process on random features of what comes out
then has a variance that grows with the distance from the training images. Whether that tells strange digits from known
ones better than a network without bounds is a question of the data; the script prints both.

python -m examples.sngp_soft
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks import data
from fantastic4 import linen

BLOCKS = 3
FEATURES = 512
RIDGE = 1e-3


class Network(nn.Module):
    """Residual blocks with softly bounded layers, then random Fourier features and a linear output.

    Attributes:
      maximum: c, what each layer may stretch at most.
    """

    maximum: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Logits and features of images ``(batch, 28, 28, 1)``."""

        def soft(layer: nn.Module, x: jax.Array) -> jax.Array:
            return linen.SpectralBound(layer, mode="soft", maximum=self.maximum)(x, update_stats=train)

        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = soft(nn.Conv(16, (3, 3)), x)
        before = x
        for _ in range(BLOCKS):
            x = x + nn.relu(soft(nn.Conv(16, (3, 3)), x))
        self.sow("distances", "before", before)
        self.sow("distances", "after", x)
        x = x.reshape(len(x), -1)

        # Fixed, not trained: a Gaussian kernel of the distance (Rahimi & Recht 2007).
        def fixed(name: str, draw: Any, shape: tuple[int, ...]) -> jax.Array:
            return self.variable("fourier", name, lambda: draw(self.make_rng("params"), shape)).value

        weights = fixed("weights", jax.random.normal, (x.shape[-1], FEATURES))
        phases = 2 * np.pi * fixed("phases", jax.random.uniform, (FEATURES,))
        features = np.sqrt(2 / FEATURES) * jnp.cos(0.1 * x @ weights + phases)
        return nn.Dense(10)(features), features


def train(model: Network, digits: data.Images, steps: int) -> Any:
    """Trained variables."""
    variables = dict(jax.jit(model.init)(jax.random.key(0), digits.images[:1]))
    variables.pop("distances")
    optimizer = optax.adam(2e-3)
    opt_state = optimizer.init(variables["params"])

    @jax.jit
    def step(variables: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss_fn(params: Any) -> Any:
            everything = {**variables, "params": params}
            (logits, _), new = model.apply(everything, images, train=True, mutable=["spectral_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        gradients, new = jax.grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(gradients, opt_state)
        return {**variables, **new, "params": optax.apply_updates(variables["params"], updates)}, opt_state

    for batch in data.batches(digits, 100, steps, seed=0):
        variables, opt_state = step(variables, opt_state, *batch)
    return variables


def variance(model: Network, variables: Any, seen: jax.Array, images: jax.Array) -> jax.Array:
    """The Gaussian process's variance at ``images``, given the training images ``seen``: (Φ'Φ / ridge + I)⁻¹."""
    apply = jax.jit(lambda x: model.apply(variables, x)[1])
    known, new = apply(seen), apply(images)
    precision = jnp.eye(FEATURES) + known.T @ known / RIDGE
    return jnp.sum(new * jnp.linalg.solve(precision, new.T).T, axis=1)


def distances_kept(model: Network, variables: Any, images: jax.Array) -> tuple[float, float]:
    """The least and the largest ratio of two images' distance after the blocks to that before them."""
    sown = model.apply(variables, images, mutable=["distances"])[1]["distances"]
    apart = [jnp.linalg.norm((x[0][::2] - x[0][1::2]).reshape(len(images) // 2, -1), axis=1) for x in sown.values()]
    ratios = apart[list(sown).index("after")] / apart[list(sown).index("before")]
    return float(ratios.min()), float(ratios.max())


def auroc(low: np.ndarray, high: np.ndarray) -> float:
    """The probability that one of ``high`` is above one of ``low``."""
    return float(np.mean(high[:, None] > low[None, :]) + 0.5 * np.mean(high[:, None] == low[None, :]))


def main(digits: data.Images, steps: int = 300) -> dict[str, float]:
    """Train on digits 0 to 4; tell unseen ones of these from digits 5 to 9."""
    few = digits.labels < 5
    training, test = data.split(data.Images(digits.images[few], digits.labels[few]))
    strange = digits.images[~few]
    found = {}
    c = 0.9
    for name, maximum in ((f"soft, c = {c}", c), ("without bounds", 1e6)):
        model = Network(maximum)
        variables = train(model, training, steps)
        accuracy = np.mean(np.argmax(model.apply(variables, test.images)[0], axis=-1) == test.labels)
        known, unknown = (np.asarray(variance(model, variables, training.images, x)) for x in (test.images, strange))
        found[name] = auroc(known, unknown)
        least, most = distances_kept(model, variables, strange)
        print(
            f"{name}: accuracy {accuracy:.1%}; of a strange and a known digit the strange one is the more uncertain in "
            f"{found[name]:.1%}; distances times {least:.2f} to {most:.2f}"
        )
        assert maximum > c or ((1 - c) ** BLOCKS < least and most < (1 + c) ** BLOCKS)
    return found


if __name__ == "__main__":
    main(data.mnist_5k())
