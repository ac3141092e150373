"""A long hunt through random networks for a bound below the truth: make fuzz. Many weights for each architecture."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fantastic4 import lipschitz

SEED = int(os.environ.get("FUZZ_SEED", 20211))
CASES = int(os.environ.get("FUZZ_CASES", 10_000))
EACH = 250  # draws of the weights of one architecture
POINTS = 12

ROUGH = [jax.nn.relu, jnp.abs, jax.nn.leaky_relu, lambda x: jnp.sort(x.reshape(-1, 2), axis=1).ravel()]
SMOOTH = [jax.nn.softplus, jnp.tanh, jax.nn.sigmoid, jax.nn.gelu, jax.nn.silu, jnp.sin]


def architecture(rng, smooth):
    """A function of (params, x), how to draw the params, and the input's size."""
    side, channels = int(rng.integers(3, 6)), int(rng.integers(1, 3))
    kinds, shapes = [], []
    shape = (1, side, channels)
    for _ in range(int(rng.integers(1, 4))):
        act = (SMOOTH if smooth else SMOOTH + ROUGH)[rng.integers(6 if smooth else 10)]
        new = 2 * int(rng.integers(1, 3))
        taps, stride = int(rng.integers(1, 4)), int(rng.integers(1, 3))
        pad = ["SAME", [(taps - 1, 0)], "wrap"][rng.integers(3)]
        kinds.append((act, pad, stride, bool(rng.integers(2)), bool(rng.integers(2)) and not smooth))
        shapes += [(taps, shape[-1], new), (new,), (new,)]
        shape = jax.eval_shape(
            lambda x, k=kinds[-1], s=shapes[-3:]: layer(x, [jnp.zeros(n) for n in s], k),
            jax.ShapeDtypeStruct(shape, float),
        ).shape
    shapes.append((int(np.prod(shape)), 1 if smooth else 3))

    def net(params, x):
        x = x.reshape(1, side, channels)
        for i, kind in enumerate(kinds):
            x = layer(x, params[3 * i : 3 * i + 3], kind)
        return x.ravel() @ params[-1]

    def draw(rng, count):
        return [
            jnp.asarray(rng.normal(size=(count, *s)) * rng.uniform(0.2, 1.5, (count,) + (1,) * len(s)) / s[0] ** 0.5)
            for s in shapes
        ]

    return net, draw, side * channels


def layer(x, params, kind):
    """Convolution, scale and shift as of batch norm, activation, residual, pooling."""
    kernel, scale, shift = params
    act, pad, stride, residual, pooled = kind
    before = x
    if pad == "wrap":
        total = len(kernel) - 1
        x, pad = jnp.pad(x, ((0, 0), (total // 2, total - total // 2), (0, 0)), mode="wrap"), "VALID"
    x = jax.lax.conv_general_dilated(x, kernel, (stride,), pad, dimension_numbers=("NWC", "WIO", "NWC"))
    x = (x - shift) * scale
    x = act(x).reshape(x.shape)
    if residual and x.shape == before.shape:
        x = x + before
    if pooled and x.shape[1] >= 2:
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 1), (1, 1, 1), "VALID")
    return x


@pytest.mark.fuzz
@pytest.mark.parametrize("smooth", [False, True], ids=["lipschitz", "curvature"])
def test_many_random_networks(smooth, x64):
    worst, done = 0.0, 0
    while done < CASES:
        rng = np.random.default_rng([SEED, smooth, done])
        net, draw, size = architecture(rng, smooth)
        params = draw(rng, EACH)
        example = jax.ShapeDtypeStruct((size,), float)
        points = jnp.asarray(rng.normal(size=(POINTS, size)) * np.geomspace(0.05, 5, POINTS)[:, None])
        if smooth:
            bound = jax.jit(lambda p: lipschitz.curvature(lambda x: net(p, x)[0], example))
            found = jax.vmap(jax.vmap(jax.hessian(lambda p, x: net(p, x)[0], 1), (None, 0)), (0, None))
            values = np.linalg.eigvalsh(np.asarray(jax.jit(found)(params, points)))
            truths = [-values.min(axis=(1, 2)), values.max(axis=(1, 2))]
        else:
            bound = jax.jit(lambda p: (lipschitz.bound(lambda x: net(p, x), example).value,))
            found = jax.vmap(jax.vmap(jax.jacobian(net, 1), (None, 0)), (0, None))
            jacobians = np.asarray(jax.jit(found)(params, points))
            truths = [np.linalg.norm(jacobians, 2, axis=(2, 3)).max(axis=1)]
        for i in range(EACH):
            each = bound([p[i] for p in params])
            for limit, truth in zip(each, truths, strict=True):
                assert float(limit) >= truth[i], f"seed {SEED}, architecture {done}, draw {i}: {limit} < {truth[i]}"
                worst = max(worst, truth[i] / max(float(limit), 1e-300))
        done += EACH
        print(f"{done} networks, nearest to the bound: {worst:.4f} of it", flush=True)
