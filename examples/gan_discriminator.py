"""A GAN on real digits whose discriminator is normalised in every layer: kernel / bound (after Miyato et al. 2018).

python -m examples.gan_discriminator        # a few minutes; writes out/gan.png
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure

import fantastic4 as f4
from benchmarks import data
from fantastic4 import linen, network

NOISE = 64
OUTPUT = Path("out/gan.png")


class Discriminator(nn.Module):
    """Every layer is held to norm 1, as far as its estimate is right, and no activation is steeper."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """One number for each image ``(batch, 28, 28, 1)``."""
        hold = partial(linen.SpectralBound, mode="hard", maximum=1.0)
        for features in (32, 64, 128):
            x = nn.leaky_relu(hold(nn.Conv(features, (4, 4), strides=2))(x, update_stats=train), 0.2)
        return hold(nn.Dense(1))(x.reshape(len(x), -1), update_stats=train)[:, 0]


class Generator(nn.Module):
    """Images in [-1, 1] from noise ``(batch, NOISE)``."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Images ``(batch, 28, 28, 1)``."""
        x = nn.relu(nn.LayerNorm()(nn.Dense(7 * 7 * 64)(z))).reshape(-1, 7, 7, 64)
        x = nn.relu(nn.LayerNorm()(nn.ConvTranspose(32, (4, 4), (2, 2))(x)))
        return nn.tanh(nn.ConvTranspose(1, (4, 4), (2, 2))(x))


discriminator, generator = Discriminator(), Generator()
optimizer = optax.adam(5e-4, b1=0.5)


@jax.jit
def train_step(state: Any, images: jax.Array, key: jax.Array) -> Any:
    """One step of each player. The discriminator's slope is bounded, so no penalty is needed."""
    g_params, g_opt, d_params, d_stats, d_opt = state
    noise = jax.random.normal(key, (len(images), NOISE))
    temperature = 10.0  # a 1-Lipschitz function of a small image moves little: the loss sees it enlarged

    def d_loss(d_params: Any) -> Any:
        both = jnp.concatenate([images, generator.apply({"params": g_params}, noise)])
        variables = {"params": d_params, "spectral_stats": d_stats}
        score, new = discriminator.apply(variables, both, train=True, mutable=["spectral_stats"])
        real, fake = jnp.split(temperature * score, 2)
        return (nn.softplus(-real) + nn.softplus(fake)).mean(), new["spectral_stats"]

    (loss, d_stats), gradients = jax.value_and_grad(d_loss, has_aux=True)(d_params)
    updates, d_opt = optimizer.update(gradients, d_opt)
    d_params = optax.apply_updates(d_params, updates)

    def g_loss(g_params: Any) -> jax.Array:
        variables = {"params": d_params, "spectral_stats": d_stats}  # not mutable: nothing changes
        score = discriminator.apply(variables, generator.apply({"params": g_params}, noise))
        return nn.softplus(-temperature * score).mean()

    updates, g_opt = optimizer.update(jax.grad(g_loss)(g_params), g_opt)
    return (optax.apply_updates(g_params, updates), g_opt, d_params, d_stats, d_opt), loss


def main(digits: data.Images, steps: int = 600, output: Path = OUTPUT) -> dict[str, float]:
    """Train, draw what the generator makes, and bound what the discriminator computes with."""
    keys = jax.random.split(jax.random.key(0), steps + 3)
    variables = jax.jit(discriminator.init)(keys[-1], digits.images[:1])
    d_params, d_stats = variables["params"], variables["spectral_stats"]
    g_params = jax.jit(generator.init)(keys[-2], jnp.zeros((1, NOISE)))["params"]
    state = (g_params, optimizer.init(g_params), d_params, d_stats, optimizer.init(d_params))
    for key, (images, _) in zip(keys, data.batches(digits, 64, steps, seed=0), strict=False):
        state, loss = train_step(state, 2 * images - 1, key)
    g_params, _, d_params, d_stats, _ = state
    print(f"discriminator's loss {loss:.3f} (1.386 is a coin's)\n")
    sound = network.bounds(d_params, network.find(d_params, specs={"Conv_*/kernel": f4.ConvSpec(strides=2)}))
    held = {}
    for (path, bound), stats in zip(sound.items(), d_stats.values(), strict=True):
        # The layer uses kernel / estimate, so this bounds its norm, soundly. Above 1 by as much as the estimate, of one
        # power iteration a step, lags behind the weights; with iterations=3 it is hardly that.
        held[path] = float(bound / stats["bound"])
        print(f"{path}: norm at most {held[path]:.3f}")
    assert max(held.values()) < 1.2
    print(f"discriminator: Lipschitz constant at most {np.prod(list(held.values())):.3f}")
    images = generator.apply({"params": g_params}, jax.random.normal(keys[-3], (40, NOISE)))
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots(1)
    axes.imshow(np.asarray(images).reshape(4, 10, 28, 28).transpose(0, 2, 1, 3).reshape(112, 280), cmap="gray")
    axes.axis("off")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100, bbox_inches="tight")
    print(f"\nPicture: {output}")
    return held


if __name__ == "__main__":
    main(data.mnist_5k())
