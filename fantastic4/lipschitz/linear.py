"""Rules of matrix products and convolutions."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core

from fantastic4.conv import ConvSpec
from fantastic4.linalg import widened
from fantastic4.lipschitz import losses, patterns, products
from fantastic4.lipschitz.graph import Signal, whole
from fantastic4.lipschitz.nodes import Linear
from fantastic4.lipschitz.operands import at_once, is_constant, rearranged
from fantastic4.lipschitz.trace import Walk, out_shape, rule, shape_and_dtype
from fantastic4.lipschitz.wrapped import rings


@rule("dot_general")
def _dot(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    (contract, batch) = eqn.params["dimension_numbers"]
    left_first = isinstance(operands[0], Signal)
    if left_first and isinstance(operands[1], Signal):
        return products.of_matrices(walk, eqn, operands)
    signal, matrix = operands if left_first else operands[::-1]
    matrix = jnp.asarray(matrix)
    if not jnp.issubdtype(matrix.dtype, jnp.floating):  # JAX converts whole numbers and truth values in the product
        matrix = matrix.astype(jnp.promote_types(shape_and_dtype(eqn.outvars[0])[1], jnp.float32))
    own = int(left_first)
    # In the order of the signal's axes: rows of the matrix are then its entries as they lie in memory.
    pairs = sorted(zip(contract[1 - own], contract[own], strict=True))
    taken, contracted = [a for a, _ in pairs], [a for _, a in pairs]
    batched = batch[own]
    free = tuple(a for a in range(matrix.ndim) if a not in (*contracted, *batched))
    shape = out_shape(eqn)
    sizes = [matrix.shape[a] for a in free]
    lengths = [math.prod(matrix.shape[a] for a in axes) for axes in (batched, contracted, free)]
    together = widened(rearranged(matrix, (*batched, *contracted, *free), lengths))
    count = len(shape) - len(batched) - len(sizes)  # free axes of the signal
    start = len(batched) + (count if left_first else 0)
    # Two matrices in a row: the last axes of the first one's outputs are what the second contracts.
    rank = len(signal.shape)
    last = tuple(range(rank - len(taken), rank))

    def apply(kernel: Any, x: Any) -> Any:
        back = kernel.reshape([matrix.shape[a] for a in (*batched, *contracted, *free)])
        back = jnp.transpose(back, [int(a) for a in np.argsort((*batched, *contracted, *free))])
        left, right = (x, back) if left_first else (back, x)
        return lax.dot_general(left, right, eqn.params["dimension_numbers"], precision=lax.Precision.HIGHEST)

    if not free and batch[1 - own] == tuple(range(len(batched))):
        # A weight for every entry, as of labels beside log-softmax.
        order = {**dict(zip(taken, contracted, strict=True)), **dict(enumerate(batched))}
        with at_once(matrix):
            by = widened(jnp.transpose(matrix, [order[a] for a in sorted(order)]))
            by = jnp.expand_dims(by, [a for a in range(rank) if a not in order])
        loss = losses.weighed(signal, taken, walk.label(eqn), by)
        if loss is not None and not loss[1]:
            return loss[0]
    features = tuple(range(start, start + len(sizes)))
    node = Linear(walk.label(eqn, "dense"), shape, (signal,), kernel=together, features=features, apply=apply)
    before = signal.node
    if (
        isinstance(before, Linear)
        and signal.is_shifted
        and signal.shape == before.shape
        and tuple(taken) == last == before.features
        and not batched
    ):
        return whole(node.after(before) or node)
    return whole(node)


def _is_tighter_copied(padding: str, taps: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a bound of the padded entries is smaller: strides above 2 need not divide a mirrored signal's period."""
    return padding == "REFLECT" and any(s > 2 and k > 1 for k, s in zip(taps, strides, strict=True))


