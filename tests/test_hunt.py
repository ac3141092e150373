"""Long hunts for a bound below the truth, through random networks and random geometries of layers: make fuzz."""

import os

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import fantastic4 as f4
from fantastic4 import border, conv, lipschitz
from fantastic4.bounds import METHODS

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


ZERO, WRAP = ("SAME", "SAME_LOWER", "VALID"), ("CIRCULAR", "REFLECT", "EDGE")


def any_layer(rng):
    """Kernel shape, input size and spec of a layer with any geometry, small enough for a matrix."""
    rank = int(rng.choice([1, 2, 2, 3]))
    each = lambda low, high: tuple(int(n) for n in rng.integers(low, high + 1, rank))
    taps, strides, dilation = each(1, (7, 4, 3)[rank - 1]), each(1, 4), each(1, 3 if rank < 3 else 2)
    size = each(1, (12, 6, 3)[rank - 1])
    ends = lambda: (
        max(-(n // 2), e) for n, e in zip(size, each(-2, 4), strict=True)
    )  # half of an axis cropped, at most
    spec = {"strides": strides, "dilation": dilation}
    spec["padding"] = [
        lambda: str(rng.choice(ZERO)),
        lambda: str(rng.choice(WRAP)),
        lambda: int(rng.integers(0, 4)),
        lambda: tuple(zip(ends(), ends(), strict=True)),
    ][rng.integers(4)]()
    groups = 1
    if rng.random() < 0.25:
        words = ("SAME", "VALID", "CIRCULAR")
        spec["padding"] = str(rng.choice(words)) if isinstance(spec["padding"], str) else spec["padding"]
        spec |= {"transposed": True, "transpose_kernel": bool(rng.integers(2))}
    else:
        if rank == 1 and rng.random() < 0.2:
            spec["padding"] = "CAUSAL"
        groups = spec["groups"] = int(rng.integers(1, 3))
    c_in, c_out = int(rng.integers(1, 3)), int(rng.integers(1, 3)) * groups
    return (*taps, c_in, c_out), size, spec


def supremum(kernels):
    """Of the norms of plain kernels on any circle, from above: a grid in NumPy, times what it may miss."""
    sizes = tuple(8 * k if k > 1 else 1 for k in kernels.shape[1:-2])
    found = max(float(oracle.circular_values(kernel, sizes)[0]) for kernel in kernels)
    return found / oracle.missed(kernels.shape[1:-2], sizes)


@pytest.mark.fuzz
def test_many_random_geometries():
    """The canonical form and the covers, in NumPy; every bound and the interval for one in fifty of them."""
    nearest = 0.0
    for number in range(CASES // 10):
        rng = np.random.default_rng([SEED, 2, number])
        shape, size, spec = any_layer(rng)
        kernel = cases.draw(rng, shape, str(rng.choice(cases.KINDS)))
        truth = oracle.norm(oracle.dense(kernel, size, **spec)) * (1 - 3e-7)  # the oracle's convolution is float32
        what = f"seed {SEED}, layer {number}: {shape}, {size}, {spec}"
        ours = f4.ConvSpec(**spec)
        kernels, factor = conv.canonical(kernel, ours)
        limit = supremum(np.asarray(kernels)) * factor
        assert limit >= truth, what
        nearest = max(nearest, truth / max(limit, 1e-300))
        for cover in border.covers(shape, ours, size):
            fields = ("strides", "dilation", "groups", "padding", "transposed", "transpose_kernel")
            circle = oracle.dense(kernel, cover.input_shape, **{f: getattr(cover.spec, f) for f in fields})
            assert cover.factor * oracle.norm(circle) * (1 + 3e-7) >= truth, (what, cover)
        if number % 50 == 0:
            for method in METHODS:
                assert float(f4.bound(kernel, ours, method=method)) >= truth, (what, method)
            own, every = (f4.norm_interval(kernel, ours, 1e-3, input_shape=n) for n in (size, None))
            assert own.lower * (1 - 6e-7) <= truth <= own.upper, what
            assert max(truth, every.lower) <= every.upper, what
        if number % 250 == 249:
            jax.clear_caches()
            print(f"{number + 1} layers, nearest to the bound: {nearest:.4f} of it", flush=True)
