"""Truth by dull means. This file never imports the package: NumPy in float64, and what Flax itself computes."""

import functools
import itertools
import math

import jax
import numpy as np
from flax import linen as nn

EDGE = "EDGE"  # the one padding that Flax does not have: padded by hand


def layer(kernel_shape, *, strides=1, dilation=1, groups=1, padding="SAME", transposed=False, transpose_kernel=False):
    """The Flax layer with these settings."""
    rank = len(kernel_shape) - 2
    per_axis = lambda v: (v,) * rank if isinstance(v, int) else v
    common = {
        "strides": per_axis(strides),
        "padding": padding,
        "kernel_dilation": per_axis(dilation),
        "use_bias": False,
    }
    if transposed:
        features = kernel_shape[-2] if transpose_kernel else kernel_shape[-1]
        return nn.ConvTranspose(features, kernel_shape[:-2], transpose_kernel=transpose_kernel, **common)
    if padding == EDGE:
        common["padding"] = "VALID"
    return nn.Conv(kernel_shape[-1], kernel_shape[:-2], feature_group_count=groups, **common)


@functools.cache
def _apply(kernel_shape, spec):
    return jax.jit(layer(kernel_shape, **dict(spec)).apply)


def dense(kernel, input_shape, **spec):
    """The matrix of the Flax layer, (outputs, inputs): its columns are the layer's answers to one-hot inputs."""
    kernel = np.asarray(kernel, np.float32)
    c_in = kernel.shape[-1 if spec.get("transpose_kernel") else -2] * spec.get("groups", 1)
    size = math.prod(input_shape) * c_in
    x = np.eye(size, dtype=np.float32).reshape(size, *input_shape, c_in)
    if spec.get("padding") == EDGE:
        dilation = spec.get("dilation", 1)
        dilation = (dilation,) * (kernel.ndim - 2) if isinstance(dilation, int) else dilation
        extent = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:-2], dilation, strict=True)]
        x = np.pad(x, [(0, 0), *(((e - 1) // 2, e // 2) for e in extent), (0, 0)], mode="edge")
    with jax.default_matmul_precision("highest"):
        y = _apply(kernel.shape, tuple(spec.items()))({"params": {"kernel": kernel}}, x)
    return np.asarray(y, np.float64).reshape(size, -1).T


def line(taps, size, *, padding="SAME", strides=1, dilation=1):
    """`dense` of a 1-D layer with one channel, in NumPy alone: pad the identity, then add up its rows."""
    taps = np.asarray(taps, np.float64).ravel()
    extent = (len(taps) - 1) * dilation + 1
    modes = {"CIRCULAR": "wrap", "REFLECT": "reflect", "EDGE": "edge"}
    if padding == "SAME":
        total = max((-(-size // strides) - 1) * strides + extent - size, 0)
        pads = (total // 2, total - total // 2)
    elif padding in modes:
        pads = ((extent - 1) // 2, extent // 2)
    else:
        pads = {"VALID": (0, 0), "CAUSAL": (extent - 1, 0)}.get(padding, (padding, padding))
    rows = np.pad(np.eye(size), (pads, (0, 0)), mode=modes.get(padding, "constant"))
    starts = range(0, len(rows) - extent + 1, strides)
    return np.array([sum(w * rows[s + t * dilation] for t, w in enumerate(taps)) for s in starts]).reshape(-1, size)


def norm(matrix):
    """Largest singular value in float64; 0 for an empty matrix."""
    return float(np.linalg.norm(np.asarray(matrix, np.float64), 2)) if 0 not in np.shape(matrix) else 0.0


def unfoldings(kernel):
    """The norms of all unfoldings by name, each matrix built entry by entry."""
    kernel = np.asarray(kernel, np.float64)
    *taps, c_in, c_out = kernel.shape
    rank = len(taps)
    result = {}
    for axes in itertools.chain.from_iterable(itertools.combinations(range(rank), n) for n in range(rank + 1)):
        others = [a for a in range(rank) if a not in axes]
        rows = math.prod(taps[a] for a in axes)
        columns = math.prod(taps[a] for a in others)
        matrix = np.zeros((rows * c_out, columns * c_in))
        for tap in itertools.product(*map(range, taps)):
            r = c = 0
            for a in axes:
                r = r * taps[a] + tap[a]
            for a in others:
                c = c * taps[a] + tap[a]
            matrix[r * c_out : (r + 1) * c_out, c * c_in : (c + 1) * c_in] = kernel[tap].T
        name = "T" if not axes else "U" if len(axes) == rank else "".join(map(str, axes))
        result[{"0": "R", "1": "S"}.get(name, name) if rank == 2 else name] = norm(matrix)
    return result


def circular_values(kernel, input_shape):
    """All singular values of the plain circular convolution, descending, by folding and a NumPy FFT."""
    kernel = np.asarray(kernel, np.float64)
    rank = kernel.ndim - 2
    folded = np.zeros((*input_shape, *kernel.shape[-2:]))
    for tap in itertools.product(*map(range, kernel.shape[:-2])):
        folded[tuple(t % n for t, n in zip(tap, input_shape, strict=True))] += kernel[tap]
    return np.sort(np.linalg.svd(np.fft.fftn(folded, axes=range(rank)), compute_uv=False).ravel())[::-1]


def missed(taps, sizes):
    """What of a largest ‖F‖ a grid of these sizes shows at least (Ehlich & Zeller 1964)."""
    return math.prod(math.cos(math.pi * (k - 1) / (2 * n)) for k, n in zip(taps, sizes, strict=True))


def power_unfoldings(kernel, vectors, iterations):
    """Plain power iteration on explicit matrices, to check the fused one: singular values after each count."""
    values = {}
    for name, matrix in matrices_2d(kernel).items():
        u = vectors[name]
        for _ in range(iterations):
            v = matrix.T @ u
            v /= np.linalg.norm(v)
            u = matrix @ v
            values[name] = np.linalg.norm(u)
            u /= values[name]
    return values


def matrices_2d(kernel):
    """R, S, T, U of a 2-D kernel as the paper draws them."""
    k = np.asarray(kernel, np.float64)
    h, w, i, o = k.shape
    return {
        "R": k.transpose(0, 3, 1, 2).reshape(h * o, w * i),
        "S": k.transpose(1, 3, 0, 2).reshape(w * o, h * i),
        "T": k.transpose(3, 0, 1, 2).reshape(o, h * w * i),
        "U": k.transpose(0, 1, 3, 2).reshape(h * w * o, i),
    }
