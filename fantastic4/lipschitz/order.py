"""First and second order: the constants of all nodes of a graph, in the order in which they were made."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from fantastic4.expression import Expr, affine
from fantastic4.lipschitz.branches import combined
from fantastic4.lipschitz.fixed import SILENT
from fantastic4.lipschitz.graph import Label, Node, Signal
from fantastic4.lipschitz.nodes import Linear
from fantastic4.lipschitz.numbers import Numbers, bend, slope


@dataclasses.dataclass(frozen=True)
class Step:
    """An operation with its share in a bound.

    Attributes:
      label: the operation.
      shape: of its result.
      factor: its own constant: of a sum, what it adds to the largest of its inputs, as a factor.
      total: the constant from the input up to here.
    """

    label: Label
    shape: tuple[int, ...]
    factor: Array
    total: Array


def first_order(nodes: Sequence[Node], outputs: Sequence[Signal], how: Numbers) -> tuple[list[Step], list[Array]]:
    """The constants of all nodes, kept in ``how``: the steps that made them, and the constants of the outputs."""
    steps: list[Step] = []
    seen: dict[tuple[int, float, Expr], Array] = {}

    def read(signal: Signal) -> Array:
        times, own = how.root(signal), slope(signal)
        below = how.of(signal.node)
        if times == 1 and own == 1 and affine(signal.expr) is not None:  # moved, shifted, or with another sign
            return below
        key = id(signal.node), times, signal.expr
        if key not in seen:
            factor = how.up(own * times * (1 + 1e-15) if times != 1 else own)
            seen[key] = how.times(factor, below) if float(own) * times != 1 else below
            steps.append(Step(signal.label, signal.shape, factor, seen[key]))
        return seen[key]

    matrices = combined(nodes, outputs)
    how.prepare([node for node in nodes if isinstance(node, Linear)])
    for node in nodes:
        given = [read(signal) for signal in node.inputs]
        total = node.lipschitz(given, how)
        if id(node) in matrices:
            base, norm = matrices[id(node)]
            total = jnp.minimum(total, how.times(norm, how.of(base)))
        how.constants[id(node)] = total
        if given and node.label.operation != SILENT:
            largest = lax.stop_gradient(functools.reduce(jnp.maximum, given))
            steps.append(Step(node.label, node.shape, total / jnp.where(largest > 0, largest, 1), total))
    return steps, [read(signal) for signal in outputs]


def second_order(nodes: Sequence[Node], outputs: Sequence[Signal], how: Numbers) -> list[Array]:
    """Lipschitz constants of the outputs' derivatives, after `first_order` with the same ``how``.

    For f after g, C(f ∘ g) ≤ C(f) L(g)² + L(f) C(g); a scalar function s of entries with constants L, C has
    sup|s''| L² + sup|s'| C, for the entries of u ⊙ v are at most ‖u‖ ‖v‖ together.
    """
    second: dict[int, Array] = {}

    def read(signal: Signal) -> tuple[Array, Array]:
        first, times = how.of(signal.node), how.root(signal)
        linear = how.times(slope(signal) * times, second[id(signal.node)])
        if affine(signal.expr) is None:
            linear = how.sum([linear, how.times(bend(signal) * times, first, first)])
        return how.times(slope(signal) * times, first), linear

    for node in nodes:
        second[id(node)] = node.curvature([read(signal) for signal in node.inputs], how)
    return [read(signal)[1] for signal in outputs]
