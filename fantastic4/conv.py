"""What a convolution is, and the one form in which every method sees it.

`ConvSpec` says what a layer does with its kernel. `canonical` turns kernel and spec into a batch of
plain kernels (stride 1, dilation 1, one group, not transposed) and a factor, such that

    ‖layer‖₂ ≤ factor · max over the batch of σ∞(kernel)

for every input size, where σ∞ is the norm of a plain convolution on the infinite grid.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fantastic4.linalg import real_array

Sizes = int | Sequence[int]
Padding = str | int | Sequence[int | tuple[int, int]]

ZERO_PADDINGS = ("SAME", "SAME_LOWER", "VALID", "CAUSAL")
WRAP_PADDINGS = ("CIRCULAR", "REFLECT", "EDGE")
TRANSPOSED_PADDINGS = ("SAME", "VALID", "CIRCULAR")


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _hashable(value: Any) -> Any:
    value = value.tolist() if isinstance(value, np.ndarray) else value
    return tuple(_hashable(v) for v in value) if isinstance(value, Sequence) and not isinstance(value, str) else value


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """What a convolution layer does with its kernel: everything but the numbers.

    Static and hashable: it passes through ``jax.jit`` without ``static_argnums``.

    Attributes:
      strides: window strides, one int or one an axis; of a transposed convolution, its upsampling.
      dilation: spacing of the kernel's taps (Flax: ``kernel_dilation``).
      groups: Flax's ``feature_group_count``; as many as channels is a depthwise convolution.
      padding: as Flax spells it: ``"SAME"``, ``"VALID"``, ``"CAUSAL"`` (1-D), ``"CIRCULAR"``, ``"REFLECT"``,
        an int, or one int or ``(low, high)`` an axis; also ``"SAME_LOWER"`` and ``"EDGE"``.
      transposed: a transposed convolution, ``flax.linen.ConvTranspose``.
      transpose_kernel: of a transposed one: its kernel is flipped and ``(*spatial, c_out, c_in)``.

    Raises:
      ValueError: a field that no layer can have; what depends on the kernel is checked with it.

    Example:
      >>> from fantastic4 import ConvSpec
      >>> ConvSpec(strides=2, padding="VALID").strides
      2
    """

    strides: Sizes = 1
    dilation: Sizes = 1
    groups: int = 1
    padding: Padding = "SAME"
    transposed: bool = False
    transpose_kernel: bool = False

    def __post_init__(self):
        for name in ("strides", "dilation", "padding"):
            value = _hashable(getattr(self, name))
            object.__setattr__(self, name, value.upper() if isinstance(value, str) else value)  # JAX takes "same"
        for name in ("transposed", "transpose_kernel"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("strides", "dilation", "groups"):
            value = getattr(self, name)
            if name == "groups" and not _is_int(value):
                raise ValueError(f"groups must be an int, got {value!r}")
            entries = value if isinstance(value, tuple) else (value,)
            if not entries or not all(_is_int(v) and v >= 1 for v in entries):
                raise ValueError(f"{name} must be ints of at least 1, got {value!r}")
        allowed = TRANSPOSED_PADDINGS if self.transposed else ZERO_PADDINGS + WRAP_PADDINGS
        if isinstance(self.padding, str) and self.padding not in allowed:
            kind = "a transposed convolution" if self.transposed else "a convolution"
            raise ValueError(
                f"padding {self.padding!r} is not one of {', '.join(allowed)} for {kind}: "
                "name one of these, an int, or (low, high) pairs"
            )
        entries = self.padding if isinstance(self.padding, tuple) else (self.padding,)
        ends = [end for entry in entries for end in (entry if isinstance(entry, tuple) else (entry,))]
        if not isinstance(self.padding, str) and not all(map(_is_int, ends)):
            raise ValueError(f"padding must be a word, an int, or an int or (low, high) an axis, got {self.padding!r}")
        if self.transpose_kernel and not self.transposed:
            raise ValueError("transpose_kernel=True needs transposed=True: only ConvTranspose has it")
        if self.transpose_kernel and self.groups != 1:
            raise ValueError("transpose_kernel=True goes with groups=1: Flax's ConvTranspose has no groups")

    @classmethod
    def from_layer(cls, layer: Any) -> ConvSpec:
        """The spec of a Flax layer: ``Conv`` or ``ConvTranspose`` of linen or NNX.

        A ``mask`` of the layer is no part of the spec: bound ``kernel * mask``.

        Args:
          layer: an instance; a linen one need not be bound.

        Returns:
          `ConvSpec`.

        Raises:
          ValueError: another kind of layer, or one that computes something else than a convolution with its one kernel:
            ``ConvLocal``, an injected ``conv_general_dilated`` or ``promote_dtype``, ``input_dilation``, a subclass
            with a call or a ``param`` method of its own.

        Example:
          >>> from flax import linen as nn
          >>> from fantastic4 import ConvSpec
          >>> ConvSpec.from_layer(nn.Conv(8, (3, 3), strides=2, padding="VALID")).padding
          'VALID'
        """
        if isinstance(layer, type):
            raise ValueError(f"{layer.__name__} is a class: pass a layer, as {layer.__name__}(…)")
        name = type(layer).__name__
        if not all(hasattr(layer, a) for a in ("kernel_size", "strides", "padding", "kernel_dilation")):
            raise ValueError(
                f"{name} is not a Flax convolution: pass a linen or nnx Conv or ConvTranspose; "
                "the norm of a Dense layer is fantastic4.dense.bound(kernel)"
            )
        if getattr(layer, "shared_weights", True) is False:
            raise ValueError(
                f"{name} has a kernel for every pixel: make it dense with fantastic4.jacobian or bound it as a matrix"
            )
        injected = getattr(layer, "conv_general_dilated", None)
        if getattr(layer, "conv_general_dilated_cls", None) is not None or injected not in (
            None,
            jax.lax.conv_general_dilated,
        ):
            raise ValueError(
                f"{name} has its own conv_general_dilated: what it computes is not known; bound what it calls"
            )
        if any(d != 1 for d in np.ravel(getattr(layer, "input_dilation", None) or 1)):
            raise ValueError(
                f"{name} has input_dilation {layer.input_dilation}: "
                "write it as ConvTranspose(strides=…), which computes the same"
            )
        as_flax_computes(layer, next((kind for kind in type(layer).__mro__ if kind.__module__ in _HOMES), object))
        transposed = hasattr(layer, "transpose_kernel")
        return cls(
            strides=1 if layer.strides is None else layer.strides,
            dilation=1 if layer.kernel_dilation is None else layer.kernel_dilation,
            groups=getattr(layer, "feature_group_count", 1),
            padding=layer.padding,
            transposed=transposed,
            transpose_kernel=transposed and bool(layer.transpose_kernel),
        )


_HOMES = ("flax.linen.linear", "flax.nnx.nn.linear", "fantastic4.linen")  # of classes whose layers are what they say


def as_flax_computes(layer: Any, kind: Any) -> None:
    """Refuse a layer that computes something else than ``kind``, or with another kernel than it stores.

    Args:
      layer: of linen or NNX.
      kind: the class of Flax that it is an instance of.

    Raises:
      ValueError: a subclass with a call or a param method of its own, or an injected ``promote_dtype``.
    """
    name = type(layer).__name__
    # `param` is what linen's layers get their kernel from: weight standardisation has been written into it.
    if any(getattr(type(layer), method, None) is not getattr(kind, method, None) for method in ("__call__", "param")):
        raise ValueError(
            f"{name} has a call or a param method of its own: bound the layers in it, or use fantastic4.network on the "
            "params that it computes with"
        )
    usual = inspect.signature(kind.__init__).parameters.get("promote_dtype")
    if usual is not None and layer.promote_dtype is not usual.default:
        raise ValueError(f"{name} has its own promote_dtype: what it computes with is not known")


class Geometry(NamedTuple):
    """A spec made definite for one kernel.

    Attributes:
      taps: kernel size, one int an axis.
      strides: one int an axis.
      dilation: one int an axis.
      extent: dilated kernel size, ``(taps - 1) * dilation + 1``.
      padding: the string, or a ``(low, high)`` pair an axis.
      c_in: channels that the layer takes.
      c_out: channels that it gives.
    """

    taps: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    extent: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    c_in: int
    c_out: int


def geometry(shape: tuple[int, ...], spec: ConvSpec) -> Geometry:
    """Check that ``spec`` fits a kernel of ``shape`` and spell it out, axis by axis.

    Raises:
      ValueError: wrong rank, an empty axis, or a spec with the wrong number of entries.
    """
    if not isinstance(spec, ConvSpec):
        raise ValueError(f"spec must be a ConvSpec, got {type(spec).__name__}: for a layer, ConvSpec.from_layer(layer)")
    rank = len(shape) - 2
    if not 1 <= rank <= 3:
        raise ValueError(
            f"a kernel has shape (*spatial, c_in // groups, c_out) with 1 to 3 spatial axes, got {shape}: "
            "for a dense kernel use fantastic4.dense, for PyTorch's layout fantastic4.from_torch"
        )
    if 0 in shape:
        raise ValueError(f"a kernel needs at least one tap and one channel on every axis, got {shape}")

    def per_axis(name: str, value: Any) -> tuple[int, ...]:
        values = value if isinstance(value, tuple) else (value,) * rank
        if len(values) != rank:
            raise ValueError(f"{name} {value} has {len(values)} entries, the kernel {shape} has {rank} spatial axes")
        return tuple(int(v) for v in values)

    if shape[-1] % spec.groups:
        raise ValueError(f"groups {spec.groups} must divide the last axis of the kernel {shape}")
    padding = spec.padding
    if padding == "CAUSAL" and rank != 1:
        raise ValueError(
            f"CAUSAL padding is for one spatial axis, the kernel {shape} has {rank}: use (low, high) pairs"
        )
    if not isinstance(padding, str):
        entries = padding if isinstance(padding, tuple) else (padding,) * rank
        pairs = tuple(p if isinstance(p, tuple) else (p, p) for p in entries)
        if len(pairs) != rank or not all(len(pair) == 2 for pair in pairs):
            raise ValueError(
                f"padding {padding} must be an int, or an int or (low, high) for each of the {rank} spatial axes"
            )
        padding = tuple((int(low), int(high)) for low, high in pairs)
    taps, dilation = shape[:-2], per_axis("dilation", spec.dilation)
    c_in, c_out = shape[-2] * spec.groups, shape[-1]
    if spec.transpose_kernel:
        c_in, c_out = c_out, c_in
    return Geometry(
        taps=taps,
        strides=per_axis("strides", spec.strides),
        dilation=dilation,
        extent=tuple((k - 1) * d + 1 for k, d in zip(taps, dilation, strict=True)),
        padding=padding,
        c_in=c_in,
        c_out=c_out,
    )


def check_input_shape(input_shape: tuple[int, ...], layer: Geometry) -> tuple[int, ...]:
    """``input_shape``, which must have an entry of at least 1 for each spatial axis."""
    if len(input_shape) != len(layer.taps) or min(input_shape) < 1:
        raise ValueError(
            f"input_shape {input_shape} must have {len(layer.taps)} entries of at least 1: "
            "the spatial size, without batch and channels"
        )
    return input_shape


class Phased(NamedTuple):
    """A batch of kernels as they are stored, the phases that their taps have, and the factor of the padding.

    Attributes:
      kernels: ``(batch, *spatial, c_in, c_out)``: one kernel a group.
      phases: of every axis, static; tap t has phase t modulo this, and all taps of one phase are a plain convolution.
      factor: ‖layer‖ ≤ factor · max over the batch of σ∞ of the polyphase kernels.
    """

    kernels: Array
    phases: tuple[int, ...]
    factor: float


class Canonical(NamedTuple):
    """A batch of plain kernels, and the factor by which padding can add to their norm.

    Attributes:
      kernels: ``(batch, *spatial, c_in, c_out)``: one kernel a group, polyphase where strided.
      factor: ‖layer‖ ≤ factor · max over the batch of σ∞.
    """

    kernels: Array
    factor: float


def canonical(kernel: Array, spec: ConvSpec, input_shape: tuple[int, ...] | None = None) -> Canonical:
    r"""The canonical form of a convolution.

    Per axis, with stride s, dilation d, g = gcd(s, d), k taps:

    * Outputs meet only every g-th input phase, so s/g, dilation 1 has the same norm. Taps of one phase
      modulo s/g are a plain convolution of their own: the *polyphase* kernel of min(s/g, k) phases, side
      by side as input channels, and ⌈k / (s/g)⌉ taps. Exact where the padding is zero.
    * CIRCULAR: the rows of n inputs wrap onto other phases unless s divides n, so without a size that it
      divides the kernel stays un-strided: a strided layer computes some of the un-strided one's rows.
    * REFLECT is a circular convolution of the mirrored signal, of period 2(n - 1), in which each entry
      occurs twice: factor √2. Stride 2 always divides that period; larger ones need not.
    * EDGE, p in front and q behind: a border entry occurs 1 + max(p, q) times; for n = 1 the layer
      is the sum of its taps, which the phases see as one vector repeated.
    * A transposed convolution has the norm of the convolution that it transposes.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``, 1 to 3 spatial axes.
      spec: the layer's `ConvSpec`.
      input_shape: spatial size, to use where it makes the form tighter; without it, any size.

    Returns:
      `Canonical`.

    Raises:
      ValueError: kernel and spec do not fit.
    """
    kernels, phases, factor = phased(kernel, spec, input_shape)
    return Canonical(polyphase(kernels, phases), factor)


def phased(kernel: Array, spec: ConvSpec, input_shape: tuple[int, ...] | None = None) -> Phased:
    """`canonical`, of the same arguments, before the phases become input channels: that copies a strided kernel."""
    kernel = real_array(kernel, "kernel")
    layer = geometry(kernel.shape, spec)
    strides, factor = [], 1.0
    for axis, (k, s, d, extent) in enumerate(zip(layer.taps, layer.strides, layer.dilation, layer.extent, strict=True)):
        phases = s // math.gcd(s, d)
        if k > 1 and not spec.transposed:
            if layer.padding == "CIRCULAR" and (input_shape is None or input_shape[axis] % s):
                phases = 1
            elif layer.padding == "REFLECT":
                phases = phases if s <= 2 else 1
                factor *= math.sqrt(2)
            elif layer.padding == "EDGE":
                factor *= math.sqrt(max(1 + extent // 2, min(phases, k)))
        strides.append(min(phases, k))
    groups = spec.groups
    if groups == 1:
        kernels = lax.reshape(kernel, (1, *kernel.shape))  # of expand_dims the transpose is a sum
    else:
        kernels = jnp.moveaxis(kernel.reshape(*kernel.shape[:-1], groups, kernel.shape[-1] // groups), -2, 0)
    if spec.transposed and not spec.transpose_kernel:
        kernels = jnp.swapaxes(kernels, -1, -2)
    return Phased(kernels, tuple(strides), factor)


@functools.partial(jax.jit, static_argnames=("phases",), inline=True)
def polyphase(kernels: Array, phases: tuple[int, ...]) -> Array:
    """``(batch, *spatial, c_in, c_out)`` -> the phases of every axis as further input channels."""
    for axis, count in enumerate(phases, start=1):
        if count == 1:
            continue
        padded = jnp.pad(kernels, [(0, -kernels.shape[axis] % count if a == axis else 0) for a in range(kernels.ndim)])
        shape = padded.shape
        split = padded.reshape(*shape[:axis], shape[axis] // count, count, *shape[axis + 1 :])
        moved = jnp.moveaxis(split, axis + 1, -3)
        kernels = moved.reshape(*moved.shape[:-3], count * moved.shape[-2], moved.shape[-1])
    return kernels


def polyphase_taps(spatial: tuple[int, ...], phases: tuple[int, ...]) -> tuple[int, ...]:
    """Taps of the `polyphase` kernel."""
    return tuple(-(-k // count) for k, count in zip(spatial, phases, strict=True))
