r"""What a layer does at its borders: how much it pads, and which circular convolutions contain it.

A zero-padded layer on n inputs computes some of the rows and columns of a circular convolution of any period
large enough that what wraps around meets nothing but zeros. Other paddings first copy entries, a map whose
norm is √(how often an entry is copied, at most), and then are a layer without padding.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np
from jax import lax

from fantastic4 import symbol
from fantastic4.conv import ConvSpec, Geometry, check_input_shape, geometry

PAD_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect", "EDGE": "edge"}


def pads(layer: Geometry, input_shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Entries that a convolution adds in front of and behind each axis; negative where it crops."""
    if layer.padding in PAD_MODES:
        return tuple(((e - 1) // 2, e // 2) for e in layer.extent)
    if layer.padding == "CAUSAL":
        return ((layer.extent[0] - 1, 0),)
    if isinstance(layer.padding, str):
        return tuple(lax.padtype_to_pads(input_shape, layer.extent, layer.strides, layer.padding))
    return layer.padding


def transposed_pads(extent: int, stride: int, padding: str) -> tuple[int, int]:
    """Zeros in front of and behind the upsampled input, by the conventions of ``lax.conv_transpose``."""
    if padding == "SAME":
        total = extent + stride - 2
        front = extent - 1 if stride > extent - 1 else -(-total // 2)
    else:
        total = extent + stride - 2 + max(extent - stride, 0)
        front = extent - 1
    return front, total - front


class _Option(NamedTuple):
    """One axis of a `Cover`."""

    factor: float
    period: int
    stride: int


class Cover(NamedTuple):
    """A circular layer with ‖layer at its input size‖ ≤ factor · ‖circular layer at ``input_shape``‖.

    Attributes:
      factor: at least 1; 0 for a layer without outputs.
      spec: the circular layer's `ConvSpec`.
      input_shape: its input size, which its strides divide.
      is_layer: whether it is the layer itself.
    """

    factor: float
    spec: ConvSpec
    input_shape: tuple[int, ...]
    is_layer: bool


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _copied(n: int, low: int, used: int, mode: str) -> int:
    """How often the most copied of n entries occurs among the first ``used`` of the padded axis."""
    padded = np.pad(np.arange(n), (low, max(0, used - n - low)), mode=mode)[:used]  # type: ignore[call-overload]
    return int(np.bincount(padded).max())


def _direct(n: int, extent: int, stride: int, low: int, high: int, padding: str) -> list[_Option]:
    """The circular stand-ins of one axis of a convolution. An axis with one tap sees no border.

    Zero padding: outputs read the window [-low, used - low), of which [0, inputs) is data. A period P serves
    if all else in the window falls on zeros modulo P: P ≥ inputs + low and P ≥ used - low.
    """
    mode = PAD_MODES.get(padding)
    if padding == "CIRCULAR" and n % stride == 0:
        return [_Option(1.0, n, stride)]
    outputs = (n + low + high - extent) // stride + 1
    if outputs <= 0:
        return [_Option(0.0, stride, stride)]
    used = (outputs - 1) * stride + extent
    if extent == 1:
        return [_Option(1.0, stride, stride)]
    if mode is None:
        inputs = min(n, used - low)
        if inputs <= 0:
            return [_Option(0.0, stride, stride)]
        return [_Option(1.0, _round_up(max(inputs + max(low, 0), used - low), stride), stride)]
    options = [_Option(math.sqrt(_copied(n, low, used, mode)), _round_up(used, stride), stride)]
    if padding == "CIRCULAR":
        options.append(_Option(1.0, n, 1))  # the rows of the un-strided layer that the stride keeps
    if padding == "REFLECT" and n > 1 and 2 * (n - 1) % stride == 0:
        options.append(_Option(math.sqrt(2) if n > 2 else 1.0, 2 * (n - 1), stride))  # of the mirrored signal
    return options


def _transposed(n: int, extent: int, stride: int, padding: str | tuple[int, int]) -> list[_Option]:
    """Of a transposed convolution: it keeps a window [first, last) of n shifted copies of the taps.

    A period P serves if nothing outside the window wraps into it: P ≥ last and P ≥ length - first.
    """
    if padding == "CIRCULAR":
        return [_Option(1.0, n, stride)]
    front, back = transposed_pads(extent, stride, padding) if isinstance(padding, str) else padding
    length = (n - 1) * stride + extent
    first = extent - 1 - front
    last = min(first + (n - 1) * stride + 2 + front + back - extent, length)
    first = max(first, 0)
    if last <= first:
        return [_Option(0.0, 1, stride)]
    return [_Option(1.0, -(-max(last, length - first, n * stride) // stride), stride)]


def covers(kernel_shape: tuple[int, ...], spec: ConvSpec, input_shape: tuple[int, ...]) -> list[Cover]:
    """The circular layers that contain this layer at this input size; of each, the norm is known exactly.

    Args:
      kernel_shape: ``(*spatial, c_in // groups, c_out)``.
      spec: the layer's `ConvSpec`.
      input_shape: spatial size of its input.

    Returns:
      At least one `Cover`, whose norm at its period is at most that on the infinite grid.

    Raises:
      ValueError: kernel, spec and size do not fit.
    """
    layer = geometry(kernel_shape, spec)
    shape = check_input_shape(input_shape, layer)
    axes = []
    for axis, (n, extent, stride) in enumerate(zip(shape, layer.extent, layer.strides, strict=True)):
        name = layer.padding if isinstance(layer.padding, str) else ""
        if spec.transposed:
            axes.append(_transposed(n, extent, stride, name or layer.padding[axis]))
        else:
            axes.append(_direct(n, extent, stride, *pads(layer, shape)[axis], name))
    return [
        Cover(
            math.prod(o.factor for o in options),
            dataclasses.replace(spec, padding="CIRCULAR", strides=tuple(o.stride for o in options)),
            tuple(o.period for o in options),
            spec.padding == "CIRCULAR"
            and list(options) == [_Option(1.0, *a) for a in zip(shape, layer.strides, strict=True)],
        )
        for options in itertools.product(*axes)
    ]


def check_circular(input_shape: tuple[int, ...], layer: Geometry, spec: ConvSpec) -> tuple[int, ...]:
    """``input_shape``, at which the layer must be circular and have a symbol."""
    shape = check_input_shape(input_shape, layer)
    if spec.padding != "CIRCULAR":
        raise ValueError(
            f"the spectrum is exact for CIRCULAR padding, got {spec.padding!r}, whose norm may be larger: "
            "ask for dataclasses.replace(spec, padding='CIRCULAR'), or bound this layer with fantastic4.four_bounds"
        )
    if not spec.transposed and any(n % s for n, s in zip(shape, layer.strides, strict=True)):
        nearest = tuple(max(1, round(n / s)) * s for n, s in zip(shape, layer.strides, strict=True))
        raise ValueError(
            f"strides {layer.strides} must divide input_shape {shape}, or the rows wrap onto other phases "
            f"and no symbol exists: the nearest size is {nearest}"
        )
    return shape


def tap_spacing(layer: Geometry) -> tuple[int, ...]:
    """By how many outputs one tap of the canonical kernel moves, an axis: the dilation that strides leave."""
    return tuple(d // math.gcd(s, d) for s, d in zip(layer.strides, layer.dilation, strict=True))


def frequency_grid(layer: Geometry, spec: ConvSpec, input_shape: tuple[int, ...]) -> symbol.Grid:
    """The frequencies of the canonical kernels of a circular layer whose strides divide its input."""
    sizes = input_shape
    if not spec.transposed:
        sizes = tuple(n // s for n, s in zip(input_shape, layer.strides, strict=True))
    return symbol.grid(sizes, tap_spacing(layer))
