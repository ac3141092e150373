"""What a traced function becomes: nodes with Lipschitz constants, and signals that read them.

A *node* is an array that depends on the function's input, with a rule for the Lipschitz constant of the map from the
input to it, in the ℓ2 norm over all entries. A *signal* is what an operation sees: entries of one node, in any order
and number, under one scalar function. So moving entries and scalar functions cost no node: they are looked at when
something reads the signal, and x·½·(1 + erf(x/√2)) is one function of x, not a product of two signals.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array

from fantastic4.expression import Expr, X, affine


class UnboundedError(ValueError):
    """A function, or a part of it, that has no Lipschitz constant, or none that is known."""


@dataclasses.dataclass(frozen=True)
class Label:
    """Where an operation comes from.

    Attributes:
      operation: the primitive, or what several of them were recognised as.
      name: the modules it is in, as ``"ResNet/Conv_0"``; may be empty.
      source: file and line of the user's code.
    """

    operation: str
    name: str = ""
    source: str = ""

    def __str__(self) -> str:
        inside = f" in {self.name}" if self.name else ""
        return f"{self.operation!r}{inside}" + (f" ({self.source})" if self.source else "")


_counter = itertools.count()


@dataclasses.dataclass(eq=False)
class Node:
    """An array that depends on the input.

    Attributes:
      label: the operation that made it.
      shape: its shape.
      inputs: what it reads.
      unmoved: what else is computed on the way, and does not move it: a level that softmax does not see.
      most: what its entries are at most, in absolute value, where that is known.
      least: what they are at least, where that is known.
    """

    label: Label
    shape: tuple[int, ...]
    inputs: tuple[Signal, ...]
    unmoved: tuple[Signal, ...] = dataclasses.field(default=(), kw_only=True)
    most: float = dataclasses.field(default=math.inf, kw_only=True)
    least: float = dataclasses.field(default=-math.inf, kw_only=True)
    order: float = dataclasses.field(default_factory=lambda: next(_counter), init=False)
    mapped: dict[Expr, Node] = dataclasses.field(default_factory=dict, init=False)  # nodes of scalar functions of it

    def lipschitz(self, given: Sequence[Array], how: Any) -> Array:
        """Its constant, from those of its inputs."""
        raise NotImplementedError

    def curvature(self, given: Sequence[tuple[Array, Array]], how: Any) -> Array:
        """Lipschitz constant of its derivative, from the constants (first and second) of its inputs."""
        raise UnboundedError(
            f"{self.label} has no second derivative that is known to be bounded: use smooth activations and means"
        )


@dataclasses.dataclass(eq=False)
class Signal:
    """Entries of a node under a scalar function.

    Attributes:
      node: the node.
      shape: of the signal.
      index: for each entry, which entry of the node (in row-major order) it is; None: all in order. A negative number
        is a constant, the same one wherever the number is the same: what it is counts before the scalar function.
      expr: the scalar function.
      label: the last operation.
    """

    node: Node
    shape: tuple[int, ...]
    index: np.ndarray | None
    expr: Expr
    label: Label

    @property
    def places(self) -> np.ndarray:
        """`index`, written out."""
        if self.index is not None:
            return self.index
        return np.arange(math.prod(self.shape), dtype=np.int64).reshape(self.shape)

    def same_entries(self, other: Signal) -> bool:
        """Whether both read the same entries in the same order."""
        if self.node is not other.node or self.shape != other.shape:
            return False
        if self.index is None or other.index is None:
            return self.index is other.index or bool(np.array_equal(self.places, other.places))
        return self.index is other.index or bool(np.array_equal(self.index, other.index))

    @property
    def plain(self) -> bool:
        """Whether it is its node, up to shape."""
        return self.index is None and self.expr == X

    @property
    def is_shifted(self) -> bool:
        """Whether it is its node plus a constant, up to shape."""
        return self.index is None and self.adds_constants

    @property
    def adds_constants(self) -> bool:
        """Whether it is entries of its node plus a constant, in any places."""
        straight = affine(self.expr)
        return straight is not None and straight[0] == 1


_constants = itertools.count(2)


def unknown(shape: tuple[int, ...], *, alike: bool) -> np.ndarray:
    """Places of constants that nothing else shares: one number if they are ``alike``, else one for each."""
    if alike:
        return np.full(shape, -next(_constants), np.int64)
    size = math.prod(shape)
    first = next(_constants)
    collections.deque(itertools.islice(_constants, max(size - 1, 0)), maxlen=0)
    return -(first + np.arange(size, dtype=np.int64)).reshape(shape)


def whole(node: Node) -> Signal:
    """A node as a signal."""
    return Signal(node, node.shape, None, X, node.label)


def multiplicity(*places: np.ndarray | None) -> int:
    """How often one entry occurs, at most, in all of these together."""
    if len(places) == 1 and places[0] is None:
        return 1
    written = [p for p in places if p is not None]
    flat = np.concatenate([p.ravel() for p in written]) if written else np.zeros(0, np.int64)
    flat = flat[flat >= 0]
    return int(np.bincount(flat).max()) if flat.size else 0


def reachable(signals: Sequence[Signal], *, unmoved: bool = False) -> list[Node]:
    """All nodes that these depend on, each after those that it reads; with ``unmoved`` those that move nothing too."""
    found: dict[int, Node] = {}
    waiting = [s.node for s in signals]
    while waiting:
        node = waiting.pop()
        if id(node) not in found:
            found[id(node)] = node
            waiting += [s.node for s in (*node.inputs, *(node.unmoved if unmoved else ()))]
    return sorted(found.values(), key=lambda node: node.order)