def _can_be_exchanged(p: dict[str, Any]) -> bool:
    steps = (*p["window_strides"], *p["lhs_dilation"], *p["rhs_dilation"], p["feature_group_count"])
    return set(steps) == {1} and p["batch_group_count"] == 1


def _exchanged(p: dict[str, Any], kernel: Array, signal: Array) -> Array:
    """The same convolution with the kernel in the signal's place, the signal in the kernel's: it comes out mirrored."""
    of, by, out = p["dimension_numbers"]
    pads = []
    for (low, high), a, b in zip(p["padding"], of[2:], by[2:], strict=True):
        last = signal.shape[a] + low + high - kernel.shape[b]  # place of the output
        pads.append((last - low, signal.shape[a] - kernel.shape[b] + low))
    numbers = lax.ConvDimensionNumbers(by, of, (out[1], out[0], *out[2:]))
    found = lax.conv_general_dilated(
        kernel, signal, p["window_strides"], pads, dimension_numbers=numbers,
        preferred_element_type=p["preferred_element_type"],
    )  # fmt: skip
    return lax.rev(found, out[2:])


@rule("conv_general_dilated")
def _conv(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    signal, kernel = operands
    p = eqn.params
    if not is_constant(kernel):
        if is_constant(signal) and _can_be_exchanged(p) and 0 not in out_shape(eqn):
            with walk.inside(eqn):
                exchanged = jax.make_jaxpr(functools.partial(_exchanged, p))(*(v.aval for v in eqn.invars[::-1]))
                return walk.closed(exchanged, [kernel, signal])
        return walk.refuse(eqn, "convolves with a kernel that depends on the input: no rule")
    if p["batch_group_count"] != 1:
        return walk.refuse(eqn, "has batch_group_count: register a rule")
    numbers = p["dimension_numbers"]
    output, inputs, *spatial = numbers.rhs_spec
    if not 1 <= len(spatial) <= 3:
        return walk.refuse(eqn, f"has {len(spatial)} spatial axes, and 1 to 3 are known: register a rule")
    kernel = jnp.asarray(kernel)
    arranged = jnp.transpose(kernel, (*spatial, inputs, output))
    arranged = widened(arranged)
    dilated = any(d > 1 for d in p["lhs_dilation"])
    # Zero padding of any amount has the same bound; fewer outputs than stride 1 gives are some of its.
    spec = ConvSpec(
        strides=tuple(p["lhs_dilation"] if dilated else p["window_strides"]),
        dilation=tuple(p["rhs_dilation"]),
        groups=p["feature_group_count"],
        padding="VALID",
        transposed=dilated,
    )
    source, around = signal, None
    if not dilated and signal.index is not None:
        found = patterns.padded(signal, numbers.lhs_spec[2:], arranged.shape[:-2], p)
        if found is not None and not _is_tighter_copied(found[1], arranged.shape[:-2], p["window_strides"]):
            source, padding, around = found
            # Around a ring that strides divide it has the norm of one with zeros around it.
            lengths = [source.shape[a] for a in numbers.lhs_spec[2:]]
            if padding != "CIRCULAR" or any(n % s for n, s in zip(lengths, p["window_strides"], strict=True)):
                spec = dataclasses.replace(spec, padding=padding)

    def apply(kernel: Any, x: Any) -> Any:
        back = jnp.transpose(kernel, [int(a) for a in np.argsort((*spatial, inputs, output))])
        x = x if around is None else around(x)
        return lax.conv_general_dilated(
            x, back, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"], numbers,
            p["feature_group_count"], precision=lax.Precision.HIGHEST,
        )  # fmt: skip

    shape = out_shape(eqn)
    label = walk.label(eqn, "conv")
    features = (numbers.out_spec[1],)
    lines = rings(p, signal.shape, arranged.shape[:-2]) if around is None else {}
    return whole(
        Linear(label, shape, (source,), kernel=arranged, spec=spec, features=features, apply=apply, rings=lines)
    )
