"""One table of layers, over which every law is tested: (kernel shape, input shape, spec)."""

import itertools
import zlib

import numpy as np

LAYERS = {
    # 2-D, every padding of Flax
    "same": ((3, 3, 2, 3), (5, 5), {}),
    "same-even": ((2, 4, 2, 2), (5, 6), {}),
    "same-lower": ((2, 3, 2, 2), (5, 4), {"padding": "SAME_LOWER"}),
    "valid": ((3, 2, 2, 3), (5, 5), {"padding": "VALID"}),
    "int": ((3, 3, 2, 3), (4, 4), {"padding": 3}),
    "pairs": ((3, 3, 2, 3), (4, 5), {"padding": ((0, 2), (3, 1))}),
    "crop": ((3, 3, 2, 3), (6, 6), {"padding": ((-1, 2), (0, -2))}),
    "circular": ((3, 3, 2, 3), (4, 5), {"padding": "CIRCULAR"}),
    "circular-even": ((4, 2, 2, 2), (5, 4), {"padding": "CIRCULAR"}),
    "circular-small": ((5, 4, 2, 2), (3, 2), {"padding": "CIRCULAR"}),
    "reflect": ((3, 3, 2, 2), (5, 4), {"padding": "REFLECT"}),
    "reflect-even": ((4, 3, 1, 2), (5, 4), {"padding": "REFLECT"}),
    "reflect-small": ((5, 5, 1, 1), (2, 3), {"padding": "REFLECT"}),
    "reflect-one": ((3, 3, 2, 1), (1, 4), {"padding": "REFLECT"}),
    "edge": ((3, 3, 2, 2), (4, 4), {"padding": "EDGE"}),
    "edge-one": ((3, 5, 1, 2), (1, 3), {"padding": "EDGE"}),
    "larger-than-input": ((5, 5, 2, 2), (3, 2), {}),
    "one-tap": ((1, 1, 4, 3), (3, 3), {}),
    "row": ((1, 5, 2, 2), (4, 6), {}),
    # strides
    "stride": ((3, 3, 2, 3), (6, 6), {"strides": 2}),
    "stride-odd": ((3, 3, 2, 2), (7, 5), {"strides": 2, "padding": "VALID"}),
    "stride-mixed": ((3, 4, 2, 2), (6, 7), {"strides": (2, 3)}),
    "stride-over-kernel": ((2, 2, 2, 2), (7, 7), {"strides": 3}),
    "stride-circular": ((3, 3, 2, 2), (6, 4), {"strides": 2, "padding": "CIRCULAR"}),
    "stride-circular-wrapping": ((3, 3, 1, 2), (5, 7), {"strides": 2, "padding": "CIRCULAR"}),
    "stride-over-kernel-circular": ((2, 1, 2, 2), (6, 4), {"strides": (3, 2), "padding": "CIRCULAR"}),
    "stride-reflect": ((3, 3, 2, 2), (5, 6), {"strides": 2, "padding": "REFLECT"}),
    "stride-three-reflect": ((3, 3, 1, 2), (4, 6), {"strides": 3, "padding": "REFLECT"}),
    "stride-edge": ((3, 3, 2, 1), (4, 1), {"strides": 3, "padding": "EDGE"}),
    # dilation
    "dilation": ((3, 3, 2, 3), (6, 6), {"dilation": 2}),
    "dilation-circular": ((3, 3, 2, 3), (5, 6), {"dilation": (2, 3), "padding": "CIRCULAR"}),
    "dilation-stride": ((3, 3, 2, 2), (7, 6), {"dilation": 2, "strides": 2}),
    "dilation-stride-coprime": ((3, 2, 2, 2), (8, 8), {"dilation": 3, "strides": 2}),
    "dilation-stride-shared": ((3, 2, 1, 2), (12, 8), {"dilation": (2, 6), "strides": 4, "padding": "CIRCULAR"}),
    "dilation-reflect": ((2, 3, 1, 2), (5, 5), {"dilation": 2, "padding": "REFLECT"}),
    "dilation-edge": ((3, 2, 1, 2), (5, 4), {"dilation": 2, "padding": "EDGE"}),
    # groups
    "groups": ((3, 3, 2, 4), (4, 4), {"groups": 2}),
    "depthwise": ((3, 3, 1, 4), (5, 4), {"groups": 4}),
    "depth-multiplier": ((3, 3, 1, 6), (4, 4), {"groups": 3, "padding": "CIRCULAR"}),
    "groups-stride": ((3, 3, 2, 4), (6, 4), {"groups": 2, "strides": 2, "padding": "CIRCULAR"}),
    # transposed
    "transposed": ((3, 3, 2, 3), (3, 4), {"transposed": True}),
    "transposed-stride": ((3, 3, 2, 3), (3, 3), {"transposed": True, "strides": 2}),
    "transposed-valid": ((4, 3, 2, 2), (3, 2), {"transposed": True, "strides": (3, 2), "padding": "VALID"}),
    "transposed-circular": ((3, 4, 2, 3), (3, 3), {"transposed": True, "strides": 2, "padding": "CIRCULAR"}),
    "transposed-circular-small": ((5, 5, 1, 2), (2, 1), {"transposed": True, "strides": 2, "padding": "CIRCULAR"}),
    "transposed-dilated": ((3, 2, 1, 2), (3, 3), {"transposed": True, "strides": 2, "dilation": 2}),
    "transposed-pairs": ((3, 3, 2, 2), (4, 3), {"transposed": True, "strides": 2, "padding": ((1, 2), (0, 3))}),
    "transposed-int": ((3, 3, 2, 2), (4, 3), {"transposed": True, "padding": 2}),
    "transpose-kernel": ((3, 4, 3, 2), (3, 3), {"transposed": True, "strides": 2, "transpose_kernel": True}),
    "transpose-kernel-circular": (
        (3, 4, 1, 2),
        (3, 2),
        {"transposed": True, "strides": 2, "transpose_kernel": True, "padding": "CIRCULAR"},
    ),
    # 1-D and 3-D
    "1d": ((5, 3, 4), (9,), {}),
    "1d-causal": ((5, 3, 4), (7,), {"padding": "CAUSAL", "dilation": 2}),
    "1d-causal-stride": ((4, 2, 3), (7,), {"padding": "CAUSAL", "strides": 2}),
    "1d-circular": ((4, 3, 2), (6,), {"padding": "CIRCULAR", "strides": 3}),
    "1d-depthwise": ((3, 1, 4), (8,), {"groups": 4, "padding": "VALID"}),
    "1d-transposed": ((5, 2, 3), (4,), {"transposed": True, "strides": 3, "padding": "CIRCULAR"}),
    "3d": ((2, 3, 2, 2, 3), (3, 3, 3), {}),
    "3d-circular": ((3, 2, 3, 2, 2), (3, 2, 4), {"padding": "CIRCULAR"}),
    "3d-stride": ((3, 2, 3, 1, 2), (4, 4, 2), {"padding": "CIRCULAR", "strides": 2}),
    "3d-transposed": ((2, 2, 2, 1, 2), (2, 2, 2), {"transposed": True, "strides": 2}),
}

