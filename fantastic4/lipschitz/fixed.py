"""Nodes with a Lipschitz constant of their own, whatever they read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from fantastic4.lipschitz.graph import Node
from fantastic4.lipschitz.numbers import Numbers

SILENT = "shift"
"""The operation of nodes that change no constant: no row is written for them."""


@dataclasses.dataclass(eq=False)
class Input(Node):
    """The function's input itself."""

    def lipschitz(self, given: Sequence[Array], how: Numbers) -> Array:
        """1."""
        return jnp.ones((), how.dtype)

    def curvature(self, given: Sequence[tuple[Array, Array]], how: Numbers) -> Array:
        """0."""
        return jnp.zeros((), how.dtype)


@dataclasses.dataclass(eq=False)
class Fixed(Node):
    """An operation with a Lipschitz constant of its own.

    Attributes:
      factor: the constant.
      linear: whether it is linear, up to a constant.
      bend: the Lipschitz constant of its derivative, where it is not linear and that is known.
      apply: the linear map, where its coefficients are all 0 or positive.
    """

    factor: float | Array = 1.0
    linear: bool = False
    bend: float | Array | None = None
    apply: Callable[[Array], Array] | None = None

    def lipschitz(self, given: Sequence[Array], how: Numbers) -> Array:
        """Factor times the constant of its inputs, taken together."""
        together = how.root_sum_squares(given)
        return together if isinstance(self.factor, float) and self.factor == 1 else how.times(self.factor, together)

    def curvature(self, given: Sequence[tuple[Array, Array]], how: Numbers) -> Array:
        """Factor times that of its inputs; of what is not linear, and bend times their constants squared."""
        if not self.linear and self.bend is None:
            return super().curvature(given, how)
        linear = how.times(self.factor, how.root_sum_squares([second for _, second in given]))
        if self.linear or self.bend is None:
            return linear
        first = how.root_sum_squares([first for first, _ in given])
        return how.sum([linear, how.times(self.bend, first, first)])


@dataclasses.dataclass(eq=False)
class Scaled(Fixed):
    """Entries times constants.

    Attributes:
      by: the constants, of a shape that broadcasts to the node's.
    """

    by: Array = dataclasses.field(default_factory=lambda: jnp.ones(()))


@dataclasses.dataclass(eq=False)
class Confined(Fixed):
    """Entries that lie in balls around 0, those with the same place along all other axes in one.

    Attributes:
      axes: along which they are together.
      radius: the root of the sum of their squares is at most that.
    """

    axes: tuple[int, ...] = ()
    radius: float = math.inf

    @property
    def ball(self) -> np.ndarray:
        """For each entry in row-major order, in which ball it lies, counted from 0."""
        kept = [1 if a in self.axes else n for a, n in enumerate(self.shape)]
        return np.broadcast_to(np.arange(math.prod(kept)).reshape(kept), self.shape).ravel()


@dataclasses.dataclass(eq=False)
class Softmax(Confined):
    """Probabilities: those in one ball add up to 1, whose squares to no more."""


@dataclasses.dataclass(eq=False)
class Reduced(Fixed):
    """A reduction over axes.

    Attributes:
      axes: which.
    """

    axes: tuple[int, ...] = ()


@dataclasses.dataclass(eq=False)
class LogSumExp(Fixed):
    """The logarithm of the sum of exponentials over axes.

    Attributes:
      axes: which, of what it reads.
    """

    axes: tuple[int, ...] = ()


@dataclasses.dataclass(eq=False)
class LogSoftmax(Fixed):
    """Entries less the logarithm of the sum of their exponentials over axes.

    Attributes:
      axes: which.
    """

    axes: tuple[int, ...] = ()
