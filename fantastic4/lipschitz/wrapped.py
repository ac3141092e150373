r"""Transposed convolutions with circular padding: Flax makes all outputs of a line and adds them up around a ring.

With all of them there, outputs j and j + P together are those of a convolution on a ring of P places, where the inputs
are P / s or fewer: of a norm that is a bound at every size, and not of √(rings) times that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array

from fantastic4.lipschitz.graph import Label, Signal, unknown, whole
from fantastic4.lipschitz.nodes import Linear


def rings(p: dict[str, Any], shape: Sequence[int], kernel: Sequence[int]) -> dict[int, tuple[int, int]]:
    """The axes of a convolution that hold every output of a line: the stride, and how far its inputs reach.

    Args:
      p: the params of its primitive.
      shape: of its input.
      kernel: how many taps it has on its spatial axes.
    """
    numbers, found = p["dimension_numbers"], {}
    for place, taps in enumerate(kernel):
        spread, n = p["lhs_dilation"][place], shape[numbers.lhs_spec[2 + place]]
        reach = (taps - 1) * p["rhs_dilation"][place]
        if p["window_strides"][place] == 1 and min(p["padding"][place]) >= reach:
            found[numbers.out_spec[2 + place]] = spread, (n - 1) * spread
    return found


def wrapped(signal: Signal, axis: int, label: Label) -> Signal | None:
    """The sum over an axis that goes around a ring, of all outputs of a convolution, as one on that ring; else None.

    Args:
      signal: what is summed; along other axes it may have been padded.
      axis: over this one.
      label: of the sum.
    """
    node, index = signal.node, signal.index
    if not isinstance(node, Linear) or node.apply is None or index is None or not signal.adds_constants:
        return None
    real = index[index >= 0]
    if index.ndim != len(node.shape) + 1 or real.size != np.prod(node.shape) or len(np.unique(real)) != real.size:
        return None
    shape = index.shape[:axis] + index.shape[axis + 1 :]
    there = np.delete(np.stack(np.nonzero(index >= 0)), axis, axis=0)
    moved = np.stack(np.unravel_index(real, node.shape)) - there
    turned = [a for a in range(len(shape)) if real.size and np.ptp(moved[a])]
    if len(turned) != 1 or turned[0] not in node.rings:
        return None
    (ring,) = turned
    period, (stride, last) = shape[ring], node.rings[ring]
    # Around a ring that holds all inputs, each in a place of its own.
    if period % stride or last >= period or np.ptp(moved[ring] % period):
        return None
    inside = tuple(slice(None) if a == ring else slice(there[a].min(), there[a].max() + 1) for a in range(len(shape)))
    read, apply = index[(*inside[:axis], slice(None), *inside[axis:])], node.apply

    def around(kernel: Any, x: Any) -> Array:
        outputs = apply(kernel, x).ravel()
        return (outputs[np.maximum(read, 0)] * (read >= 0).astype(outputs.dtype)).sum(axis=axis)

    new = dataclasses.replace(
        node,
        shape=tuple(n for a, n in enumerate(read.shape) if a != axis),
        apply=around,
        rings={a: known for a, known in node.rings.items() if a != ring},
        roundings=node.roundings + index.shape[axis],
        factors=None,
    ).shifted(label)
    fillers = index[index < 0]
    places = unknown(shape, alike=not fillers.size or bool(np.all(fillers == fillers[0])))
    places[inside] = np.arange(np.prod(new.shape)).reshape(new.shape)
    return dataclasses.replace(whole(new), shape=shape, index=None if shape == new.shape else places)