CIRCULAR = {
    name: case
    for name, case in LAYERS.items()
    if case[2].get("padding") == "CIRCULAR" and name != "stride-circular-wrapping"
}


def kernel(name, kind="normal"):
    """A kernel for the layer of this name, the same in every run."""
    shape = LAYERS[name][0]
    rng = np.random.default_rng(zlib.crc32(f"{name} {kind}".encode()))
    return draw(rng, shape, kind)


KINDS = ("normal", "uneven", "ones", "one-tap", "rank-one", "alternating")


def draw(rng, shape, kind):
    """A random kernel of a kind: the structured ones are where a bound is attained or a factor is needed."""
    taps = shape[:-2]
    if kind == "normal":
        k = rng.standard_normal(shape)
    elif kind == "uneven":  # taps of very different size
        k = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal((*taps, 1, 1)))
    elif kind == "ones":  # equal taps: energy at frequency 0, where the bounds are exact
        k = np.broadcast_to(rng.standard_normal(shape[-2:]), shape)
    elif kind == "one-tap":
        k = np.zeros(shape)
        k[tuple(rng.integers(taps))] = rng.standard_normal(shape[-2:])
    elif kind == "rank-one":
        k = rng.standard_normal(taps)[..., None, None] * np.outer(*(rng.standard_normal(c) for c in shape[-2:]))
    elif kind == "alternating":  # energy at frequency pi
        signs = np.ones(taps)
        for tap in itertools.product(*map(range, taps)):
            signs[tap] = (-1) ** sum(tap)
        k = signs[..., None, None] * np.abs(rng.standard_normal(shape[-2:]))
    return np.asarray(k, np.float32)
