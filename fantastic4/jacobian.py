"""The linear map that a layer really is: forward, adjoint, and as a matrix.

What Flax's ``Conv`` and ``ConvTranspose`` compute without their bias, from a kernel and a `ConvSpec`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from fantastic4.border import PAD_MODES, pads, transposed_pads
from fantastic4.conv import ConvSpec, Geometry, check_input_shape, geometry
from fantastic4.devices import vary_as
from fantastic4.entry import entry, sizes
from fantastic4.linalg import HIGHEST, real_array

Pads = tuple[tuple[int, int], ...]


@entry()
def forward(kernel: Array, x: Array, spec: ConvSpec = ConvSpec()) -> Array:  # noqa: B008 (frozen)
    """The layer with this kernel applied to ``x``, without bias.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      x: ``(*input_shape, c_in)``, or a batch of such.
      spec: the layer's `ConvSpec`.

    Returns:
      ``(*output_shape, c_out)``, or a batch of such; float32 or wider.

    Raises:
      ValueError: kernel, spec and input do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from fantastic4 import ConvSpec, jacobian
      >>> jacobian.forward(jnp.ones((3, 3, 2, 4)), jnp.ones((8, 8, 2)), ConvSpec(strides=2)).shape
      (4, 4, 4)
    """
    kernel, x = real_array(kernel, "kernel"), real_array(x, "x")
    layer = geometry(kernel.shape, spec)
    rank = len(layer.taps)
    if x.ndim not in (rank + 1, rank + 2) or x.shape[-1] != layer.c_in:
        raise ValueError(
            f"x has shape {x.shape}, the kernel {kernel.shape} takes (*spatial, {layer.c_in}) "
            f"with {rank} spatial axes, or a batch of these"
        )
    batch = x if x.ndim == rank + 2 else x[None]
    y = _transposed(kernel, batch, spec, layer) if spec.transposed else _direct(kernel, batch, spec, layer)
    return y if x.ndim == rank + 2 else y[0]


def _convolve(kernel: Array, x: Array, layer: Geometry, spec: ConvSpec, padding: Pads, **strides: Any) -> Array:
    rank = len(layer.taps)
    spatial = "DHW"[3 - rank :]
    if any(not 0 <= p <= e - 1 for pair, e in zip(padding, layer.extent, strict=True) for p in pair):
        # XLA's CPU convolution reads out of bounds where padding crops much, its adjoint where it adds much.
        inner = strides.pop("lhs_dilation", (1,) * rank)
        widths = [(low, high, d - 1) for (low, high), d in zip(padding, inner, strict=True)]
        sizes = zip(x.shape[1:-1], widths, strict=True)
        if any((n - 1) * (d + 1) + 1 + low + high < 0 for n, (low, high, d) in sizes):
            raise ValueError(f"padding {padding} crops more than an input of spatial size {x.shape[1:-1]} has")
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *widths, (0, 0, 0)])
        padding = ((0, 0),) * rank
    return lax.conv_general_dilated(
        x,
        kernel,
        padding=padding,
        rhs_dilation=layer.dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=spec.groups,
        precision=HIGHEST,
        **strides,
    )


def _direct(kernel: Array, x: Array, spec: ConvSpec, layer: Geometry) -> Array:
    padding = pads(layer, x.shape[1:-1])
    if spec.padding in PAD_MODES:
        x = jnp.pad(x, [(0, 0), *padding, (0, 0)], mode=PAD_MODES[str(spec.padding)])
        padding = ((0, 0),) * len(padding)
    return _convolve(kernel, x, layer, spec, padding, window_strides=layer.strides)


def _transposed(kernel: Array, x: Array, spec: ConvSpec, layer: Geometry) -> Array:
    rank = len(layer.taps)
    if spec.transpose_kernel:
        kernel = jnp.swapaxes(jnp.flip(kernel, tuple(range(rank))), -1, -2)
    padding = layer.padding
    if isinstance(padding, str):
        padding = tuple(transposed_pads(e, s, padding) for e, s in zip(layer.extent, layer.strides, strict=True))
    y = _convolve(kernel, x, layer, spec, padding, window_strides=(1,) * rank, lhs_dilation=layer.strides)
    if spec.padding == "CIRCULAR":
        for axis, stride in enumerate(layer.strides, start=1):
            y = _wrap(y, axis, stride * x.shape[axis], ceil_in_front=not spec.transpose_kernel)
    return y


def _wrap(y: Array, axis: int, period: int, *, ceil_in_front: bool) -> Array:
    """Add up the entries of ``y`` that meet on a circle of length ``period``, aligned as Flax aligns them."""
    spare = (period - y.shape[axis]) % (2 * period)
    front = (spare + 1) // 2 if ceil_in_front else spare // 2
    place = (jnp.arange(y.shape[axis]) + front) % period
    moved = jnp.moveaxis(y, axis, 0)
    circle = jnp.zeros((period, *moved.shape[1:]), y.dtype).at[place].add(moved)
    return jnp.moveaxis(circle, 0, axis)


@entry(input_shape=sizes)
def adjoint(kernel: Array, y: Array, input_shape: tuple[int, ...], spec: ConvSpec = ConvSpec()) -> Array:  # noqa: B008
    """The adjoint of `forward` applied to ``y``.

    ⟨forward(x), y⟩ = ⟨x, adjoint(y)⟩ for all x and y.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      y: ``(*output_shape, c_out)``.
      input_shape: spatial size of the layer's input.
      spec: the layer's `ConvSpec`.

    Returns:
      ``(*input_shape, c_in)``.

    Raises:
      ValueError: kernel, spec and sizes do not fit.
    """
    kernel, y = real_array(kernel, "kernel"), real_array(y, "y")
    layer = geometry(kernel.shape, spec)
    x = jax.ShapeDtypeStruct((*check_input_shape(input_shape, layer), layer.c_in), kernel.dtype)
    apply = lambda x: forward(kernel, x, spec)  # noqa: E731
    expected = jax.eval_shape(apply, x)
    if y.shape != expected.shape:
        raise ValueError(f"y has shape {y.shape}, the layer's output at input {tuple(input_shape)} is {expected.shape}")
    start = vary_as(jnp.zeros(x.shape, x.dtype), kernel, y)
    return jax.linear_transpose(apply, start)(vary_as(y.astype(expected.dtype), start))[0]


@entry(input_shape=sizes)
def materialise(kernel: Array, input_shape: tuple[int, ...], spec: ConvSpec = ConvSpec()) -> Array:  # noqa: B008
    """The layer as a dense matrix: its Jacobian, for small cases (the memory is inputs × outputs).

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      input_shape: spatial size of the input.
      spec: the layer's `ConvSpec`.

    Returns:
      ``(Π output_shape · c_out, Π input_shape · c_in)``; positions outermost, channels innermost.

    Raises:
      ValueError: kernel, spec and size do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from fantastic4 import jacobian
      >>> print(jacobian.materialise(jnp.array([1.0, 2.0]).reshape(2, 1, 1), (3,)))
      [[1. 2. 0.]
       [0. 1. 2.]
       [0. 0. 1.]]
    """
    kernel = real_array(kernel, "kernel")
    layer = geometry(kernel.shape, spec)
    shape = (*check_input_shape(input_shape, layer), layer.c_in)
    size = math.prod(shape)
    columns = forward(kernel, jnp.eye(size, dtype=kernel.dtype).reshape(size, *shape), spec)
    return columns.reshape(size, -1).T
