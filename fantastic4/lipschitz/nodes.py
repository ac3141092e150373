"""The kinds of nodes, each with its Lipschitz constant and that of its derivative."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fantastic4 import dense
from fantastic4.bounds import bound
from fantastic4.conv import ConvSpec, canonical
from fantastic4.expression import X
from fantastic4.interval import norm_interval
from fantastic4.lipschitz.entrywise import steepest_sum
from fantastic4.lipschitz.fixed import SILENT, Fixed
from fantastic4.lipschitz.graph import Label, Node, Signal
from fantastic4.lipschitz.numbers import Numbers, slope_together
from fantastic4.rounding import constant_up, gamma, product_up, round_up, unit_roundoff


@dataclasses.dataclass(eq=False)
class Sum(Node):
    """A sum or a difference of signals.

    Attributes:
      sign: of the second.
    """

    sign: int = 1

    def lipschitz(self, given: Sequence[Array], how: Numbers) -> Array:
        """The sum; of one node √2 times the root of the sum of squares; of the same entries the steepest of them."""
        total = how.sum(given)
        if self.inputs[0].node is self.inputs[1].node:
            together = how.times(math.sqrt(2), slope_together(self.inputs), how.of(self.inputs[0].node))
            return jnp.minimum(total, together)
        found = steepest_sum(self.inputs, (1, self.sign))
        if found is None:
            return total
        base, steepest = found
        return jnp.minimum(total, how.times(how.narrow(steepest), how.root(base), how.of(base.node)))

    def curvature(self, given: Sequence[tuple[Array, Array]], how: Numbers) -> Array:
        """The sum."""
        return how.sum([second for _, second in given])


@dataclasses.dataclass(eq=False)
class Joint(Node):
    """Entries of several signals, each at most once: side by side, the larger of two, or chosen by a constant.

    Attributes:
      linear: whether it is linear, up to a constant.
      where: for each signal, the places in this node (in row-major order) that its entries fill, where that is known.
    """

    linear: bool = True
    where: tuple[np.ndarray, ...] = ()

    def lipschitz(self, given: Sequence[Array], how: Numbers) -> Array:
        """Root of the sum of squares, with signals of one node taken together."""
        parts: dict[int, list[Signal]] = {}
        for signal in self.inputs:
            parts.setdefault(id(signal.node), []).append(signal)
        terms = []
        for signals in parts.values():
            below, factor = how.of(signals[0].node), slope_together(signals)
            terms.append(below if factor == 1 else how.times(factor, below))
        return how.root_sum_squares(terms)

    def curvature(self, given: Sequence[tuple[Array, Array]], how: Numbers) -> Array:
        """Root of the sum of squares."""
        if not self.linear:
            return super().curvature(given, how)
        return how.root_sum_squares([second for _, second in given])


@dataclasses.dataclass(eq=False)
class Either(Node):
    """One of several signals, which one the input does not decide."""

    def lipschitz(self, given: Sequence[Array], how: Numbers) -> Array:
        """The largest."""
        return functools.reduce(jnp.maximum, given)

    def curvature(self, given: Sequence[tuple[Array, Array]], how: Numbers) -> Array:
        """The largest."""
        return functools.reduce(jnp.maximum, [second for _, second in given])


@dataclasses.dataclass(eq=False)
class Linear(Node):
    """A convolution or a matrix, plus any constant.

    Attributes:
      kernel: of a convolution ``(*spatial, c_in // groups, c_out)``; matrices ``(batch, n_in, n_out)``.
      spec: of a convolution; None for matrices.
      features: which axes of the shape the last axis of the kernel is, in order.
      lost: what rounding has taken from the norm while scales were folded into the kernel.
      roundings: how many there were of every entry meanwhile.
      factors: the kernel before the last scale was folded into it, and that scale, one number for each output.
      apply: the linear map itself, of a kernel and an array of the input's shape.
      rings: of a convolution the axes that hold every output of a line: the stride, and how far its inputs reach.
      unfolded: the same as entries times the constants that were folded in last, where nothing was added since.
    """

    kernel: Array = dataclasses.field(default_factory=lambda: jnp.zeros(0))
    spec: ConvSpec | None = None
    features: tuple[int, ...] = ()
    lost: Array | float = 0.0
    roundings: int = 0
    factors: tuple[Array, Array] | None = None
    apply: Callable[[Array, Array], Array] | None = None
    rings: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    unfolded: Callable[[], Signal] | None = dataclasses.field(default=None, init=False)

    def norm(self, method: str) -> Array:
        """An upper bound of its norm."""
        if self.kernel.size == 0:
            found = jnp.zeros((), self.kernel.dtype)
        elif self.spec is None:
            found = _largest_norm(self.kernel)
        elif method == "interval":
            if isinstance(self.kernel, jax.core.Tracer):
                raise ValueError(
                    "method 'interval' works on numbers, not inside jit or grad: call lipschitz.bound outside, "
                    "or take method 'grid'"
                )
            found = jnp.asarray(norm_interval(self.kernel, self.spec).upper, self.kernel.dtype)
        else:
            found = bound(self.kernel, self.spec, method=method)
        return found if isinstance(self.lost, float) else round_up(found + self.lost, 2)

    @property
    def is_last_matrix(self) -> bool:
        """Whether it is one matrix whose columns are the last axis."""
        return self.spec is None and len(self.kernel) == 1 and self.features == (len(self.shape) - 1,)

    def shifted(self, label: Label) -> Linear:
        """The same plus a constant: another node, with the same kernel."""
        return dataclasses.replace(self, label=dataclasses.replace(self.label, name=self.label.name or label.name))

    def scaled(self, by: Array, label: Label) -> Linear | None:
        """Its outputs times a constant that goes by feature; None where it does not."""
        if by.ndim != len(self.shape) or any(n != 1 for a, n in enumerate(by.shape) if a not in self.features):
            return None
        if self.spec is None and len(self.kernel) > 1:
            return None
        spread = tuple(n if a in self.features else 1 for a, n in enumerate(self.shape))
        kernel, columns, lost = _scaled(self.kernel, by, self.lost, self.spec, spread)
        new = dataclasses.replace(self, kernel=kernel, factors=(self.kernel, columns))
        new.lost = lost
        new.roundings = self.roundings + 9
        return new

    def negated(self) -> Linear:
        """Its negative, exactly."""
        factors = None if self.factors is None else (self.factors[0], -self.factors[1])
        return dataclasses.replace(self, kernel=-self.kernel, factors=factors)

    def after(self, first: Linear) -> Linear | None:
        """This matrix applied to the outputs of another, as one matrix, where that costs no more than its norm."""
        if self.spec is not None or first.spec is not None or len(self.kernel) > 1 or len(first.kernel) > 1:
            return None
        if first.kernel.shape[2] != self.kernel.shape[1]:
            return None
        if min(first.kernel.shape[1], self.kernel.shape[2]) > first.kernel.shape[2]:
            return None
        product, lost = _after(first.kernel, first.lost, self.kernel, self.lost)
        new = dataclasses.replace(self, kernel=product, factors=None, inputs=first.inputs)
        new.lost = lost
        new.roundings = 0
        new.apply = None
        return new

    def lipschitz(self, given: Sequence[Array], how: Numbers) -> Array:
        """The norm times the input's constant."""
        return how.times(how.norm(self), given[0])

    def curvature(self, given: Sequence[tuple[Array, Array]], how: Numbers) -> Array:
        """The norm times the input's."""
        return how.times(how.norm(self), given[0][1])


# Compiled together: one by one, the operations of these would be a program each for every shape.
def _size(kernel: Array, spec: ConvSpec | None) -> Array:
    """An upper bound of the norm by sizes alone: √taps · Frobenius norm."""
    size = dense.frobenius_bound(lax.stop_gradient(kernel).reshape(-1, kernel.shape[-1]))
    if spec is None:
        return size
    taps, factor = math.prod(kernel.shape[:-2]), canonical(kernel, spec)[1]
    return round_up(size * constant_up(math.sqrt(taps) * factor, size.dtype), 2)


@functools.partial(jax.jit, static_argnames=("spec", "spread"))
def _scaled(
    kernel: Array, by: Array, lost: Array | float, spec: ConvSpec | None, spread: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    """A kernel times one number for each output, these, and what rounding has taken from the norm."""
    columns = jnp.broadcast_to(by, spread).reshape(-1).astype(kernel.dtype)
    scaled = kernel * columns
    # An entry is off by a few roundings, and by less than the smallest float where it, or its scale, vanishes.
    largest = jnp.max(jnp.abs(lax.stop_gradient(columns)))
    u = 8.1 * unit_roundoff(kernel.dtype)
    tiny = float(jnp.finfo(kernel.dtype).tiny)
    vanished = tiny * kernel.size + product_up(jnp.asarray(tiny, kernel.dtype), _size(kernel, spec))
    lost = round_up(largest * lost + constant_up(u, scaled.dtype) * _size(scaled, spec) + vanished, 6)
    return scaled, columns, lost


@jax.jit
def _after(first: Array, lost_before: Array | float, second: Array, lost_behind: Array | float) -> tuple[Array, Array]:
    """The product of two matrices, and what rounding has taken from its norm."""
    product = jnp.matmul(first[0], second[0], precision=lax.Precision.HIGHEST)[None]
    one, two = _size(first, None), _size(second, None)
    error, before, behind = (
        jnp.asarray(x, product.dtype) for x in (gamma(first.shape[2] + 2, product.dtype), lost_before, lost_behind)
    )
    lost = product_up(error, one, two) + product_up(before, two) + product_up(one, behind)
    # Products of entries may vanish, each of less than the smallest float.
    vanished = float(jnp.finfo(product.dtype).tiny) * first.shape[2] * product.size
    return product, round_up(lost + product_up(before, behind) + vanished, 6)


@jax.jit
def _largest_norm(matrices: Array) -> Array:
    if len(matrices) == 1:
        return dense.bound(matrices[0])
    found = jnp.max(jax.vmap(dense.bound)(matrices))
    return jnp.where(jnp.any(jnp.isnan(matrices)), jnp.nan, found)  # which a maximum over thousands may drop


def settled(signal: Signal) -> Signal:
    """The same entries, as those of a node that has the scalar function behind it."""
    if signal.expr == X:
        return signal
    node = signal.node
    if signal.expr not in node.mapped:
        inner = Signal(node, node.shape, None, signal.expr, signal.label)
        label = dataclasses.replace(signal.label, operation=SILENT)
        node.mapped[signal.expr] = Fixed(label, node.shape, (inner,), linear=True, apply=lambda x: x)
    return Signal(node.mapped[signal.expr], signal.shape, signal.index, X, signal.label)
